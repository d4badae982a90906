"""Kernels of the GPU day, compiled beforehand without a GPU, to save time on the day.

    python -m benchmarks.gpu.bundle build/gpu-bundle.tar.xz            # compile, pack, check that nothing is missing
    python -m benchmarks.gpu.bundle build/gpu-bundle.tar.xz --verify   # only check

It needs the GPU machine's version of Triton; `make gpu-bundle` makes an environment with it. Triton's cache has
absolute paths, and its keys include a hash of Triton's own files, which differs between the wheels for Python 3.11 and
3.12. So a bundle holds the other parts of the keys, and `unpack` adds the rest.
"""

from __future__ import annotations

import argparse
import base64
import collections
import dataclasses
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.facts import ROOT

MANIFEST = "manifest.json"
# Files of each kernel. Exported packages read the PTX.
KEPT = (".json", ".cubin", ".ptx")
# File with the part of a kernel's key after Triton's own.
REST = "key"
# Environment variable with the file that `watch` writes to.
WATCH = "INT8COMPILE_GPU_DAY_KERNELS"
OURS = "int8compile.triton_kernels."
TESTS = ("tests/triton_kernels/test_triton_contract.py",)
EXPORT_TESTS = ("tests/exporting/test_export_gpu.py",)


class BundleError(Exception):
    """A bundle cannot be made, or cannot be used here."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """The origin of kernels.

    Attributes:
        hits: Number of kernels from the cache.
        compiled: Names of the others.
    """

    hits: int
    compiled: tuple[str, ...]


def unpack(bundle: Path, cache: Path) -> int:
    """Fill a cache of Triton with the kernels of a bundle.

    Args:
        bundle: A file that `pack` made.
        cache: Folder of the cache, as in `TRITON_CACHE_DIR`.

    Returns:
        The number of kernels in the bundle.

    Raises:
        BundleError: The bundle is damaged, or made by another version of Triton.
    """
    import triton

    try:
        with tarfile.open(bundle, "r:xz") as archive:
            files = {member.name: _read(archive, member) for member in archive.getmembers() if member.isfile()}
        manifest = json.loads(files.pop(MANIFEST))
        version, keys = manifest["triton"], manifest["keys"]
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{bundle.name} is not a bundle of kernels ({type(error).__name__}: {error})") from error
    if version != triton.__version__:
        raise BundleError(f"{bundle.name} was made by Triton {version}, but {triton.__version__} is installed")
    for number, rest in enumerate(keys):
        names = [name for name in files if name.startswith(f"{number}/")]
        _place(cache, rest, {Path(name).name: files[name] for name in names})
    return len(keys)


def pack(cache: Path, bundle: Path) -> int:
    """Pack the kernels of a cache that was filled under `record_keys`, and return their number."""
    import triton

    folders = sorted(path.parent for path in cache.glob(f"*/{REST}"))
    # An interrupted compiler leaves no binary.
    folders = [folder for folder in folders if any(folder.glob("*.cubin"))]
    keys = [(folder / REST).read_text() for folder in folders]
    bundle.parent.mkdir(parents=True, exist_ok=True)
    part = bundle.with_suffix(".part")
    with tarfile.open(part, "w:xz") as archive:
        _add(archive, MANIFEST, json.dumps({"triton": triton.__version__, "keys": keys}).encode())
        for number, folder in enumerate(folders):
            for path in sorted(folder.iterdir()):
                if path.suffix in KEPT and not path.name.startswith("__grp__"):
                    _add(archive, f"{number}/{path.name}", path.read_bytes())
    os.replace(part, bundle)
    return len(folders)


def record_keys() -> None:
    """Make Triton write, beside every kernel that it looks for, the part of the key that `unpack` needs."""
    import triton.compiler.compiler as compiler
    from triton import knobs
    from triton.runtime.cache import triton_key

    get_cache_key = compiler.get_cache_key

    def recorded(*args: Any, **kwargs: Any) -> str:
        key: str = get_cache_key(*args, **kwargs)
        rest = key.removeprefix(triton_key())
        folder = Path(knobs.cache.dir) / _name(key)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{REST}.{os.getpid()}"
        part.write_text(rest)
        os.replace(part, folder / REST)
        return key

    compiler.get_cache_key = recorded


def watch(file: Path) -> None:
    """Record in a file, for each int8compile kernel that this process requests, whether it came from the cache."""
    from triton import knobs

    file.parent.mkdir(parents=True, exist_ok=True)

    def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
        function: Any = getattr(src, "fn", None)
        if str(getattr(function, "__module__", "")).startswith(OURS):
            # One write per line, since other processes write to the same file.
            with file.open("a") as opened:
                opened.write(f"{'hit' if cache_hit else 'compiled'} {function.__name__}\n")

    knobs.compilation.listener = note


def counted(file: Path) -> Counts:
    """Read the record that `watch` made."""
    found = [line.split(" ", 1) for line in file.read_text().splitlines()] if file.exists() else []
    return Counts(sum(kind == "hit" for kind, _ in found), tuple(name for kind, name in found if kind == "compiled"))


def pytest_configure(config: pytest.Config) -> None:
    """Call `watch` in a pytest process, and `record_keys` if it compiles kernels for a bundle."""
    if WATCH in os.environ:
        watch(Path(os.environ[WATCH]))
        if "benchmarks.gpu.standin" in sys.modules:
            record_keys()


def build(bundle: Path, jobs: int) -> int:
    """Compile and pack the kernels of the day with a number of processes, and return the number of kernels.

    Raises:
        BundleError: A test or a measurement failed before it started all of its kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        _run_all(cache, Path(folder) / "log", jobs)
        return pack(cache, bundle)


def verify(bundle: Path, jobs: int) -> Counts:
    """Run everything with the bundle in a fresh cache, and return the origin of the kernels.

    Raises:
        BundleError: As in `build` and `unpack`.
    """
    with tempfile.TemporaryDirectory() as folder:
        cache, log = Path(folder) / "cache", Path(folder) / "log"
        unpack(bundle, cache)
        _run_all(cache, log, jobs)
        return counted(log)


def main(arguments: Sequence[str] | None = None) -> int:

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.bundle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help="file of the bundle")
    parser.add_argument("--verify", action="store_true", help="only check that the bundle has all kernels")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    chosen = parser.parse_args(arguments)
    try:
        if not chosen.verify:
            count = build(chosen.bundle, chosen.jobs)
            print(f"{chosen.bundle}: {count} kernels, {chosen.bundle.stat().st_size / 2**20:.1f} MiB", flush=True)
        counts = verify(chosen.bundle, chosen.jobs)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"in a fresh cache: {counts.hits} hits, {len(counts.compiled)} compiled")
    for name, times in collections.Counter(counts.compiled).items():
        print(f"  {name}: {times}")
    return 1 if counts.compiled or not counts.hits else 0


def start_measured() -> None:
    """Start every kernel of the measurements, on the stand-in."""
    from tqdm import tqdm

    from benchmarks.gpu import standin

    standin.take_over()
    record_keys()
    watch(Path(os.environ[WATCH]))
    for call in tqdm(list(_measured_calls()), desc="measurements"):
        call()


def _measured_calls() -> Iterator[Any]:
    import torch

    from benchmarks.gpu import candidates, decode, standin
    from benchmarks.gpu import exported as exports
    from benchmarks.gpu.linear import THRESHOLD, int8_call
    from benchmarks.gpu.parts import EPSILON
    from benchmarks.gpu.sizes import Shape, for_gpu
    from int8compile.ops import rotation_size
    from int8compile.ops.quantized import NONE, RMS, SILU_MUL
    from int8compile.triton_kernels import operators, plan, tables

    sizes, arch = for_gpu(decode.LAYERS), tables.ARCHITECTURES["sm_90"]

    def tensors(m: int, k: int, n: int) -> tuple[Any, Any, Any, Any]:
        # Only sizes matter. Memory that is never touched takes no space.
        x = torch.empty(m, k, dtype=torch.bfloat16)
        return x, torch.empty(n, k, dtype=torch.int8), torch.empty(n), torch.empty(k)

    def linear(m: int, k: int, n: int, threshold: float) -> None:
        int8_call(*tensors(m, k, n), threshold)()

    def all_candidates(m: int, k: int, n: int) -> None:
        x, qweight, scale, d = tensors(m, k, n)
        made = operators._quantize_rows(x, d, THRESHOLD)
        for config in candidates.configs_of(arch, m, Shape("", k, n), standin.MULTIPROCESSORS):
            for call in candidates._launches(made, [qweight], scale, config):
                call()

    def norm(m: int, k: int, residual: bool) -> None:
        x, _, _, d = tensors(m, k, 1)
        x = x.view(1, m, k)
        weight = torch.empty(k, dtype=torch.bfloat16)
        operators._norm_quantize_rows(x, x if residual else None, weight, None, d, RMS, EPSILON, THRESHOLD)

    def gate(m: int, k: int, n: int, threshold: float) -> None:
        x, qweight, scale, d = tensors(m, k, n)
        bias = torch.empty(n, dtype=torch.bfloat16)
        operators._linear(x, qweight, scale, d if rotation_size(k) > 1 else None, bias, threshold)

    def joined(k: int, parts: tuple[int, int, int], activation: int) -> None:
        x, qweight, scale, d = tensors(1, k, sum(parts))
        made = operators._quantize_rows(x.view(1, 1, k), d, THRESHOLD)
        n0, n1 = (parts[0], parts[1]) if parts[1] else (0, 0)
        operators._quantized_linear(*made, qweight, scale, None, activation, n0, n1, torch.bfloat16)

    def exported() -> None:
        hidden, inner = sizes.llama.hidden, sizes.llama.intermediate
        planner = plan.Planner(plan.Gpu("sm_90", arch, standin.MULTIPROCESSORS))
        for k, n, activation in ((hidden, 2 * inner, SILU_MUL), (inner, hidden, NONE)):
            planner.quantize_rows(k, torch.bfloat16, True, THRESHOLD, 1, exports.MOST_ROWS)
            planner.quantized_linear(n, k, 2, None, activation, 0, 0, torch.bfloat16, 1, exports.MOST_ROWS)

    rows = {*sizes.rows, *sizes.outlier_rows}
    for shape in sizes.shapes:
        for m in sorted(rows):
            for threshold in (THRESHOLD, 0.0):
                yield lambda m=m, shape=shape, t=threshold: linear(m, shape.k, shape.n, t)
        for m in sizes.candidate_rows:
            yield lambda m=m, shape=shape: all_candidates(m, shape.k, shape.n)
    for each in sizes.gates:
        yield lambda each=each: gate(each.m, each.k, each.n, each.threshold)
    for shape in sizes.shapes:
        yield lambda shape=shape: norm(1, shape.k, True)
    # The norm of the first layer, without a residual.
    yield lambda: norm(1, sizes.llama.hidden, False)
    yield exported
    llama = sizes.llama
    keys = llama.kv_heads * llama.head_dim
    yield lambda: joined(llama.hidden, (llama.hidden, keys, keys), NONE)
    yield lambda: joined(llama.hidden, (2 * llama.intermediate, 0, 0), SILU_MUL)
    yield lambda: joined(llama.hidden, (llama.hidden, 0, 0), NONE)
    yield lambda: joined(llama.intermediate, (llama.hidden, 0, 0), NONE)


def _run_all(cache: Path, log: Path, jobs: int) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), WATCH: str(log)}
    environment["PYTHONOPTIMIZE"] = "1"  # No asserts, since there are no results.
    plugins = ["-p", "benchmarks.gpu.standin", "-p", "benchmarks.gpu.bundle", "-p", "no:cacheprovider"]
    pytest_command = ["-m", "pytest", "-m", "gpu", *plugins, "--assert=plain", "-W", "ignore", "-q", "-n", str(jobs)]
    for command, ends in (
        ([*pytest_command, *TESTS], (0,)),
        # Without a GPU, loading a package fails after its kernels were compiled.
        ([*pytest_command, *EXPORT_TESTS, "-k", "package"], (0, 1)),
        (["-c", "from benchmarks.gpu import bundle; bundle.start_measured()"], (0,)),
    ):
        if subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False).returncode not in ends:
            raise BundleError("a test or a measurement failed before all of its kernels were started, see above")


def _name(key: str) -> str:
    """Return the name of a kernel's folder in Triton's cache."""
    return base64.b32encode(hashlib.sha256(key.encode()).digest()).decode().rstrip("=")


def _place(cache: Path, rest: str, files: dict[str, bytes]) -> None:
    """Write a kernel's files where Triton looks for them."""
    from triton.runtime.cache import triton_key

    key = triton_key() + rest
    folder = cache / _name(key)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        if path.suffix == ".json":
            about = json.loads(content) | {"hash": hashlib.sha256(key.encode()).hexdigest()}
            content = json.dumps(about).encode()
            group = {each: str(folder / each) for each in files}
            (folder / f"__grp__{name}").write_text(json.dumps({"child_paths": group}))
        path.write_bytes(content)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    # Without times and owners, so that the same kernels make the same file.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    assert opened is not None
    return opened.read()


if __name__ == "__main__":
    sys.exit(main())
