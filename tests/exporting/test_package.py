"""The file that `export` writes: refusals of `inspect`, `load_exported`, and PyTorch's own loader."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor import aoti_load_package

import int8compile
from int8compile import ExportError, PackageError, cpu
from int8compile.app.cli import main
from int8compile.exporting import package, stub

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs the CPU kernel")

DAMAGED = "is damaged or was edited: it has changed since its export; copy or export it again"
FOREIGN = r"has no int8compile checksum at its end: it was not made by int8compile\.export, or was edited or damaged"
NO_ZIP = "is not a .pt2 file, or is truncated"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    int8compile.export(nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64)).eval(), (torch.randn(5, 64),), path)
    return path


@pytest.fixture(autouse=True)
def _unpacked_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch's loader does not remove the unpacked files of a package that it refuses.
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the files that PyTorch's loader receives."""
    given: list[str] = []

    def load(path: str, *rest: object) -> object:
        given.append(path)
        return aoti_load_package(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    return given


def refused(path: Path, told: str) -> None:
    """Require that both readers refuse a file."""
    for read in (int8compile.inspect, int8compile.load_exported):
        with pytest.raises(PackageError, match=told):
            read(path)


def member(path: Path, suffix: str) -> zipfile.ZipInfo:
    with zipfile.ZipFile(path) as archive:
        (found,) = [info for info in archive.infolist() if info.filename.endswith(suffix)]
    return found


def place(path: Path, suffix: str) -> tuple[int, int]:
    """Return the first and last byte of a member's contents in the file."""
    info = member(path, suffix)
    with zipfile.ZipFile(path) as archive, archive.open(info) as opened:
        begin: int = opened._orig_compress_start  # type: ignore[attr-defined]
    return begin, begin + info.file_size


def flipped(whole: bytes, at: int, bit: int) -> bytes:
    return whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]


def edited(path: Path, to: Path, change: Callable[[str, bytes], bytes | None], *, sealed: bool = True) -> Path:
    """Write a package anew with valid zip checksums, and with int8compile's checksums where `sealed`."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(to, "w") as other:
        for info in archive.infolist():
            content = change(info.filename, archive.read(info))
            if content is not None:
                other.writestr(info.filename, content)
    if sealed:
        package.seal(to)
    return to


def test_a_whole_package_is_loaded(exported: Path, loads: list[str]) -> None:
    x = torch.randn(5, 64)
    loaded = int8compile.load_exported(exported)
    assert loads == [str(exported)]
    assert type(loaded) is type(aoti_load_package(str(exported)))
    assert loaded(x).equal(aoti_load_package(str(exported))(x))


def test_the_loader_opens_the_stub_and_not_the_model(exported: Path) -> None:
    with zipfile.ZipFile(exported) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        content = archive.read(libraries[0])
        assert not [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
    model = member(exported, stub.SUFFIX)
    assert len(libraries) == 1
    # Nothing checks the stub before it is opened, so it must be small beside the rest.
    assert len(content) < 48 * 1024
    assert model.file_size > 10 * len(content)
    # The stub holds the checksums of the other members; its own follows it.
    assert zlib.crc32(content[:-4]) == int.from_bytes(content[-4:], "little")


def test_every_flip_is_refused_before_the_loader(exported: Path, tmp_path: Path, loads: list[str]) -> None:
    whole = exported.read_bytes()
    draw = random.Random(0)
    begin, end = place(exported, stub.SUFFIX)
    places = [draw.randrange(begin, begin + (end - begin) // 3) for _ in range(40)]
    places += [draw.randrange(*place(exported, ".so")) for _ in range(40)]
    # Anywhere in the file: contents, padding, and the directory.
    places += [draw.randrange(len(whole)) for _ in range(40)]
    places += [draw.randrange(len(whole) - 2000, len(whole)) for _ in range(40)]
    path = tmp_path / "flipped.pt2"
    for at in [*places, 0, len(whole) - 1]:
        path.write_bytes(flipped(whole, at, draw.randrange(8)))
        with pytest.raises(PackageError, match=f"{DAMAGED}|{FOREIGN}|{NO_ZIP}"):
            int8compile.load_exported(path)
    assert loads == []


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.97, 0.9999])
def test_a_truncated_package_is_refused(exported: Path, tmp_path: Path, loads: list[str], kept: float) -> None:
    whole = exported.read_bytes()
    path = tmp_path / "cut.pt2"
    path.write_bytes(whole[: int(kept * len(whole))])
    refused(path, NO_ZIP)
    assert main(["inspect", str(path)]) == 2
    assert loads == []
    with pytest.raises((RuntimeError, ValueError)):
        aoti_load_package(str(path))


def test_an_edited_package_is_refused(exported: Path, tmp_path: Path, loads: list[str]) -> None:
    path = tmp_path / "edited.pt2"

    def same(name: str, content: bytes) -> bytes:
        return content

    edited(exported, path, same, sealed=False)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/aotinductor/model/more", b"more")
    refused(path, FOREIGN)
    edited(exported, path, lambda name, content: None if name.endswith(".cpp") else content, sealed=False)
    refused(path, FOREIGN)
    path.write_bytes(exported.read_bytes() + b"more")
    refused(path, FOREIGN)
    assert loads == []


def test_what_is_no_package_of_ours_is_told_apart(exported: Path, tmp_path: Path, loads: list[str]) -> None:
    refused(tmp_path / "none.pt2", "does not exist; name a .pt2 file")
    refused(tmp_path, "is not a file; name a .pt2 file")
    os.mkfifo(tmp_path / "pipe.pt2")
    refused(tmp_path / "pipe.pt2", "is not a file; name a .pt2 file")
    plain = tmp_path / "plain.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), plain)
    refused(plain, rf"{FOREIGN}.*torch\.export\.load")
    text = tmp_path / "text.pt2"
    text.write_text("no zip file")
    refused(text, NO_ZIP)

    def newer(name: str, content: bytes) -> bytes:
        return content.replace(rb"{\"format\": 1,", rb"{\"format\": 9,")

    refused(edited(exported, tmp_path / "newer.pt2", newer), r"has format 9.*Update int8compile")
    assert loads == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_cannot_be_read_is_told(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "secret.pt2"
    path.write_bytes(exported.read_bytes())
    path.chmod(0)
    refused(path, "cannot be read: Permission denied")


@pytest.mark.parametrize(
    "metadata", ["", "5", "[]", "{}", '{"int8compile": "oops"}', '{"int8compile": "[1]"}', "[" * 100_000]
)
def test_metadata_of_any_kind_is_no_traceback(exported: Path, tmp_path: Path, metadata: str) -> None:
    odd = edited(exported, tmp_path / "odd.pt2", lambda name, old: metadata.encode() if name.endswith(".json") else old)
    refused(odd, r"was not made by int8compile\.export: it has no such metadata")


def test_a_zip_file_with_a_comment_is_not_sealed(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "sealed.pt2"
    path.write_bytes(exported.read_bytes())
    with pytest.raises(ValueError, match="is not a zip file without a comment"):
        package.seal(path)
    assert path.read_bytes() == exported.read_bytes()


def test_why_a_whole_package_is_not_loaded_is_told(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Unsupported device found: cuda")

    monkeypatch.setattr(torch._inductor, "aoti_load_package", fail)
    with pytest.raises(
        PackageError, match="is intact, but PyTorch cannot load it here: Unsupported device found: cuda"
    ):
        int8compile.load_exported(exported)


# PyTorch's own loader, which does not know int8compile's checksums


def test_the_stub_refuses_damage_anywhere_in_the_model(exported: Path, tmp_path: Path) -> None:
    # Each flip runs in its own process: without the stub, one flip in ten ended the process.
    code = """
import os, random, signal, sys, torch
torch.set_num_threads(1)
path, begin, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
whole, draw, ends = open(path, "rb").read(), random.Random(0), []
torch._inductor.aoti_load_package(path)  # Imports what loading needs.
for _ in range(40):
    at = draw.randrange(begin, begin + (end - begin) // 3)
    open("flipped.pt2", "wb").write(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            torch._inductor.aoti_load_package("flipped.pt2")
        except RuntimeError:
            os._exit(3)
        os._exit(4)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(*ends)
"""
    begin, end = place(exported, stub.SUFFIX)
    command = [sys.executable, "-c", code, str(exported), str(begin), str(end)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["3"] * 40
    told = (
        f"Error: int8compile: the package is damaged or was edited: {Path(member(exported, stub.SUFFIX).filename).name}"
    )
    assert done.stderr.count(told) >= 40


@pytest.mark.parametrize("suffix", [stub.SUFFIX, ".wrapper.cpp", ".wrapper_metadata.json"])
def test_the_stub_refuses_other_missing_and_shortened_files(
    exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], suffix: str
) -> None:
    name = Path(member(exported, suffix).filename).name
    damaged = f"{name} has changed since its export; copy or export it again"
    path = tmp_path / "edited.pt2"

    def refuses(told: str, change: Callable[[bytes], bytes | None]) -> None:
        edited(exported, path, lambda each, content: change(content) if each.endswith(suffix) else content)
        with pytest.raises(RuntimeError):
            aoti_load_package(str(path))
        assert told in capfd.readouterr().err

    # One more space is the same JSON.
    refuses(damaged, lambda content: content + b" ")
    refuses(damaged, lambda content: content[:-1] + b" ")
    if suffix != ".wrapper_metadata.json":  # The loader itself reads this file first.
        refuses(damaged, lambda content: content[:-1])
        refuses(damaged, lambda content: b"")
        refuses(f"the package lacks {name}; copy or export it again", lambda content: None)


def test_the_stub_checks_itself(exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "edited.pt2"
    for change in (lambda content: content[:-1] + b"\0", lambda content: content[:-4], lambda content: content + b"\0"):
        edited(exported, path, lambda each, content, by=change: by(content) if each.endswith(".so") else content)  # type: ignore[misc]
        with pytest.raises(RuntimeError):
            aoti_load_package(str(path))
        assert ".wrapper.so has changed since its export" in capfd.readouterr().err


def test_several_threads_load_and_run_at_a_time(exported: Path) -> None:
    x = torch.randn(5, 64)
    expected = int8compile.load_exported(exported)(x)
    shared = int8compile.load_exported(exported)
    results: list[bool] = []

    def work() -> None:
        own = int8compile.load_exported(exported)
        results.extend(call(x).equal(expected) for call in (own, shared) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 160


# The stub's sources


@pytest.fixture
def library(exported: Path, tmp_path: Path) -> Path:
    """Return a model's library as AOTInductor makes it."""
    path = tmp_path / "model.wrapper.so"
    with zipfile.ZipFile(exported) as archive:
        path.write_bytes(archive.read(member(exported, stub.SUFFIX)))
    return path


def test_the_stub_forwards_all_that_the_model_exports(exported: Path, library: Path, tmp_path: Path) -> None:
    def exports(path: Path) -> set[str]:
        listed = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True)
        return {word for word in listed.stdout.split() if word.startswith("AOTInductor")}

    made = tmp_path / "stub.so"
    with zipfile.ZipFile(exported) as archive:
        made.write_bytes(archive.read(member(exported, ".so")))
    assert len(exports(library)) > 20
    assert exports(made) == exports(library)


def test_an_interface_that_is_not_known_is_refused(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = tmp_path / "interface.h"
    monkeypatch.setattr(stub, "_INTERFACE", header)  # An absolute path replaces torch's folder.
    known = "AOTI_API AOTIRuntimeError AOTInductorModelContainerCreateWithDevice(Handle* handle, size_t count);\n"
    header.write_text(known + "AOTIRuntimeError AOTInductorModelRun(struct Strange by_value);\n")
    with pytest.raises(ExportError, match="AOTInductorModelRun with a parameter 'struct Strange by_value'"):
        stub._functions(library)
    header.write_text("// AOTIRuntimeError AOTInductorModelContainerCreateWithDevice(size_t count);\n")
    with pytest.raises(ExportError, match="in a way that this version of int8compile does not know"):
        stub._functions(library)
    header.write_text(known + "AOTIRuntimeError AOTInductorIsNotInIt(\n  bool, // first\n  int32_t x);\n")
    assert [each.parameters for each in stub._functions(library)] == ["void* a0, size_t a1"]


def test_a_stub_that_does_not_compile_is_told(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stub, "_SOURCES", ())
    monkeypatch.setattr(stub, "_FLAGS", (*stub._FLAGS, "-DLIBRARY=1"))
    with pytest.raises(ExportError, match=r"cannot compile the package's stub library: .*error"):
        stub.add_stub([str(library)], tmp_path, (), "native")
