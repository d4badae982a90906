"""Compiles the CPU kernel's C++ sources, once, in the user's cache folder.

`UNITS` says what is compiled and how. They become a shared library, which this process loads, and an object file,
which is linked into exported models. Each set of sources, flags, compiler and torch has a folder of its own in the
cache: `library.so`, `int8compile.o`, `build.json` (what was built, with hashes), `build.log` (the compiler's words) and
`lock`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock
import torch
from tqdm import tqdm

from int8compile.cache import cache_folder, distrust, make_folder, private_folder
from int8compile.errors import KernelBuildError

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# Of what is in exported models only.
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
# The stable ABI of torch 2.11: the library then works with every later one.
TORCH_FLAGS = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", "{torch}/include")
# The library, and what is linked into exported models.
FILES = ("library.so", "int8compile.o")
LINK_FLAGS = ("-shared", "-L{torch}/lib", "-ltorch_cpu", "-ltorch", "-lc10")
# Seconds after which a compiler hangs, and a process that holds the lock, which compiles with several of them.
COMPILES, LOCKED = 600.0, 1200.0
AVX2 = ("-mavx2", "-mfma")
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    "-mprefer-vector-width=512",  # compilers prefer 256
)


@dataclasses.dataclass(frozen=True)
class Unit:
    """One .cpp file.

    Attributes:
        source: Its name in `SOURCES`, or in `EXPORTED` where it is for exported models only.
        architecture: The only one it is for, "" for all.
        flags: Besides `FLAGS`; `{torch}` stands for torch's folder.
        variant: The kernel variant that it is, if it is one.
        needs: A small program that shows whether a compiler is new enough for the variant. One that cannot compile it
            leaves the variant out.
        torch: Whether it needs torch.
        part: The only thing that it is in: "library" or "export", what is for exported models; "" for both.
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
        """Where it is."""
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
    """This machine's, as `Unit.architecture` and compilers' targets spell it."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def units(architecture: str, *, torch: bool = True) -> list[Unit]:
    """What is compiled for an architecture.

    Args:
        architecture: "x86_64", "aarch64" or another one, for which only the portable variant is there.
        torch: Whether with the operators, which need torch's headers and libraries.
    """
    return [unit for unit in UNITS if unit.architecture in ("", architecture) and (torch or not unit.torch)]


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: Its program, and arguments if CXX has some.
        version: What `--version` prints.
    """

    command: tuple[str, ...]
    version: str

    @property
    def name(self) -> str:
        """The first line of the version: "g++ (Debian 12.2.0-14) 12.2.0"."""
        return self.version.partition("\n")[0]


@dataclasses.dataclass(frozen=True)
class Built:
    """What is in the cache.

    Attributes:
        path: The library.
        linkable: The object file for exported models.
        compiler: The first line of its version.
        variants: Kernel variants that are in it.
        left_out: Variants that the compiler is too old for, with what it says.
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


def find_compiler() -> Compiler:
    """The compiler that CXX names, else the first of g++, clang++ and c++.

    Raises:
        KernelBuildError: There is none, or it does not run.
    """
    named = os.environ.get("CXX", "").strip()
    if not named:
        found = next(filter(shutil.which, ("g++", "clang++", "c++")), None)
        if found is None:
            raise KernelBuildError("no C++ compiler found (g++, clang++, c++); install g++, or name one with CXX")
        named = found
    try:
        command = tuple(shlex.split(named))
    except ValueError as error:
        raise KernelBuildError(f"CXX={named!r} cannot be read as a command ({error}); correct or unset it") from error
    # Where it is now, so that a new compiler under the old name is noticed.
    return _identified(command, shutil.which(command[0]) or "")


@functools.cache
def _identified(command: tuple[str, ...], path: str) -> Compiler:
    if not path:
        raise KernelBuildError(f"CXX names {command[0]!r}, which is no program; name a C++17 compiler, or unset CXX")
    code, output = _run((*command, "--version"))
    if code != 0:
        raise KernelBuildError(
            f"`{shlex.join(command)} --version` fails: {_essence(output)}; set CXX to a C++17 compiler"
        )
    return Compiler(command, output.strip())


def library(*, again: bool = False) -> Built:
    """The library of this machine, compiled if that has not been done.

    Any number of processes may call this at once: one compiles, the others wait for it.

    Args:
        again: Compile even if it is there, because what is there does not load.

    Raises:
        KernelBuildError: There is no compiler, it fails, or the cache folder cannot be written.
    """
    if os.name != "posix":
        raise KernelBuildError(f"there is a CPU kernel for Linux and macOS only, not for {platform.system()}")
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
    """The cache folder, or one for this user alone where others could put a library of theirs into it."""
    with contextlib.suppress(OSError):  # What is not there yet is made.
        # One of this user's that others can write to is taken from them when it is used.
        if (why := distrust(named)) and named.stat().st_uid != os.getuid():
            log.warning("%s, so the CPU kernel is not taken from there; %s is used instead", why, private)
            return private
    return named


def _key(compiler: Compiler) -> str:
    """Changes with everything that the library depends on."""
    table = [dataclasses.astuple(unit) for unit in units(architecture())]
    how = (FLAGS, LINK_FLAGS, table, compiler.command, compiler.version, torch.__version__, platform.system())
    files = sorted(file for folder in (SOURCES, EXPORTED) for kind in ("*.cpp", "*.h") for file in folder.glob(kind))
    what = [(file.name, file.read_bytes()) for file in files]
    return hashlib.sha256(repr((how, what)).encode()).hexdigest()[:16]


def _cached(folder: Path) -> Built | None:
    """What `_build` left in a folder, if it is whole: loading half a library ends the process by SIGBUS."""
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
            _checked(command, "linking", written.write)
            command = [*compiler.command, "-r", "-nostdlib", *objects.of("export"), "-o", str(linkable)]
            _checked(command, "joining objects", written.write)
        except KernelBuildError as error:
            raise KernelBuildError(f"{error}; all that the compiler says is in {folder / 'build.log'}") from None
    for variant, why in objects.left_out.items():
        log.warning("%s is too old for the kernel variant %s: %s", compiler.name, variant, why)
    made = {
        "compiler": compiler.name,
        "variants": [unit.variant for unit in wanted if unit.variant and unit.variant not in objects.left_out],
        "left_out": objects.left_out,
        "seconds": time.perf_counter() - began,
        "sha256": {name: _sha256(temporary / name) for name in FILES},
    }
    # Each replaces what is there at once, so no reader sees half a file. The library is what counts as finished.
    (temporary / "build.json").write_text(json.dumps(made, indent=2))
    for name in ("build.json", *reversed(FILES)):
        (temporary / name).chmod(0o644)  # Whatever the umask is.
        os.replace(temporary / name, folder / name)
    built = _cached(folder)
    if built is None:
        raise KernelBuildError(f"{folder} was changed by something else while the kernel was compiled; try again")
    return dataclasses.replace(built, cached=False)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@dataclasses.dataclass
class Objects:
    """What `compile_units` made.

    Attributes:
        made: The object files by their units.
        left_out: Variants that the compiler is too old for, with what it says.
    """

    made: dict[Unit, str] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def of(self, part: str) -> list[str]:
        """The object files that belong to the "library", or are for "export"."""
        return [path for unit, path in self.made.items() if unit.part in ("", part)]


def compile_units(
    command: Sequence[str],
    wanted: Sequence[Unit],
    folder: Path,
    write: Callable[[str], object] = lambda text: None,
) -> Objects:
    """Compiles units, several at a time.

    Args:
        command: The compiler and arguments that go before all others, e.g. a target.
        wanted: The units.
        folder: Where to put the object files.
        write: Takes the compiler's commands and its output.

    Raises:
        KernelBuildError: A unit does not compile, and not because the compiler is too old for its variant.
    """
    made = Objects()

    def build(unit: Unit, *flags: str) -> str:
        """Compiles one; returns why it is left out, or ""."""
        path = folder / f"{Path(unit.source).stem}.o"
        options = [*FLAGS, *_with_torch(unit.flags), *flags, "-iquote", str(SOURCES)]
        try:
            _checked([*command, *options, "-c", str(unit.path), "-o", str(path)], unit.source, write)
        except KernelBuildError:
            if not unit.needs:
                raise
            # The sources' fault, or is the compiler too old?
            test = folder / f"needs_{unit.source}"
            test.write_text(unit.needs + "\n")
            code, output = _run([*command, *options, "-c", str(test), "-o", f"{test}.o"])
            if code == 0:
                raise
            write(output)
            return _essence(output)
        made.made[unit] = str(path)
        return ""

    # The list of variants is compiled last: the others decide what is on it.
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


def _checked(command: Sequence[str], what: str, write: Callable[[str], object]) -> None:
    """Runs a command of the build.

    Raises:
        KernelBuildError: It failed.
    """
    code, output = _run(command)
    write(f"$ {shlex.join(command)}\n{output}\n")  # In one piece: several commands run at a time.
    if code != 0:
        raise KernelBuildError(f"{command[0]} fails at {what}: {_essence(output) or f'exit code {code}'}")


def _run(command: Sequence[str]) -> tuple[int, str]:
    """The exit code of a command and what it printed."""
    try:
        # LC_ALL: messages in English, which _essence reads.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C"},
            encoding="utf-8",
            errors="replace",
            timeout=COMPILES,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 124, f"error: {command[0]} had not ended after {COMPILES:g} seconds"
    except OSError as error:
        return 127, f"error: cannot run {command[0]}: {error.strerror}"
    return done.returncode, done.stdout


def _essence(output: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # The linker's messages have no "error:"; what the compiler adds to them has.
    for pattern in (r"^(?!collect2|clang).*\berror:", r"\bld(\.\w+)?: (?!.*: in function)"):
        if found := next((line for line in lines if re.search(pattern, line)), ""):
            return found
    return lines[-1] if lines else ""


def _with_torch(flags: Sequence[str]) -> list[str]:
    # Not torch.utils.cpp_extension, which knows the same paths but imports setuptools.
    folder = str(Path(torch.__file__).parent)
    return [flag.replace("{torch}", folder) for flag in flags]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _progress(total: int | None, text: str) -> Iterator[Callable[[int], object]]:
    """A progress line, which appears only if it takes longer than a second."""
    form = None if total else "{desc} [{elapsed}]"
    with tqdm(total=total, desc=text, delay=1, mininterval=0.5, miniters=0, leave=False, bar_format=form) as bar:
        yield bar.update


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds a lock file. The system takes it back from a process that dies.

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
        # A file system without locks. Then each process compiles; the last one's library stays.
        log.info("%s cannot be locked: %s", path, error)
    try:
        yield
    finally:
        lock.release()
