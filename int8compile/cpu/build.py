"""Compile the CPU kernel's C++ sources once, in the user's cache folder.

`UNITS` lists the sources with their flags. They become a shared library, which this process loads, and an object file,
which is linked into exported models. Each set of sources, flags, compiler and torch has its own folder in the cache:
`library.so`, `int8compile.o`, `build.json` (what was built, with hashes), `build.log` (the compiler's output) and
`lock`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock
import torch

from int8compile.cache import cache_folder, distrust, make_folder, private_folder
from int8compile.cpu.compiler import Compiler, checked, essence, find_compiler, run
from int8compile.errors import KernelBuildError
from int8compile.ops import signatures
from int8compile.progress import progress_bar

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# Sources for exported models only.
EXPORTED = Path(__file__).parents[1] / "exporting" / "csrc"

# -ffp-contract=off: every variant rounds at the same places. -fwrapv: int32 sums may pass through an overflow.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fwrapv",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)
# The stable ABI of torch 2.11: the library then works with every later torch.
TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", "{torch}/include")
# The header that `signatures.header` makes.
DECLARED = "declared.h"
# The library, and the object file that is linked into exported models.
FILES = ("library.so", "int8compile.o")
LINK_FLAGS = ("-shared", "-L{torch}/lib", "-ltorch_cpu", "-ltorch", "-lc10")
# Seconds after which a process that holds the lock is taken to hang. It runs a compiler several times.
LOCKED = 1200.0
AVX2 = ("-mavx2", "-mfma")
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    "-mprefer-vector-width=512",  # compilers prefer 256
)


@dataclasses.dataclass(frozen=True)
class Unit:
    """One .cpp file.

    Attributes:
        source: The file's name in `SOURCES`, or in `EXPORTED` if it is for exported models only.
        architecture: The only architecture that it is for, "" for all.
        flags: Flags besides `FLAGS`; `{torch}` stands for torch's folder.
        variant: The kernel variant in it, if it is one.
        needs: A small program for the variant. A compiler that cannot compile it is too old, and leaves the variant
            out.
        torch: Whether it needs torch.
        part: "library" or "export", the object file for exported models, if it is part of one alone; "" for both.
    """

    source: str
    architecture: str = ""
    flags: tuple[str, ...] = ()
    variant: str = ""
    needs: str = ""
    torch: bool = False
    part: str = ""

    @property
    def path(self) -> Path:
        """The file."""
        return (EXPORTED if self.part == "export" else SOURCES) / self.source


_X86 = "#include <immintrin.h>\n"
UNITS = (
    Unit("operators.cpp", flags=TORCH_FLAGS, torch=True),  # the longest first
    Unit("op.cpp", flags=TORCH_FLAGS, torch=True, part="library"),
    Unit("package.cpp", flags=TORCH_FLAGS, torch=True, part="export"),
    Unit("launcher.cpp", flags=TORCH_FLAGS, torch=True, part="export"),
    Unit("linear.cpp"),
    Unit("features.cpp", part="library"),
    Unit("portable.cpp", variant="portable"),
    Unit("cpuid.cpp", "x86_64"),
    Unit(
        "amx.cpp",
        "x86_64",
        (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8"),
        variant="amx",
        needs=_X86 + "void f(void* x) { _tile_loadd(1, x, 64); _tile_dpbsud(0, 1, 2); }",
    ),
    Unit(
        "avx512vnni.cpp",
        "x86_64",
        AVX512,
        variant="avx512vnni",
        needs=_X86 + "__m512i f(__m512i x) { return _mm512_dpbusd_epi32(x, x, x); }",
    ),
    Unit(
        "avxvnni.cpp",
        "x86_64",
        (*AVX2, "-mavxvnni"),
        variant="avxvnni",
        needs=_X86 + "__m256i f(__m256i x) { return _mm256_dpbusd_avx_epi32(x, x, x); }",
    ),
    Unit(
        "avx2.cpp",
        "x86_64",
        AVX2,
        variant="avx2",
        needs=_X86 + "__m256i f(__m256i x) { return _mm256_add_epi32(x, x); }",
    ),
    Unit(
        "neon.cpp",
        "aarch64",
        ("-march=armv8.2-a+dotprod",),
        variant="neon",
        needs="#include <arm_neon.h>\nint32x4_t f(int32x4_t s, int8x16_t x) { return vdotq_s32(s, x, x); }",
    ),
    Unit("variants.cpp"),
)


def architecture() -> str:
    """Return this machine's architecture, as `Unit.architecture` and compilers' targets spell it."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def units(architecture: str, *, torch: bool = True) -> list[Unit]:
    """Return the units for an architecture.

    Args:
        architecture: "x86_64", "aarch64" or another one, which has the portable variant only.
        torch: Whether to include the operators, which need torch's headers and libraries.
    """
    return [unit for unit in UNITS if unit.architecture in ("", architecture) and (torch or not unit.torch)]


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled library in the cache.

    Attributes:
        path: The library.
        linkable: The object file for exported models.
        compiler: The first line of the compiler's version.
        variants: The kernel variants in the library.
        left_out: Variants that the compiler is too old for, with its error.
        seconds: How long compiling took.
        cached: Whether an earlier call compiled it.
    """

    path: Path
    linkable: Path
    compiler: str
    variants: tuple[str, ...]
    left_out: dict[str, str]
    seconds: float
    cached: bool


def library(*, again: bool = False) -> Built:
    """Return the library for this machine, and compile it if the cache has none.

    Any number of processes may call this at once: one compiles, the others wait for it.

    Args:
        again: Compile even if the cache has a library, because that one does not load.

    Raises:
        KernelBuildError: There is no compiler, it fails, or the cache folder cannot be written.
    """
    if os.name != "posix":
        raise KernelBuildError(f"the CPU kernel is for Linux and macOS only, not for {platform.system()}")
    compiler = find_compiler()
    base = _trusted(cache_folder(), private_folder())
    folder = base / f"cpu-{architecture()}-{_key(compiler)}"
    if not again and (built := _cached(folder)):
        return built
    try:
        for each in (base, folder):
            make_folder(each)
            if why := distrust(each):
                raise KernelBuildError(
                    f"{why}, so nothing is compiled there; name another folder with INT8COMPILE_CACHE"
                )
        with _lock(folder / "lock"):
            if not again and (built := _cached(folder)):
                return built
            for left in folder.glob("tmp-*"):  # by a build that was killed; it held the lock
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder, ignore_cleanup_errors=True) as temporary:
                return _build(compiler, folder, Path(temporary))
    except OSError as error:
        raise KernelBuildError(
            f"the cache folder {base} cannot be used ({error.strerror or error}); "
            "name another one with INT8COMPILE_CACHE"
        ) from error


def _trusted(named: Path, private: Path) -> Path:
    """Return the cache folder, or a folder of this user alone if others could put a library into the cache folder."""
    with contextlib.suppress(OSError):  # A folder that does not exist yet is made later.
        # A folder of this user's that others can write to loses that permission when it is used.
        if (why := distrust(named)) and named.stat().st_uid != os.getuid():
            log.warning("%s, so the CPU kernel is not taken from there; %s is used instead", why, private)
            return private
    return named


def _key(compiler: Compiler) -> str:
    """Return a hash of everything that the library depends on."""
    table = [dataclasses.astuple(unit) for unit in units(architecture())]
    how = (FLAGS, LINK_FLAGS, table, compiler.command, compiler.version, torch.__version__, platform.system())
    files = sorted(file for folder in (SOURCES, EXPORTED) for kind in ("*.cpp", "*.h") for file in folder.glob(kind))
    what = [signatures.header(), *((file.name, file.read_bytes()) for file in files)]
    return hashlib.sha256(repr((how, what)).encode()).hexdigest()[:16]


def _cached(folder: Path) -> Built | None:
    """Return the library in a folder if its files are whole: loading half a library ends the process by SIGBUS."""
    library, linkable = (folder / name for name in FILES)
    try:
        for path in (folder.parent, folder, folder / "build.json", library, linkable):
            if why := distrust(path):
                log.warning("%s, so the CPU kernel there is not used", why)
                return None
        made = json.loads((folder / "build.json").read_text())
        for file in (library, linkable):
            if _sha256(file) != made["sha256"][file.name]:
                log.warning("%s is damaged and will be compiled again", file)
                return None
        left_out, seconds = made["left_out"], made["seconds"]
        return Built(library, linkable, made["compiler"], tuple(made["variants"]), left_out, seconds, cached=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s) and will be compiled again", folder, error)
        return None


def _build(compiler: Compiler, folder: Path, temporary: Path) -> Built:
    began = time.perf_counter()
    wanted = units(architecture())
    log.info("compiling the CPU kernel with %s in %s", compiler.name, folder)
    with open(folder / "build.log", "w") as written:
        try:
            objects = compile_units(compiler.command, wanted, temporary, write=written.write)
            library, linkable = (temporary / name for name in FILES)
            command = [*compiler.command, *objects.of("library"), *_with_torch(LINK_FLAGS), "-o", str(library)]
            checked(command, "linking", written.write)
            command = [*compiler.command, "-r", "-nostdlib", *objects.of("export"), "-o", str(linkable)]
            checked(command, "joining objects", written.write)
        except KernelBuildError as error:
            raise KernelBuildError(f"{error}; the compiler's output is in {folder / 'build.log'}") from None
    for variant, why in objects.left_out.items():
        log.warning("%s is too old for the kernel variant %s: %s", compiler.name, variant, why)
    made = {
        "compiler": compiler.name,
        "variants": [unit.variant for unit in wanted if unit.variant and unit.variant not in objects.left_out],
        "left_out": objects.left_out,
        "seconds": time.perf_counter() - began,
        "sha256": {name: _sha256(temporary / name) for name in FILES},
    }
    # Each file is replaced at once, so no reader sees half of it. The library is the last: it completes the build.
    (temporary / "build.json").write_text(json.dumps(made, indent=2))
    for name in ("build.json", *reversed(FILES)):
        (temporary / name).chmod(0o644)  # whatever the umask is
        os.replace(temporary / name, folder / name)
    built = _cached(folder)
    if built is None:
        raise KernelBuildError(f"another program changed {folder} while the kernel was compiled; try again")
    return dataclasses.replace(built, cached=False)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@dataclasses.dataclass
class Objects:
    """The results of `compile_units`.

    Attributes:
        made: The object files by their units.
        left_out: Variants that the compiler is too old for, with its error.
    """

    made: dict[Unit, str] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def of(self, part: str) -> list[str]:
        """Return the object files of a part, "library" or "export"."""
        return [path for unit, path in self.made.items() if unit.part in ("", part)]


def compile_units(
    command: Sequence[str],
    wanted: Sequence[Unit],
    folder: Path,
    write: Callable[[str], object] = lambda text: None,
) -> Objects:
    """Compile units, several at a time.

    Args:
        command: The compiler, and arguments that go before all others, such as a target.
        wanted: The units.
        folder: The folder for the object files.
        write: Takes the compiler's commands and its output.

    Raises:
        KernelBuildError: A unit does not compile, and the compiler is new enough for its variant.
    """
    made = Objects()
    (folder / DECLARED).write_text(signatures.header())

    def build(unit: Unit, *flags: str) -> str:
        """Compile a unit, and return the reason if it is left out, else ""."""
        path = folder / f"{Path(unit.source).stem}.o"
        options = [*FLAGS, *_with_torch(unit.flags), *flags, "-iquote", str(SOURCES), "-iquote", str(folder)]
        try:
            checked([*command, *options, "-c", str(unit.path), "-o", str(path)], unit.source, write)
        except KernelBuildError:
            if not unit.needs:
                raise
            # Either the source is wrong or the compiler is too old.
            test = folder / f"needs_{unit.source}"
            test.write_text(unit.needs + "\n")
            code, output = run([*command, *options, "-c", str(test), "-o", f"{test}.o"])
            if code == 0:
                raise
            write(output)
            return essence(output)
        made.made[unit] = str(path)
        return ""

    # The list of variants is compiled last: it depends on which of the others compile.
    last = [unit for unit in wanted if unit.source == "variants.cpp"]
    first = [unit for unit in wanted if unit not in last]
    with _progress(len(wanted), "Compiling the int8 CPU kernel") as advance:
        workers = concurrent.futures.ThreadPoolExecutor(max_workers=max(2, _cores()))
        try:
            pending = {workers.submit(build, unit): unit for unit in first}
            while pending:
                done, _ = concurrent.futures.wait(pending, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED)
                advance(len(done))
                for future in done:
                    unit = pending.pop(future)
                    if why := future.result():
                        made.left_out[unit.variant] = why
        finally:
            workers.shutdown(cancel_futures=True)
        for unit in last:
            build(unit, *(f"-DINT8COMPILE_NO_{variant.upper()}" for variant in sorted(made.left_out)))
            advance(1)
    return made


def _with_torch(flags: Sequence[str]) -> list[str]:
    # Not torch.utils.cpp_extension, which knows the same paths but imports setuptools.
    folder = str(Path(torch.__file__).parent)
    return [flag.replace("{torch}", folder) for flag in flags]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _progress(total: int | None, text: str) -> Iterator[Callable[[int], object]]:
    """Show a progress line if the work takes longer than a second."""
    form = None if total else "{desc} [{elapsed}]"
    with progress_bar(total=total, desc=text, delay=1, mininterval=0.5, miniters=0, bar_format=form) as bar:
        yield bar.update


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock file. The system releases it when a process dies.

    Raises:
        KernelBuildError: Another process has held it for too long.
    """
    lock = filelock.FileLock(path)
    until = time.monotonic() + LOCKED
    try:
        with _progress(None, "Waiting for another process that compiles the int8 CPU kernel") as advance:
            while True:
                try:
                    lock.acquire(timeout=0.05)
                    break
                except filelock.Timeout:
                    advance(0)
                    if time.monotonic() > until:
                        raise KernelBuildError(
                            f"another process has held {path} for {LOCKED:g} seconds; end it, or delete the file"
                        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        # A file system without locks: each process compiles, and the last library stays.
        log.info("%s cannot be locked: %s", path, error)
    try:
        yield
    finally:
        lock.release()
