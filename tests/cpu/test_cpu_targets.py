"""The CPU kernel compiled by clang and for other machines, by zig's clang, which has every target.

The check program (int8compile/cpu/csrc/check) compares a machine's variants with each other and prints a digest of the
results. The digest must be the same on all machines.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from int8compile.cpu import build

# Every variant is compiled by two compilers: about a minute.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]

CHECK = build.Unit("check/check.cpp")
# zig takes names of CPUs where other compilers take architectures.
ZIG_FLAGS = {"-march=armv8.2-a+dotprod": "-mcpu=generic+v8_2a+dotprod"}


def zig(*arguments: str) -> list[str]:
    pytest.importorskip("ziglang", reason="needs the package ziglang")
    return [sys.executable, "-m", "ziglang", *arguments]


def compiled(command: Sequence[str], units: Sequence[build.Unit], folder: Path) -> list[str]:
    """Compile all units and return their object files; require that none is left out and no warning is given."""
    written: list[str] = []
    made = build.compile_units(command, units, folder, written.append)
    assert made.left_out == {}
    assert not [text for text in written if "warning" in text]
    return made.of("library")


def for_zig(units: Sequence[build.Unit]) -> list[build.Unit]:
    return [dataclasses.replace(unit, flags=tuple(ZIG_FLAGS.get(flag, flag) for flag in unit.flags)) for unit in units]


def run_check(*command: str) -> tuple[list[str], str]:
    """Run the check program, and return the variants it checked and its digest."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.fullmatch(r"check: ([\w ]+): \d+ integer .* (\d+) results .* digest (\w{16})\n", done.stdout)
    assert found, done.stdout
    variants = found[1].split()
    assert (int(found[2]) > 1000) == (len(variants) > 1)
    return variants, found[3]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], str]:
    """Return the result of the check program, compiled by g++ for this machine."""
    folder = tmp_path_factory.mktemp("native")
    units = [*build.units(build.architecture(), torch=False), CHECK]
    objects = build.compile_units(["g++"], units, folder).of("library")
    subprocess.run(["g++", *objects, "-o", str(folder / "check")], check=True)
    return run_check(str(folder / "check"))


def test_every_variant_of_this_machine_agrees(native: tuple[list[str], str]) -> None:
    assert native[0][-1] == "portable"


def test_no_behaviour_is_undefined(native: tuple[list[str], str], tmp_path: Path) -> None:
    # Alignment is not checked: vectors are read from any address, with types that every CPU here allows it for.
    command = ["g++", "-fsanitize=undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=all"]
    if subprocess.run(
        [*command, "-x", "c++", "-", "-o", os.devnull],
        input="int main() {}",
        text=True,
        check=False,
        capture_output=True,
    ).returncode:
        pytest.skip("g++ has no library of the sanitizer (libubsan)")
    objects = build.compile_units(command, [*build.units(build.architecture(), torch=False), CHECK], tmp_path)
    subprocess.run([*command, *objects.of("library"), "-o", str(tmp_path / "check")], check=True)
    assert run_check(str(tmp_path / "check")) == native


@pytest.mark.skipif(platform.system() != "Linux" or platform.libc_ver()[0] != "glibc", reason="needs Linux with glibc")
def test_clang_agrees_with_gcc(native: tuple[list[str], str], tmp_path: Path) -> None:
    # Uses the C++ library of g++, because compiling zig's own takes minutes.
    shown = subprocess.run(["g++", "-E", "-x", "c++", os.devnull, "-v"], capture_output=True, text=True, check=True)
    headers = [line.strip() for line in shown.stderr.splitlines() if line.startswith(" /") and "c++" in line]
    target = f"{build.architecture()}-linux-gnu.{platform.libc_ver()[1]}"
    command = zig("cc", "-target", target, *(f"-I{folder}" for folder in headers))
    objects = compiled(command, for_zig([*build.units(build.architecture(), torch=False), CHECK]), tmp_path)
    subprocess.run(["g++", *objects, "-o", str(tmp_path / "check")], check=True)
    assert run_check(str(tmp_path / "check")) == native


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_clang_compiles_everything(architecture: str, tmp_path: Path) -> None:
    compiled(zig("c++", "-target", f"{architecture}-linux-gnu"), for_zig(build.units(architecture)), tmp_path)


@pytest.mark.slow  # zig compiles the target's C and C++ libraries at first use: two minutes
def test_arm_agrees(native: tuple[list[str], str], tmp_path: Path) -> None:
    command = zig("c++", "-target", "aarch64-linux-musl")
    objects = compiled(command, for_zig([*build.units("aarch64", torch=False), CHECK]), tmp_path)
    subprocess.run([*command, *objects, "-static", "-o", str(tmp_path / "check")], check=True)
    runner = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if build.architecture() != "aarch64" and runner is None:
        pytest.skip("compiled and linked; to run it here needs qemu-aarch64 (Debian: apt-get install qemu-user)")
    command = [] if build.architecture() == "aarch64" else [str(runner)]
    assert run_check(*command, str(tmp_path / "check")) == (["neon", "portable"], native[1])
