"""How fast is fast enough, and whether something is."""

from __future__ import annotations

from typing import Any

# Once there are rows enough to use the matrix units, quantizing takes at least 700 / N of the product's time: it reads
# 16 bits and writes 8 of each of M K elements, at 3.35 TB/s on an H100, and the product has 2 M N K operations, at
# about 1600 Tera a second. It may take half as long again.
QUANTIZE_FLOOR, QUANTIZE_TIMES, QUANTIZE_ROWS = 700, 1.5, 2048
OUTLIER_PART = 0.05
DECODE = 1.6
# Seconds of the host for quantize_rows and quantized_linear.
LAUNCH = 20e-6


def at_least(value: float, bar: float) -> dict[str, Any]:
    """A value, its bar, and whether it is met."""
    return {"value": _rounded(value), "at_least": bar, "met": value >= bar}


def at_most(value: float, bar: float) -> dict[str, Any]:
    """The same where less is better."""
    return {"value": _rounded(value), "at_most": bar, "met": value <= bar}


def linear(m: int) -> float:
    """How many times faster than bfloat16 a linear layer of M rows has to be; at no M may it be slower."""
    if m >= 2048:
        return 1.6
    return 1.75 if m <= 64 else 1.0


def quantize(n: int) -> float:
    """The time of the product of N outputs that quantizing its activations may take, as a share."""
    return QUANTIZE_TIMES * QUANTIZE_FLOOR / n


def peer(name: str, m: int) -> float | None:
    """How many times faster than another package; None where no bar is set."""
    if name == "bitsandbytes":
        if m <= 32:
            return 4.0
        return 2.0 if 512 <= m <= 2048 else None
    if name == "torchao":
        if m <= 64:
            return 3.0
        return 1.2 if m >= 512 else None
    raise ValueError(f"no bars for {name!r}; there are some for bitsandbytes and torchao")


def shown(bar: dict[str, Any]) -> str:
    """A judged value in words."""
    sign = ">=" if "at_least" in bar else "<="
    return f"{bar['value']:.4g} ({sign} {bar.get('at_least', bar.get('at_most')):g}{'' if bar['met'] else ' MISSED'})"


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
