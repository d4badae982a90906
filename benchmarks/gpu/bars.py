"""Bars for the speed, and judgements of measured values."""

from __future__ import annotations

from typing import Any

from benchmarks.interleaved import rounded

# With enough rows to use the matrix units, quantization takes at least 700 / N of the product's time: it reads 16 bits
# and writes 8 for each of M K elements, at 3.35 TB/s on an H100; the product does 2 M N K operations at about 1600 Tera
# per second. The bar allows half as much again.
QUANTIZE_FLOOR, QUANTIZE_TIMES, QUANTIZE_ROWS = 700, 1.5, 2048
OUTLIER_PART = 0.05
DECODE = 1.6
# The host's seconds for quantize_rows and quantized_linear.
LAUNCH = 20e-6


def at_least(value: float, bar: float) -> dict[str, Any]:
    """Return a value with its lower bar, and whether it meets the bar."""
    return {"value": rounded(value), "at_least": bar, "met": value >= bar}


def at_most(value: float, bar: float) -> dict[str, Any]:
    """Return a value with its upper bar, and whether it meets the bar."""
    return {"value": rounded(value), "at_most": bar, "met": value <= bar}


def linear(m: int) -> float:
    """Return the least ratio to bfloat16 of a linear layer with M rows; it is never below 1."""
    if m >= 2048:
        return 1.6
    return 1.75 if m <= 64 else 1.0


def quantize(n: int) -> float:
    """Return the largest ratio of quantization's time to the time of a product of N outputs."""
    return QUANTIZE_TIMES * QUANTIZE_FLOOR / n


def peer(name: str, m: int) -> float | None:
    """Return the least ratio to another package with M rows; None for no bar."""
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
    """Return a judged value in words."""
    sign = ">=" if "at_least" in bar else "<="
    return f"{bar['value']:.4g} ({sign} {bar.get('at_least', bar.get('at_most')):g}{'' if bar['met'] else ' MISSED'})"
