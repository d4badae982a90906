"""Instructions of the CPU kernel, counted by valgrind's callgrind: the same at every run, whatever else runs.

callgrind has no AVX-512 and no AMX, so these variants are not counted. Fewer instructions are not always faster, and
slower is not always more instructions: memory is not counted. More instructions for the same product have a reason.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PROGRAM = Path(__file__).parents[1] / "int8compile" / "cpu" / "csrc" / "check" / "count.cpp"
COUNTED = ("avx2", "neon", "portable")
# M, and K and N, of the products.
ROWS, SIZE = (1, 16, 64), (576, 256)
# Largest ratio of a call's instructions to the base's.
BAR = 1.03


class Product(NamedTuple):
    """A call that is counted."""

    variant: str
    m: int
    k: int
    n: int


class CannotCountError(Exception):
    """The instructions cannot be counted here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Counts of two trees.

    Attributes:
        text: A table, or why there are none.
        slower: Products that take more instructions than allowed.
    """

    text: str
    slower: tuple[Product, ...] = ()


def count(tree: Path) -> dict[Product, int]:
    """Compile a tree's kernel into a program, and count the instructions of its products.

    Raises:
        CannotCountError: There is no valgrind, or the program does not compile with the tree's headers.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise CannotCountError("valgrind is not installed (Debian: apt-get install valgrind)")
    with tempfile.TemporaryDirectory(prefix="int8compile-") as name:
        folder = Path(name)
        # By the tree's own build module, which knows its sources and flags.
        command = [sys.executable, __file__, str(folder), json.dumps(COUNTED)]
        made = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True, check=False
        )
        if made.returncode:
            raise CannotCountError(f"the kernel of {tree} does not compile into {PROGRAM.name}: {made.stderr[-500:]}")
        listed = _run(valgrind, "--tool=none", str(folder / "count")).split()
        products = [Product(variant, m, *SIZE) for variant in listed for m in ROWS]
        return {product: _count(valgrind, folder, product) for product in products}


def _count(valgrind: str, folder: Path, product: Product) -> int:
    """Return the instructions of a product in a folder's program."""
    options = ("--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={folder / 'counts'}")
    _run(valgrind, *options, "--toggle-collect=int8compile::linear(*", str(folder / "count"), *map(str, product))
    found = re.search(r"^totals: (\d+)$", (folder / "counts").read_text(), re.MULTILINE)
    if found is None or found[1] == "0":
        raise CannotCountError("callgrind found no call of int8compile::linear")
    return int(found[1])


def _run(*command: str) -> str:
    """Run a command, and return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotCountError(f"{Path(command[0]).name} failed: {done.stderr[-500:]}")
    return done.stdout


def compare(base: Path, head: Path) -> Comparison:
    """Compare the counts of two trees."""
    try:
        return compared(count(base), count(head))
    except CannotCountError as error:
        return Comparison(f"Instructions were not counted: {error}")


def compared(base: Mapping[Product, int], head: Mapping[Product, int]) -> Comparison:
    """Compare counts of the products that both have."""
    # Imported here, since this file also runs with another tree's modules.
    from benchmarks import tables

    both = [product for product in head if product in base]
    slower = tuple(product for product in both if head[product] > BAR * base[product])
    rows = []
    for each in both:
        ratio = tables.judged(f"{head[each] / base[each]:.3f}", each not in slower)
        rows.append((f"{each.variant}, M {each.m}, K {each.k}, N {each.n}", f"{base[each]}", f"{head[each]}", ratio))
    return Comparison(tables.markdown(rows, ("instructions (callgrind)", "base", "here", f"at most {BAR}")), slower)


def build_program(folder: Path, variants: tuple[str, ...]) -> None:
    """Link the program, with the kernel of the int8compile that this process imports."""
    from int8compile.cpu import build, compiler

    units = build.units(build.architecture(), torch=False)
    left_out = [unit.variant for unit in units if unit.variant and unit.variant not in variants]
    without = tuple(f"-DINT8COMPILE_NO_{variant.upper()}" for variant in left_out)
    wanted = [
        dataclasses.replace(unit, flags=(*unit.flags, *without)) if unit.source == "variants.cpp" else unit
        for unit in units
        if unit.variant not in left_out
    ]
    command = compiler.find_compiler().command
    objects = build.compile_units(command, [*wanted, build.Unit(str(PROGRAM))], folder).of("library")
    compiler.checked([*command, *objects, "-o", str(folder / "count")], "linking", lambda text: None)


if __name__ == "__main__":
    build_program(Path(sys.argv[1]), tuple(json.loads(sys.argv[2])))
