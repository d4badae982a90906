"""Loops of a kernel and their instructions by kind, from the output of NVIDIA's disassembler."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Matrix instructions for int8 (I), 16 bit (H) and fp8 (Q): of a warp group (GMMA), of a warp (MMA), and asynchronous
# instructions of later GPUs (UTC).
MATRIX = re.compile(r"(?:[IHQ]G?MMA|UTC\w*MMA)$")
# Other instructions, by the attribute of `Counts` that counts them.
_OPCODES = {
    "dots": "IDP IDP4A",
    "barriers": "BAR",
    "phases": "SYNCS",
    "stores": "STG",
    "shared_loads": "LDS LDSM",
    "shared_stores": "STS STSM",
    "shuffles": "SHFL",
    "conversions": "I2F I2FP F2I F2IP I2I I2IP F2F F2FP PRMT",
    "spills": "STL LDL",
}
_KINDS = {opcode: kind for kind, opcodes in _OPCODES.items() for opcode in opcodes.split()}
# Loads from global memory, and copies from there to shared memory.
_LOADS, _COPIES = {"LDG", "LD"}, {"LDGSTS", "UTMALDG", "UBLKCP"}
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_LABEL = re.compile(r"\s*(\.L\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(.*?)\s*;")
_JUMP = re.compile(r"\bBRA\b.*?`\((\.L\w+)\)")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of instructions of each kind in some code.

    Attributes:
        instructions: All instructions.
        matrix: Matrix instructions.
        dots: Products of four int8 each (dp4a).
        waits: Waits for matrix instructions of warp groups or for copies, with the number that may still be in flight:
            "gsb0 1" waits until one group of matrix instructions is left, "SB0 4" until four groups of copies are.
        barriers: Barriers of all warps of a program.
        phases: Operations on barriers in shared memory (`mbarrier`), which copies by the copy engine need.
        loads: Loads into registers, by bytes of a thread.
        copies: Copies from global to shared memory, of a thread or (UTMALDG) of a whole box.
        stores: Stores to global memory.
        shared_loads: Loads from shared memory.
        shared_stores: Stores to shared memory.
        shuffles: Exchanges between the threads of a warp.
        conversions: Conversions between types, and permutations of bytes.
        spills: Loads and stores of spilled registers.
    """

    instructions: int = 0
    matrix: int = 0
    dots: int = 0
    waits: tuple[str, ...] = ()
    barriers: int = 0
    phases: int = 0
    loads: tuple[tuple[int, int], ...] = ()
    copies: tuple[tuple[str, int], ...] = ()
    stores: int = 0
    shared_loads: int = 0
    shared_stores: int = 0
    shuffles: int = 0
    conversions: int = 0
    spills: int = 0

    @property
    def loaded(self) -> int:
        """Return the bytes that a thread loads or copies from global memory, without those of the copy engine."""
        copied = sum(int(name.partition(" ")[2] or 0) * count for name, count in self.copies)
        return copied + sum(width * count for width, count in self.loads)


def counts_of(data: Mapping[str, Any]) -> Counts:
    """Return the counts from the data of `dataclasses.asdict`, also after JSON; missing kinds are 0."""
    pairs = {name: tuple((key, count) for key, count in data[name]) for name in ("loads", "copies") if name in data}
    return Counts(**{**data, **pairs, "waits": tuple(data.get("waits", ()))})


def instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """Split a kernel's text into instructions.

    Args:
        sass: Output of `nvdisasm -c`.

    Returns:
        The instructions in order, and the number of the instruction after each label.
    """
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif code := _INSTRUCTION.match(line):
            found.append(code[1])
    return found, labels


def loops(code: Sequence[str], labels: Mapping[str, int]) -> list[tuple[int, int]]:
    """Return the first and the last instruction of each loop, in order. A loop is a backward jump and its range.

    A wait placed after the kernel's end jumps back into a loop, which looks like a second loop that overlaps the first.
    Of two overlapping loops the shorter is kept.
    """
    spans = []
    for end, instruction in enumerate(code):
        jump = _JUMP.search(instruction)
        if jump and labels.get(jump[1], end + 1) <= end:
            spans.append((labels[jump[1]], end))
    kept: list[tuple[int, int]] = []
    for begin, end in sorted(spans, key=lambda span: span[1] - span[0]):
        if all(end < b or e < begin or (begin <= b and e <= end) for b, e in kept):
            kept.append((begin, end))
    return sorted(kept)


def main_loop(sass: str) -> tuple[Counts | None, int]:
    """Find the loop in which a kernel spends its time, and count the instructions outside of loops.

    Among innermost loops with matrix instructions, the main loop is one that copies ahead or waits for the copy engine
    (the loop of second digits does neither). Ties are broken by: no conversions, most matrix instructions, last in the
    code. Without matrix instructions, the main loop is the one that loads most bytes.

    Returns:
        The loop's counts, or None if no loop computes anything; and the number of instructions in no loop except one
        around the main loop. Other loops run seldom, or in other warps.
    """
    code, labels = instructions(sass)
    spans = loops(code, labels)
    found = _innermost(code, spans, lambda counts: counts.matrix > 0)
    if found:
        main = max(found, key=lambda span: (*_likely(found[span]), span))
    else:
        found = _innermost(code, spans, lambda counts: bool(counts.loads))
        main = max(found, key=lambda span: (found[span].loaded, found[span].dots), default=(0, -1))
    around = [span for span in spans if span != main and span[0] <= main[0] and main[1] <= span[1]]
    inside = {i for span in spans if span not in around for i in range(span[0], span[1] + 1)}
    outside = [instruction for i, instruction in enumerate(code) if i not in inside]
    return found.get(main), count(outside).instructions


def _likely(counts: Counts) -> tuple[bool, bool, int]:
    return bool(counts.copies or counts.phases), not counts.conversions, counts.matrix


def spills_in_loops(sass: str) -> int:
    """Return the number of spill instructions in innermost loops with matrix instructions or loads."""
    code, labels = instructions(sass)
    found = _innermost(code, loops(code, labels), lambda counts: counts.matrix > 0 or bool(counts.loads))
    return sum(counts.spills for counts in found.values())


def usual(sass: str) -> Counts:
    """Count the instructions of the shortest path of a kernel without loops: every forward jump is taken.

    Those jumps skip the code for second digits and for unusual numbers.
    """
    code, labels = instructions(sass)
    executed: list[str] = []
    at = 0
    while at < len(code):
        instruction = code[at]
        executed.append(instruction)
        if re.match(r"EXIT\b", instruction):
            break
        jump = _JUMP.search(instruction)
        at = max(labels.get(jump[1], 0), at + 1) if jump else at + 1
    return count(executed)


def whole(sass: str) -> Counts:
    """Count all instructions of a kernel."""
    return count(instructions(sass)[0])


def count(code: Iterable[str]) -> Counts:
    """Count instructions by kind."""
    kinds: collections.Counter[str] = collections.Counter()
    loads: collections.Counter[int] = collections.Counter()
    copies: collections.Counter[str] = collections.Counter()
    waits: list[str] = []
    for instruction in code:
        # Without the predicate, such as "@!P0 ".
        text = re.sub(r"^@!?U?P\w+\s+", "", instruction)
        name, _, rest = text.partition(" ")
        opcode, *parts = name.split(".")
        if opcode == "NOP" or "@!PT" in instruction:
            continue  # Padding.
        kinds["instructions"] += 1
        if MATRIX.match(opcode):
            kinds["matrix"] += 1
        elif opcode in ("DEPBAR", "WARPGROUP") and "DEPBAR" in name:
            waits.append(_wait(rest))
        elif opcode in _LOADS:
            loads[_width(parts)] += 1
        elif opcode in _COPIES:
            copies[f"LDGSTS {_width(parts)}" if opcode == "LDGSTS" else opcode] += 1
        elif opcode in _KINDS:
            kinds[_KINDS[opcode]] += 1
    return Counts(**kinds, waits=tuple(waits), loads=tuple(sorted(loads.items())), copies=tuple(sorted(copies.items())))


def _innermost(
    code: Sequence[str], spans: Iterable[tuple[int, int]], wanted: Callable[[Counts], bool]
) -> dict[tuple[int, int], Counts]:
    """Count the instructions of wanted loops that contain no other wanted loop."""
    counted = {span: count(code[span[0] : span[1] + 1]) for span in spans}
    found = {span: counts for span, counts in counted.items() if wanted(counts)}
    return {
        span: counts
        for span, counts in found.items()
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in found)
    }


def _wait(operands: str) -> str:
    barrier, _, left = operands.partition(",")
    return f"{barrier.strip()} {int(left.split(',')[0].strip() or '0', 0)}"


def _width(parts: Sequence[str]) -> int:
    return next((_WIDTHS[part] for part in parts if part in _WIDTHS), 4)
