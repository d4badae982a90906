"""The .pt2 file that `export` writes: what it holds beside the compiled model, and how to read that.

A package is a zip file that AOTInductor's loaders read. Its metadata has three entries of ours: `METADATA`, all that
`inspect` shows as JSON, and `INPUTS` and `OUTPUTS`, their dtypes and sizes in a form that C++ reads without a parser.
And beside the model's files lies `CHECKSUMS`, with which the model's library checks them when it is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from tabulate import tabulate

from int8compile.atomic import sync
from int8compile.errors import ExportError, PackageError
from int8compile.report import readable

FORMAT = 1
METADATA = "int8compile"
INPUTS, OUTPUTS = "int8compile.inputs", "int8compile.outputs"
# As in csrc/package.cpp.
CHECKSUMS = "int8compile.crc32"

_FORMS = {
    "fast": "kernels of int8compile, which are in the file",
    "portable": "operators of PyTorch, compiled by Inductor",
}
_AGAIN = "copy or export it again"


@dataclasses.dataclass(frozen=True)
class Package:
    """A package that was read and found whole.

    Attributes:
        path: The file.
        size: Its bytes.
        metadata: What `export` wrote down about it.
    """

    path: Path
    size: int
    metadata: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The package as plain data."""
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
            ("options", ", ".join(f"{name}={value!r}" for name, value in about["config"].items())),
            *(("input", f"{each['name']}: {_layout(each)}") for each in about["inputs"]),
            *(("output", _layout(each)) for each in about["outputs"]),
            *(("size", f"{name} from {low} to {high or 'any'}") for name, (low, high) in about["sizes"].items()),
        ]
        return "\n".join([tabulate(shortened(rows), tablefmt="plain"), "", about["explain"]])


def _layout(tensor: Mapping[str, Any]) -> str:
    return f"{tensor['dtype']} [{', '.join(map(str, tensor['shape']))}]"


def shortened(rows: Sequence[tuple[str, str]], limit: int = 4) -> list[tuple[str, str]]:
    """Rows without most of those of one kind that there are many of, such as the tensors of a cache."""
    kept: list[tuple[str, str]] = []
    for name in dict.fromkeys(name for name, _ in rows):
        same = [row for row in rows if row[0] == name]
        kept += same if len(same) <= limit else [*same[: limit - 1], (name, f"and {len(same) - limit + 1} more")]
    return kept


def check_name(path: Path) -> None:
    """Raises `ExportError` where a package cannot have this name."""
    if path.suffix != ".pt2":
        raise ExportError(f"{str(path)!r} must end in .pt2, which PyTorch's loader asks for")
    if path.is_dir():
        raise ExportError(f"{str(path)!r} is a folder; name a file")


def inspect(path: str | os.PathLike[str]) -> Package:
    """Reads what a package says of itself, and checks that it is as it was exported. Runs nothing of it.

    Args:
        path: A .pt2 file that `export` wrote.

    Returns:
        The package: `print` shows it, `to_dict()` is data.

    Raises:
        PackageError: It is no such file, is damaged or edited, or of a newer format.
    """
    file = Path(path)
    name = repr(str(path))
    try:
        size = file.stat().st_size
        with zipfile.ZipFile(file) as archive:
            if packed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
                raise PackageError(f"{name} was edited: export compresses nothing, and {packed[0]} is; {_AGAIN}")
            damaged = archive.testzip()
            if damaged is not None:
                raise PackageError(f"{name} is damaged in {PurePosixPath(damaged).name}; {_AGAIN}")
            members = [info for info in archive.infolist() if _of_model(info)]
            described = [_text(archive, info) for info in members if info.filename.endswith(".wrapper_metadata.json")]
            listed = [_text(archive, info) for info in members if PurePosixPath(info.filename).name == CHECKSUMS]
    except OSError as error:
        raise PackageError(f"{name} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise PackageError(f"{name} is no .pt2 file, or is truncated ({error}); {_AGAIN}") from error
    try:
        metadata = json.loads(json.loads(described[0])[METADATA])
        version, maker = int(metadata["format"]), str(metadata["int8compile"])
    except (IndexError, KeyError, TypeError, ValueError, RecursionError):
        raise PackageError(f"{name} was not made by int8compile.export: it has no metadata of it") from None
    if version > FORMAT:
        raise PackageError(
            f"{name} is of format {version}, made by int8compile {maker}; this version reads up to {FORMAT}. "
            "Update int8compile"
        )
    if not listed:
        raise PackageError(f"{name} was edited: it has no list of checksums; {_AGAIN}")
    names = [(PurePosixPath(info.filename).name, info) for info in members]
    found = [f"{info.CRC:08x} {info.file_size} {each}" for each, info in names if each != CHECKSUMS]
    if sorted(found) != sorted(listed[0].splitlines()):
        raise PackageError(f"{name} was edited: its files are not those that were exported; {_AGAIN}")
    return Package(file, size, metadata)


def _text(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    if info.file_size > 1 << 28:
        raise ValueError(f"{info.filename} is of {readable(info.file_size)}")
    return archive.read(info).decode()


def _of_model(info: zipfile.ZipInfo) -> bool:
    return "/data/aotinductor/" in f"/{info.filename}"


def write(path: Path, files: Sequence[str], folder: Path) -> None:
    """Makes a package of the files that AOTInductor wrote. It is there when it is complete, and not before.

    Args:
        path: Where to; what is there is replaced.
        files: The files.
        folder: A folder on the same file system as `path`, for what is made on the way.

    Raises:
        OSError: It cannot be written.
    """
    from torch.export.pt2_archive._package import package_pt2

    checksums = folder / CHECKSUMS
    checksums.write_text("".join(f"{_checksum(Path(file))} {Path(file).name}\n" for file in files))
    made = folder / "made.pt2"
    package_pt2(str(made), aoti_files={"model": [*files, str(checksums)]})
    sync(made)
    os.replace(made, path)


def _checksum(file: Path) -> str:
    """CRC-32 and size, as zip files know them."""
    crc = 0
    with open(file, "rb") as opened:
        while part := opened.read(1 << 22):
            crc = zlib.crc32(part, crc)
    return f"{crc:08x} {file.stat().st_size}"


def described(tensors: Sequence[tuple[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """Names, dtypes and sizes of inputs or outputs; a size that changes from call to call is a symbol."""
    return [
        {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(map(_size, tensor.shape))}
        for name, tensor in tensors
    ]


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def line_of(tensors: Sequence[Mapping[str, Any]]) -> str:
    """Inputs or outputs as words: dtype, number of dimensions and sizes of each; -1 for a size that changes."""
    words: list[str] = []
    for each in tensors:
        sizes = [str(size) if isinstance(size, int) else "-1" for size in each["shape"]]
        words += [each["dtype"], str(len(sizes)), *sizes]
    return " ".join(words)
