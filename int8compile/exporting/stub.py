"""Make the stub library of an exported package, which checks all other files before they are opened (csrc/stub.cpp).

PyTorch's loader unpacks a package without comparing checksums, and opens its library. This library is the stub. It
holds the size and CRC-32 of every other file, and forwards AOTInductor's functions to the model's own library.
"""

from __future__ import annotations

import dataclasses
import mmap
import re
import shlex
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from int8compile.cpu import build
from int8compile.cpu.compiler import COMPILES, find_compiler
from int8compile.errors import ExportError

# Not ".so": PyTorch's loader opens a file with this ending, and must find only the stub.
SUFFIX = ".model"
_LAST_ERROR = "AOTInductorGetLastError"

_INTERFACE = Path("include", "torch", "csrc", "inductor", "aoti_runtime", "interface.h")
_COMMENT = re.compile(r"//.*")
_FUNCTION = re.compile(r"\bAOTIRuntimeError\s+(AOTInductor\w+)\(([^)]*)\);")
STUB = "stub.cpp"
# Sources compiled with the stub, to check the CPU.
_SOURCES = ("features.cpp", "cpuid.cpp")
# As small as possible: nothing checks the stub before it is opened.
_FLAGS = (
    *(flag for flag in build.FLAGS if flag != "-O3"),
    *("-Os", "-fno-exceptions", "-fno-rtti", "-s", "-shared"),
)
_PLAIN = ("bool", "int32_t", "int64_t", "uint64_t", "size_t")


def add_stub(files: Sequence[str], folder: Path, needs: Sequence[str], isa: str) -> list[str]:
    """Replace a model's library by a stub, and rename the library.

    Args:
        files: The files of a package, with one library "....so".
        folder: The folder for the stub's sources.
        needs: The compiler macros of the CPU features that the model's code uses.
        isa: The option of `export`, for the stub's error.

    Returns:
        The files of the package with the stub, which holds the size and CRC-32 of each of the others.

    Raises:
        ExportError: The stub cannot be compiled, or this torch declares functions that it cannot forward.
        OSError: The files cannot be read or written.
    """
    (library,) = [Path(file) for file in files if file.endswith(".so")]
    model = library.with_suffix(SUFFIX)
    library.rename(model)
    rest = [Path(file) for file in files if Path(file) != library] + [model]
    (folder / "stub_contents.h").write_text(_contents(model, rest, needs, isa))
    units = [unit for unit in build.units(build.architecture(), torch=False) if unit.source in _SOURCES]
    sources = [str(build.EXPORTED / STUB), *(str(unit.path) for unit in units)]
    headers = [word for place in (folder, build.SOURCES) for word in ("-iquote", str(place))]
    compiler = find_compiler().command
    command = [*compiler, *_FLAGS, *headers, *sources, "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILES)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExportError(f"`{shlex.join(compiler)}` cannot compile the package's stub library: {error}") from error
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
        raise ExportError(f"`{shlex.join(compiler)}` cannot compile the package's stub library: {said}")
    # Followed by its own CRC-32, any file has the same CRC-32: by this constant the stub checks itself.
    content = library.read_bytes()
    library.write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))
    return [*map(str, rest), str(library)]


def _contents(model: Path, files: Sequence[Path], needs: Sequence[str], isa: str) -> str:
    """Return the header that stub.cpp includes."""
    functions = _functions(model)
    forwarded = [each for each in functions if each.name != _LAST_ERROR]
    # The last name stands for no macro: an array cannot be empty.
    macros = ", ".join(f'"{macro}"' for macro in (*needs, ""))
    return "\n".join(
        [
            f'constexpr char LIBRARY[] = "{model.name}";',
            f'constexpr char ISA[] = "{isa}";',
            f"const char* const NEEDS[] = {{{macros}}};",
            "const File FILES[] = {",
            *(f'    {{"{file.name}", {file.stat().st_size}u, 0x{crc32(file):08x}u}},' for file in files),
            "};",
            "#define FUNCTIONS(FUNCTION) \\",
            *(f"  FUNCTION({each.name}, ({each.parameters}), ({each.arguments})) \\" for each in forwarded),
            "",
            "#define HAS_LAST_ERROR" if len(forwarded) < len(functions) else "",
            "",
        ]
    )


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function of AOTInductor's interface and its C parameters; all pointers are `void*`."""

    name: str
    types: tuple[str, ...]

    @property
    def parameters(self) -> str:
        return ", ".join(f"{each} a{index}" for index, each in enumerate(self.types))

    @property
    def arguments(self) -> str:
        return ", ".join(f"a{index}" for index in range(len(self.types)))


def _functions(model: Path) -> list[_Function]:
    """Return AOTInductor's functions that this torch declares and a model's library has."""
    header = _COMMENT.sub("", (Path(torch.__file__).parent / _INTERFACE).read_text())
    declared = [
        _Function(name, tuple(_type(name, parameter) for parameter in parameters.split(",")))
        for name, parameters in _FUNCTION.findall(header)
    ]
    with open(model, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # As the symbol table spells names.
        found = [each for each in declared if content.find(f"\0{each.name}\0".encode()) >= 0]
    if "AOTInductorModelContainerCreateWithDevice" not in {each.name for each in found}:
        raise ExportError(
            f"torch {torch.__version__} declares the functions of packages in a way that this version of int8compile "
            "does not know, so that the package could not check itself; use torch 2.11 to 2.13, or a newer int8compile"
        )
    return found


def _type(function: str, parameter: str) -> str:
    words = parameter.split()
    if "*" in parameter or any(word.endswith("Handle") for word in words):
        return "void*"
    if words and words[0] in _PLAIN:
        return words[0]
    raise ExportError(
        f"torch {torch.__version__} declares {function} with a parameter {parameter.strip()!r}, which this version of "
        "int8compile cannot forward; use torch 2.11 to 2.13, or a newer int8compile"
    )


def crc32(file: Path) -> int:
    """Return the CRC-32 of a file, as zip files have it."""
    crc = 0
    with open(file, "rb") as opened:
        while part := opened.read(1 << 22):
            crc = zlib.crc32(part, crc)
    return crc
