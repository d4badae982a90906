"""Compile, cache and load the CPU kernel's library, mostly from small sources that stand for the real ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
import torch

from int8compile import ConfigError, Int8Warning, KernelBuildError, cpu
from int8compile.cache import cache_folder
from int8compile.cpu import build
from int8compile.cpu import compiler as compiler_module
from int8compile.exporting import stub
from tests.helpers.cpu_build import FAST, UNITS, Compiler

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# Two links: the library, and the object file for exported models.
LINKS = 2


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("tmp-*"))


def in_processes(count: int, function: Callable[..., None], *arguments: object) -> list[multiprocessing.Process]:
    """Start forked processes, which see the test's patches."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=function, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def test_the_second_call_compiles_nothing(compiler: Compiler) -> None:
    first = build.library()
    assert compiler.count == len(UNITS) + LINKS
    assert not first.cached
    assert first.compiler == "stub 1.0"
    assert first.variants == ("fast", "portable")
    second = build.library()
    assert compiler.count == len(UNITS) + LINKS
    assert second == dataclasses.replace(first, cached=True)
    assert not leftovers(first.path.parent)
    assert first.path.is_relative_to(os.environ["INT8COMPILE_CACHE"])


@pytest.mark.parametrize("change", ["source", "header", "new header", "flags", "torch", "compiler", "arguments"])
def test_whatever_changes_makes_a_library_of_its_own(
    compiler: Compiler, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before = build.library().path
    if change == "source":
        (sources / "fast.cpp").write_text("// changed\n")
    elif change == "header":
        (sources / "some.h").write_text("// changed\n")
    elif change == "new header":
        (sources / "other.h").touch()
    elif change == "flags":
        monkeypatch.setattr(build, "UNITS", (*UNITS[:-1], dataclasses.replace(UNITS[-1], flags=("-DX",))))
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    elif change == "compiler":
        compiler_module._identified.cache_clear()
        Compiler(tmp_path, "stub 2.0")
    else:
        monkeypatch.setenv("CXX", f"{compiler.path} -DX")
    after = build.library()
    assert not after.cached
    assert after.path != before
    assert before.exists()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("INT8COMPILE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "int8compile"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "int8compile"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/int8compile")
    monkeypatch.setenv("INT8COMPILE_CACHE", "~/here")
    assert cache_folder() == tmp_path / "here"


def test_a_user_without_a_home_has_a_cache_of_his_own() -> None:
    """Containers may run as a user that no table lists; a process of such a user is asked."""
    hidden = ("HOME", "XDG_CACHE_HOME", "INT8COMPILE_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    if os.getuid() != 0:
        pytest.skip("only root can become a user who is in no table")
    module = Path(build.__file__).parents[1] / "cache.py"
    program = (
        f"import os, runpy; found = runpy.run_path({str(module)!r}); os.setuid(54321); print(found['cache_folder']())"
    )
    environment["TMPDIR"] = "/tmp"  # That user cannot read this test's folder.
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "/tmp/int8compile-54321"


def build_and_load() -> None:
    assert cpu.load() is not None


def test_processes_that_start_at_once_compile_once(compiler: Compiler) -> None:
    processes = in_processes(4, build_and_load)
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert compiler.count == len(UNITS) + LINKS


def test_a_killed_build_leaves_no_library_and_no_lock(compiler: Compiler) -> None:
    compiler.hang.touch()
    (victim,) = in_processes(1, build_and_load)
    deadline = time.monotonic() + 30
    while not (compiler.process.exists() and compiler.process.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join(30)
    os.kill(int(compiler.process.read_text()), signal.SIGKILL)
    (folder,) = Path(os.environ["INT8COMPILE_CACHE"]).iterdir()
    assert leftovers(folder)
    assert not (folder / "library.so").exists()
    compiler.hang.unlink()
    built = build.library()
    assert built.path.parent == folder
    assert not built.cached
    assert not leftovers(folder)


@pytest.mark.parametrize("damage", ["truncated", "empty", "no record", "wrong record", "half a record"])
def test_a_damaged_library_is_compiled_again(compiler: Compiler, damage: str) -> None:
    path = build.library().path
    record = path.with_name("build.json")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:4000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no record":
        record.unlink()
    elif damage == "wrong record":
        record.write_text("[]")
    else:
        record.write_bytes(record.read_bytes()[:50])
    library = cpu.load()
    assert library is not None
    assert not library.built.cached
    assert library.variants == ("fast", "portable")
    assert build.library().cached


def test_a_library_that_does_not_load_is_compiled_again_once(compiler: Compiler) -> None:
    path = build.library().path
    garbage = b"not a library"
    path.write_bytes(garbage)
    record = path.with_name("build.json")
    made = json.loads(record.read_text())
    made["sha256"][path.name] = hashlib.sha256(garbage).hexdigest()
    record.write_text(json.dumps(made))
    assert build.library().cached
    library = cpu.load()
    assert library is not None
    assert compiler.count == 2 * (len(UNITS) + LINKS)


def test_a_library_that_never_loads_is_reported(compiler: Compiler, sources: Path) -> None:
    (sources / "fast.cpp").write_text('extern int nowhere; __attribute__((visibility("default"))) int* p = &nowhere;\n')
    with pytest.warns(Int8Warning, match=r"library\.so does not load: .*nowhere"):
        assert cpu.load() is None
    assert compiler.count == len(UNITS) + LINKS


def test_a_cache_that_cannot_be_written_is_named(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INT8COMPILE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(KernelBuildError, match=r"file/cache cannot be used \(Not a directory\).* INT8COMPILE_CACHE"):
        build.library()


def test_a_cache_that_can_only_be_read_is_used(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    build.library()
    monkeypatch.setattr(Path, "mkdir", None)
    monkeypatch.setattr(build, "_lock", None)
    assert build.library().cached


def planted(folder: Path) -> Path:
    """Plant a library, with the files that would vouch for it."""
    compiled = build.library()
    target = folder / compiled.path.parent.name
    shutil.copytree(compiled.path.parent, target)
    return target


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")

SOMEBODY = 65534


def given_away(path: Path) -> None:
    for each in (path, *path.rglob("*")):
        os.chown(each, SOMEBODY, SOMEBODY)


@needs_root
def test_another_users_cache_is_not_used(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel is compiled in this user's own folder instead."""
    other = tmp_path / "other"
    target = planted(other)
    given_away(other)
    monkeypatch.setenv("INT8COMPILE_CACHE", str(other))
    monkeypatch.setattr(build, "private_folder", lambda: tmp_path / "private")
    before = compiler.count
    built = build.library()
    assert built.path.is_relative_to(tmp_path / "private")
    assert compiler.count > before
    assert f"{other} belongs to another user (uid {SOMEBODY})" in caplog.text
    assert build._cached(target) is None
    assert build.library().cached


@needs_root
def test_another_users_file_in_this_users_cache_is_not_used(compiler: Compiler) -> None:
    built = build.library()
    os.chown(built.path, SOMEBODY, SOMEBODY)
    assert not build.library().cached
    assert built.path.stat().st_uid == os.getuid()


@needs_root
def test_nothing_is_compiled_where_another_user_can_write(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("named", "private"):
        (tmp_path / name).mkdir()
        given_away(tmp_path / name)
    monkeypatch.setenv("INT8COMPILE_CACHE", str(tmp_path / "named"))
    monkeypatch.setattr(build, "private_folder", lambda: tmp_path / "private")
    with pytest.raises(KernelBuildError, match=r"private belongs to another user .* INT8COMPILE_CACHE"):
        build.library()
    assert compiler.count == 0


def test_a_cache_that_others_can_write_to_is_taken_from_them(compiler: Compiler, tmp_path: Path) -> None:
    built = build.library()
    folder = built.path.parent
    for path in (folder.parent, folder, built.path):
        path.chmod(path.stat().st_mode | 0o022)
    assert not build.library().cached
    for path in (folder.parent, folder, built.path):
        assert path.stat().st_mode & 0o022 == 0
    assert build.library().cached


def test_the_umask_does_not_matter(compiler: Compiler) -> None:
    before = os.umask(0)
    try:
        assert not build.library().cached
        assert build.library().cached
    finally:
        os.umask(before)


def test_a_command_that_cannot_be_read_is_named(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(KernelBuildError, match=r"CXX=\"g\+\+ '\" cannot be read as a command \(No closing quotation\)"):
        build.library()
    with pytest.warns(Int8Warning, match="No closing quotation.*run through PyTorch instead"):
        assert cpu.load() is None


def test_a_compiler_that_hangs_is_ended(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\ncase $* in *--version) echo 1.0;; *) exec sleep 600;; esac\n")
    hangs.chmod(0o755)
    monkeypatch.setenv("CXX", str(hangs))
    monkeypatch.setattr(compiler_module, "COMPILES", 0.5)
    with pytest.raises(KernelBuildError, match=r"hangs had not ended after 0.5 seconds"):
        build.library()


def test_a_lock_that_is_never_released_is_named(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build.library()
    lock = built.path.parent / "lock"
    monkeypatch.setattr(build, "LOCKED", 0.3)
    # flock works between open files, so a second lock in this process blocks as well.
    with (
        filelock.FileLock(lock, is_singleton=False),
        pytest.raises(KernelBuildError, match=r"lock for 0.3 seconds; end"),
    ):
        build.library(again=True)
    assert not build.library(again=True).cached


def test_missing_compilers_are_named(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(KernelBuildError, match="CXX names 'no-such-compiler', which is not a program"):
        build.library()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(KernelBuildError, match="`false --version` fails"):
        build.library()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelBuildError, match=r"no C\+\+ compiler found .* install g\+\+, or name one with CXX"):
        build.library()


@pytest.mark.parametrize("name", ["g++", "clang++", "c++"])
def test_compilers_that_are_looked_for(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    Compiler(tmp_path).path.rename(tmp_path / name)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler_module.find_compiler() == compiler_module.Compiler((name,), "stub 1.0")


def test_sources_that_do_not_compile_are_named(compiler: Compiler, sources: Path) -> None:
    (sources / "portable.cpp").write_text("int f() {\n  return wrong;\n}\n")
    with pytest.raises(KernelBuildError) as caught:
        build.library()
    message = str(caught.value)
    assert "portable.cpp:2:10: error: 'wrong' was not declared in this scope" in message
    assert "\n" not in message
    log = Path(message.rpartition(" is in ")[2])
    assert "return wrong;" in log.read_text()
    assert f"$ {compiler.path}" in log.read_text()
    assert not leftovers(log.parent)
    assert not (log.parent / "library.so").exists()


def test_a_failing_link_is_reported(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LINK_FLAGS", ("-shared", "-lno_such_library"))
    with pytest.raises(KernelBuildError, match=r"fails at linking: .*no_such_library"):
        build.library()


def test_a_compiler_too_old_for_a_variant_leaves_it_out(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    newer = dataclasses.replace(FAST, flags=("-mnewer-than-you",))
    monkeypatch.setattr(build, "UNITS", (UNITS[0], newer, *UNITS[2:]))
    with caplog.at_level(logging.WARNING, build.__name__):
        library = cpu.load()
    assert library is not None
    assert library.variants == library.built.variants == ("portable",)
    (why,) = library.built.left_out.values()
    assert "'-mnewer-than-you'" in why
    assert f"stub 1.0 is too old for the kernel variant fast: {why}" in caplog.messages
    with pytest.raises(ConfigError, match="'fast' cannot be used; this machine and this build have portable"):
        cpu.use_variant("fast")
    assert build.library().left_out == {"fast": why}


def test_an_error_in_a_variant_is_no_old_compiler(compiler: Compiler, sources: Path) -> None:
    (sources / "fast.cpp").write_text("int f() { return wrong; }\n")
    with pytest.raises(KernelBuildError, match=r"fast\.cpp:1:18: error"):
        build.library()


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_each_variant_can_be_left_out_of_the_real_sources(architecture: str) -> None:
    listed = (build.SOURCES / "variants.cpp").read_text()
    optional = [unit.variant for unit in build.units(architecture) if unit.needs]
    assert optional
    for variant in optional:
        condition = f"#if defined(__{architecture}__) && !defined(INT8COMPILE_NO_{variant.upper()})\n    &{variant},\n"
        assert condition in listed


def test_every_source_is_compiled_somewhere() -> None:
    found = {path for folder in (build.SOURCES, build.EXPORTED) for path in folder.glob("*.cpp")}
    assert {unit.path for unit in build.UNITS} | {build.EXPORTED / stub.STUB} == found


def test_the_kernel_is_loaded_once(compiler: Compiler) -> None:
    library = cpu.load()
    assert library is not None
    assert cpu.load() is library
    assert cpu.available()
    assert cpu.failure() == ""
    assert cpu.variants() == ("fast", "portable")
    assert cpu.variant() == "fast"
    cpu.use_variant("portable")
    assert cpu.variant() == "portable"
    with pytest.raises(ConfigError, match="'slow' cannot be used; this machine and this build have fast, portable"):
        cpu.use_variant("slow")
    assert cpu.variant() == "portable"


def test_one_warning_where_there_is_no_kernel(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(Int8Warning) as caught:
        assert cpu.load() is None
    (warning,) = caught
    for part in ("'no-such-compiler'", "through PyTorch", "int8compile doctor", "INT8COMPILE_CPU_KERNEL=0"):
        assert part in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.load() is None
        assert not cpu.available()
        assert (cpu.variants(), cpu.variant()) == ((), "")
    assert "'no-such-compiler'" in cpu.failure()
    with pytest.raises(ConfigError, match=r"there is no CPU kernel .*no-such-compiler"):
        cpu.use_variant("portable")


# Without the kernel, its operators run their definition, and compiled int8 models still run.
FALLBACK = """
import warnings
import torch
from int8compile import Int8Warning, cpu, ops
from int8compile.ops import reference

x, weight = torch.randn(5, 70), torch.randn(33, 70)
qweight, scale = ops.quantize_weight(weight, None)
model = torch.compile(torch.nn.Linear(70, 33, bias=False).requires_grad_(False), backend="int8")
model.weight.copy_(weight)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = model(x)
    found = ops.packed_linear(x, ops.pack_weight(qweight), scale, None, None, 6.0)
expected = reference.linear(x, qweight, scale, None, None, 6.0)
assert torch.equal(found, expected)
assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
assert not cpu.available()
print(sum(issubclass(each.category, Int8Warning) for each in caught))
"""


@pytest.mark.parametrize("off", [False, True])
def test_without_the_kernel_results_are_right(tmp_path: Path, off: bool) -> None:
    (tmp_path / "file").touch()
    environment = {**os.environ, "INT8COMPILE_CACHE": str(tmp_path / "file")}
    environment["INT8COMPILE_CPU_KERNEL"] = "0" if off else "1"
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("0" if off else "1")


def test_the_kernel_can_be_turned_off(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INT8COMPILE_CPU_KERNEL", "0")
    monkeypatch.setattr(build, "library", None)
    assert cpu.load() is None
    with pytest.raises(ConfigError, match="INT8COMPILE_CPU_KERNEL=0 turns it off"):
        cpu.use_variant("portable")
    monkeypatch.setenv("INT8COMPILE_CPU_KERNEL", "off")
    with pytest.raises(ConfigError, match=r"INT8COMPILE_CPU_KERNEL='off': allowed are 1 .* and 0"):
        cpu.load()


def test_the_environment_names_the_variant(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INT8COMPILE_ISA", "sse9")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"INT8COMPILE_ISA: kernel variant 'sse9' .* have fast, portable"):
            cpu.load()
    monkeypatch.setenv("INT8COMPILE_ISA", "portable")
    assert cpu.variant() == "portable"
    # The variable is read once; afterwards use_variant decides.
    cpu.use_variant("fast")
    assert cpu.variant() == "fast"


def test_the_real_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library = cpu.load()
    assert library is not None
    compiled = {unit.variant for unit in build.units(build.architecture()) if unit.variant}
    assert set(library.built.variants) | set(library.built.left_out) == compiled
    assert set(library.variants) <= set(library.built.variants)
    assert library.variants[-1] == "portable"
    assert library.variant in library.variants
