"""Instructions of the CPU kernel for a product, counted by callgrind: the same at every run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import instructions
from int8compile.cpu import build

ROOT = Path(__file__).parents[2]
# Instructions for 1000 multiply-adds by variant and M, with K = 576 and N = 256, as g++ 12 compiles them.
MEASURED = {
    "avx2": {1: 414, 16: 332, 64: 328},
    "portable": {1: 3332, 16: 3094, 64: 3082},
}
# For other compilers and versions.
ROOM = 1.15

pytestmark = [
    pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind (Debian: apt-get install valgrind)"),
    pytest.mark.skipif(build.architecture() != "x86_64", reason="the bounds are for x86-64"),
]


def test_a_product_takes_no_more_instructions() -> None:
    try:
        counts = instructions.count(ROOT)
    except instructions.CannotCountError as error:
        pytest.skip(str(error))
    assert {product.variant for product in counts} == set(MEASURED)
    for product, count in counts.items():
        found = 1000 * count / (product.m * product.k * product.n)
        before = MEASURED[product.variant][product.m]
        assert found <= ROOM * before, (
            f"{product} takes {found:.0f} instructions for 1000 multiply-adds, {before} before. Look at what changed "
            f"in int8compile/cpu/csrc/{product.variant}.cpp, tiles.h, rows.h and linear.cpp; valgrind --tool=callgrind "
            "and callgrind_annotate show the function"
        )
