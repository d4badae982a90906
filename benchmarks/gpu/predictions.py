"""Predictions of `benchmarks.predicted` for a GPU, stored in a day's result file and shown beside measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu import decode, linear, parts
from benchmarks.predicted import MARK, PREDICTED

TITLE = "predictions beside measurements"


def of(device: str) -> dict[str, Any] | None:
    """Return the committed predictions for a device; None if there are none."""
    if not PREDICTED.exists():
        return None
    for name, found in json.loads(PREDICTED.read_text())["gpus"].items():
        if name in device:
            return {"about": MARK, "gpu": name, **found}
    return None


def lines(data: Mapping[str, Any]) -> list[str]:
    """Return lines with each measured ratio or time and its prediction; none without predictions."""
    predicted = data.get("predicted")
    if not predicted:
        return []
    cases = predicted["linear"]
    found = []
    for name, case in cases_of(data, linear.FIRST, linear.REST):
        if name in cases:
            ratio = case["ratios"].get(linear.OURS, {}).get("ratio")
            found.append(_line(f"linear {name}, times bfloat16", ratio, cases[name]["ratio"]))
    for name, case in cases_of(data, parts.OUTLIERS):
        if name in cases:
            for what, key in ((parts.WITHOUT, "product"), (parts.QUANTIZE, "quantize")):
                measured = case["medians"].get(what)
                us = None if measured is None else 1e6 * measured
                found.append(_line(f"{what} {name}, us", us, 1e6 * cases[name][key]))
    for _, case in cases_of(data, decode.NAME):
        layers = str(case["sizes"]["layers"])
        if layers in predicted["decode"]:
            ratio = case["ratios"].get(decode.OURS, {}).get("ratio")
            found.append(_line(f"decode, {layers} layers, times bfloat16", ratio, predicted["decode"][layers]["ratio"]))
    found = [line for line in found if line]
    return ["", f"{TITLE} ({predicted['gpu']}; {predicted['about'].lower()}):", *found] if found else []


def cases_of(data: Mapping[str, Any], *stages: str) -> list[tuple[str, Any]]:
    """Return the cases of stages by name, without cases that ended in an error."""
    found = [data["stages"].get(stage, {"cases": {}})["cases"].items() for stage in stages]
    return [(name, case) for cases in found for name, case in cases if "error" not in case]


def _line(what: str, measured: float | None, predicted: float) -> str:
    if measured is None:
        return ""
    return f"  {what}: measured {measured:.4g}, predicted {predicted:.4g} ({predicted / measured - 1:+.0%})"
