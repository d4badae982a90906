"""Write, check and read the .pt2 files of `export`.

A package is a zip file that AOTInductor's loaders read. int8compile adds three entries to its metadata: `METADATA`,
with all that `inspect` shows, as JSON, and `INPUTS` and `OUTPUTS`, with dtypes and sizes in a form that C++ reads
without a parser.

The file ends with the SHA-256 of all bytes before it, as the zip file's comment, which `verify` compares. If
int8compile is not installed, the package's stub library checks the files that PyTorch's loader has unpacked (stub.py).
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from tabulate import tabulate

from int8compile.atomic import sync
from int8compile.errors import ExportError, PackageError
from int8compile.report import readable

if TYPE_CHECKING:
    from torch.export.pt2_archive._package import AOTICompiledModel

FORMAT = 1
METADATA = "int8compile"
INPUTS, OUTPUTS = "int8compile.inputs", "int8compile.outputs"
# The end of a package, before the 64 digits of its SHA-256.
MARK = b"int8compile sha256 "
_DIGITS = 64
# The end of a zip file: the signature, six fields, and the length of the comment.
_END = struct.Struct("<4s4H2LH")

_FORMS = {
    "fast": "kernels of int8compile, which are in the file",
    "portable": "operators of PyTorch, compiled by Inductor",
}
_AGAIN = "copy or export it again"


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that was read and checked.

    Attributes:
        path: The file.
        size: The file's size in bytes.
        metadata: The description that `export` wrote.
    """

    path: Path
    size: int
    metadata: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the package as plain data."""
        return {"path": str(self.path), "size": self.size, **self.metadata}

    def __str__(self) -> str:
        about = self.metadata
        sizes = about["bytes"]
        rows = [
            ("file", f"{self.path} ({readable(self.size)})"),
            ("made by", f"int8compile {about['int8compile']} with torch {about['torch']}, format {about['format']}"),
            ("runs on", f"{about['device']} ({about['machine']}), isa={about['isa']}"),
            ("needs of the CPU", " ".join(about["needs"]) or "nothing beyond the architecture's first version"),
            *([("needs of the GPU", about["gpu"]["isa"])] if about.get("gpu") else []),
            ("int8 linears", "; variants ".join(filter(None, (_FORMS[about["form"]], " ".join(about["variants"]))))),
            ("weights", f"{readable(sizes['int8'])} in int8 with scales, {readable(sizes['float'])} in float"),
            ("rotations", _rotations(about["report"]["sites"])),
            ("options", ", ".join(f"{name}={value!r}" for name, value in about["config"].items())),
            *(("input", f"{each['name']}: {_layout(each)}") for each in about["inputs"]),
            *(("output", _layout(each)) for each in about["outputs"]),
            *(("size", f"{name} from {low} to {high or 'any'}") for name, (low, high) in about["sizes"].items()),
        ]
        return "\n".join([tabulate(shortened(rows), tablefmt="plain"), "", about["explain"]])


def _rotations(sites: Sequence[Mapping[str, Any]]) -> str:
    """Return the sizes of rotations, with the number of int8 linears of each size."""
    # Old packages, made before there were rotations, have no sizes.
    sizes = collections.Counter(int(site.get("rotation") or 1) for site in sites if site["rewritten"])
    return ", ".join(
        f"{count} {'linear' if count == 1 else 'linears'} {f'by {size}' if size > 1 else 'not rotated'}"
        for size, count in sorted(sizes.items(), reverse=True)
    )


def _layout(tensor: Mapping[str, Any]) -> str:
    return f"{tensor['dtype']} [{', '.join(map(str, tensor['shape']))}]"


def shortened(rows: Sequence[tuple[str, str]], limit: int = 4) -> list[tuple[str, str]]:
    """Return rows, shortened where many have the same name, such as the tensors of a cache."""
    kept: list[tuple[str, str]] = []
    for name in dict.fromkeys(name for name, _ in rows):
        same = [row for row in rows if row[0] == name]
        kept += same if len(same) <= limit else [*same[: limit - 1], (name, f"and {len(same) - limit + 1} more")]
    return kept


def check_name(path: Path) -> None:
    """Raise `ExportError` if a package cannot have this name."""
    if path.suffix != ".pt2":
        raise ExportError(f"{str(path)!r} must end in .pt2, as PyTorch's loader requires")
    if path.is_dir():
        raise ExportError(f"{str(path)!r} is a folder; name a file")


def inspect(path: str | os.PathLike[str]) -> Package:
    """Check a package by `verify`, and read its description. No code of the package runs.

    Args:
        path: A .pt2 file that `export` wrote.

    Returns:
        The package: `print` shows it, `to_dict()` is data.

    Raises:
        PackageError: The file is not an exported model, is damaged or edited, or has a newer format.
    """
    file = Path(path)
    name = repr(str(path))
    verify(file)
    try:
        size = file.stat().st_size
        with zipfile.ZipFile(file) as archive:
            described = [archive.read(name) for name in archive.namelist() if name.endswith(".wrapper_metadata.json")]
        metadata = json.loads(json.loads(described[0])[METADATA])
        version, maker = int(metadata["format"]), str(metadata["int8compile"])
    except OSError as error:
        raise PackageError(f"{name} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, EOFError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PackageError(f"{name} was not made by int8compile.export: it has no such metadata ({error})") from error
    if version > FORMAT:
        raise PackageError(
            f"{name} has format {version}, made by int8compile {maker}; this version reads up to {FORMAT}. "
            "Update int8compile"
        )
    return Package(file, size, metadata)


def load_exported(
    path: str | os.PathLike[str], *, run_single_threaded: bool = False, device_index: int = -1
) -> AOTICompiledModel:
    """Check every byte of a package, then load it. PyTorch's loader does not open a file that fails the check.

    `torch._inductor.aoti_load_package(path)` loads the same file if int8compile is not installed. Both check for
    damage, not for attacks: a package is code, so load only packages that you trust.

    Args:
        path: A .pt2 file that `export` wrote.
        run_single_threaded: As in `aoti_load_package`: whether calls leave out the locks between threads.
        device_index: As in `aoti_load_package`: the GPU; -1 for the current one.

    Returns:
        The result of `aoti_load_package`: call it with the model's inputs.

    Raises:
        PackageError: The file is not an exported model, is damaged or edited, has a newer format, or cannot run here.
    """
    from torch._inductor import aoti_load_package

    inspect(path)
    try:
        return aoti_load_package(os.fspath(path), run_single_threaded, device_index)
    except (RuntimeError, ValueError) as error:
        raise PackageError(f"{str(path)!r} is intact, but PyTorch cannot load it here: {error}") from error


def verify(path: str | os.PathLike[str]) -> None:
    """Compare a package with the SHA-256 at its end, which `export` wrote, of all bytes before.

    Args:
        path: A .pt2 file that `export` wrote.

    Raises:
        PackageError: The file cannot be read, was not written by `export`, or has changed since.
    """
    name = repr(str(path))
    try:
        if not Path(path).is_file():
            raise PackageError(
                f"{name} {'is not a file' if Path(path).exists() else 'does not exist'}; name a .pt2 file"
            )
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            end = max(0, size - len(MARK) - _DIGITS)
            file.seek(end)
            marked = file.read(len(MARK)) == MARK
            expected = file.read(_DIGITS)
            file.seek(0)
            if marked and _sha256(file, size - _DIGITS) == expected.decode(errors="replace"):
                return
    except OSError as error:
        raise PackageError(f"{name} cannot be read: {error.strerror or error}") from error
    if marked:
        raise PackageError(f"{name} is damaged or was edited: it has changed since its export; {_AGAIN}")
    if zipfile.is_zipfile(path):
        raise PackageError(
            f"{name} has no int8compile checksum at its end: it was not made by int8compile.export, or was edited "
            f"or damaged since. If it should be, {_AGAIN}; if not, torch.export.load or "
            "torch._inductor.aoti_load_package may load it"
        )
    raise PackageError(f"{name} is not a .pt2 file, or is truncated; {_AGAIN}")


def _sha256(file: BinaryIO, size: int) -> str:
    """Return the SHA-256 of a file's next bytes."""
    digest = hashlib.sha256()
    while size > 0 and (part := file.read(min(size, 1 << 22))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest()


def write(path: Path, files: Sequence[str], folder: Path) -> None:
    """Write a package with AOTInductor's files. The file appears only when it is complete.

    Args:
        path: The package. An existing file is replaced.
        files: The files.
        folder: A folder for temporary files, on the same file system as `path`.

    Raises:
        OSError: The package cannot be written.
    """
    from torch.export.pt2_archive._package import package_pt2

    made = folder / "made.pt2"
    package_pt2(str(made), aoti_files={"model": list(files)})
    seal(made)
    sync(made)
    os.replace(made, path)


def seal(path: Path) -> None:
    """Append the checksum of a zip file to it, as the file's comment: `MARK` and the SHA-256 of all bytes before.

    Raises:
        OSError: The file cannot be written.
        ValueError: The file is not a zip file, or has a comment.
    """
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END) - _END.size
        file.seek(max(0, end))
        signature, *_, comment = _END.unpack(file.read(_END.size))
        if signature != b"PK\5\6" or comment:
            raise ValueError(f"{str(path)!r} is not a zip file without a comment")
        file.seek(-2, os.SEEK_END)
        file.write((len(MARK) + _DIGITS).to_bytes(2, "little") + MARK)
        file.seek(0)
        digest = _sha256(file, end + _END.size + len(MARK))
        file.seek(0, os.SEEK_END)
        file.write(digest.encode())


def described(tensors: Sequence[tuple[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """Return names, dtypes and sizes of inputs or outputs. A size that changes from call to call is a symbol."""
    return [
        {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(map(_size, tensor.shape))}
        for name, tensor in tensors
    ]


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def line_of(tensors: Sequence[Mapping[str, Any]]) -> str:
    """Return inputs or outputs as words: dtype, number of dimensions and sizes of each; -1 for a size that changes."""
    words: list[str] = []
    for each in tensors:
        sizes = [str(size) if isinstance(size, int) else "-1" for size in each["shape"]]
        words += [each["dtype"], str(len(sizes)), *sizes]
    return " ".join(words)
