"""Kernels compiled beforehand are found in a fresh cache, by any wheel of the same Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)

from benchmarks.gpu import bundle, kernels
from benchmarks.gpu.bundle import BundleError, Counts
from benchmarks.gpu.facts import ROOT

# Runs one linear on the stand-in, and prints the bundle's report on kernels before and after.
PROGRAM = """
import os, sys
from pathlib import Path

import torch
import triton.runtime.cache as triton_cache
from benchmarks.gpu import bundle, standin

file, wheel = Path(sys.argv[1]), sys.argv[2]
key = triton_cache.triton_key() + wheel
triton_cache.triton_key = lambda: key
cache = Path(os.environ["TRITON_CACHE_DIR"])
if file.exists():
    print(bundle.unpack(file, cache))
standin.take_over()
bundle.record_keys()
bundle.watch(Path(os.environ[bundle.WATCH]))
x, qweight = torch.randn(3, 64, dtype=torch.bfloat16), torch.ones(32, 64, dtype=torch.int8)
torch.ops.int8compile.linear(x, qweight, torch.ones(32), None, None, 6.0)
if not file.exists():
    print(bundle.pack(cache, file))
"""


def start(folder: Path, file: Path, wheel: str) -> tuple[int, Counts]:
    """Run the program with its own cache.

    Returns:
        The number of packed or unpacked kernels, and the requests to Triton.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), bundle.WATCH: str(folder / "log")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(file), wheel]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout), bundle.counted(folder / "log")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of the kernels of one linear."""
    folder = tmp_path_factory.mktemp("bundle")
    file = folder / "bundle.tar.xz"
    count, counts = start(folder, file, "of Python 3.11")
    assert (count, counts) == (2, Counts(0, ("quantize_rows", "gemm")))
    return file


@pytest.mark.parametrize("wheel", ["of Python 3.11", "of Python 3.12"])
def test_a_fresh_cache_has_every_kernel(wheel: str, packed: Path, tmp_path: Path) -> None:
    """Triton's own files are part of its cache keys and differ between the wheels for two versions of Python."""
    assert start(tmp_path, packed, wheel) == (2, Counts(2, ()))


def test_a_kernel_that_is_not_in_the_bundle_is_compiled(packed: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer.tar.xz"
    with tarfile.open(packed) as archive, tarfile.open(fewer, "w:xz") as made:
        for member in archive.getmembers():
            content = bundle._read(archive, member)
            if member.name == bundle.MANIFEST:
                manifest = json.loads(content)
                content = json.dumps(manifest | {"keys": manifest["keys"][:1]}).encode()
            bundle._add(made, member.name, content)
    count, counts = start(tmp_path, fewer, "")
    assert (count, counts.hits, len(counts.compiled)) == (1, 1, 1)


def test_the_same_kernels_make_the_same_bundle(packed: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.tar.xz"
    start(tmp_path, again, "of Python 3.11")
    with tarfile.open(packed) as first, tarfile.open(again) as second:
        names = [member.name for member in first.getmembers()]
        assert names == [member.name for member in second.getmembers()]
        kinds = {Path(name).suffix for name in names}
    assert kinds == {".json", ".cubin", ".ptx"}


def test_bundles_that_cannot_be_used(packed: Path, tmp_path: Path) -> None:
    content = packed.read_bytes()
    bad = tmp_path / "bad.tar.xz"
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    for damaged in (b"", b"no archive", content[:middle], flipped):
        bad.write_bytes(damaged)
        with pytest.raises(BundleError, match=r"bad.tar.xz is not a bundle of kernels"):
            bundle.unpack(bad, tmp_path / "cache")
    with tarfile.open(bad, "w:xz") as archive:
        bundle._add(archive, bundle.MANIFEST, json.dumps({"triton": "2.1.0", "keys": []}).encode())
    with pytest.raises(BundleError, match=r"bad.tar.xz was made by Triton 2.1.0, but"):
        bundle.unpack(bad, tmp_path / "cache")
    assert bundle.main([str(tmp_path / "missing"), "--verify"]) == 2


def test_the_day_unpacks_and_counts(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in kernels.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    stage = kernels.stage(packed)
    assert list(stage.cases) == ["unpack", "CPU kernel"]
    assert stage.cases["unpack"]() == {"unpacked": 2}
    (tmp_path / kernels.LOG).write_text("hit gemm\ncompiled gemv\nhit gemv\ncompiled gemv\n")
    data: dict[str, Any] = {"stages": {}}
    kernels.count(kernels.Result(tmp_path / "gpu-day.json", data))
    assert data["kernels"] == {"hits": 2, "compiled": {"gemv": 2}}
