"""Summary of a GPU day: text, Markdown and plots."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.gpu import bars, candidates, checks, decode, exported, linear, predictions
from benchmarks.gpu.day import GATES, CaseResult
from benchmarks.gpu.facts import described

SPEED_UPS, DECODING = "speedup.png", "decode.png"
# Keys with names of tests that did not pass.
_UNWELL = ("failed", "unfinished")


def in_words(result: CaseResult) -> str:
    """Return a case's result in words."""
    if "error" in result:
        return str(result["error"]).strip().splitlines()[-1][:200]
    if "passed" in result:
        rest = result.get("summary", f"at most {result.get('max_ulp')} ulp")
        return f"{'passed' if result['passed'] else 'FAILED'}, {rest}"
    if "summary" in result:
        return str(result["summary"])
    parts = [f"{name} {bars.shown(bar)}" for name, bar in result.get("bars", {}).items()]
    if "lost" in result:
        parts.append(f"best is {result['best']}, the table's {result['choice']} loses {result['lost']:.1%}")
    parts += [f"{result[unit]:.4g} {unit}" for unit in ("bytes_per_second", "operations_per_second") if unit in result]
    parts += [f"{name} failed" for name in result.get("errors", {})]
    parts += [f"{result['unpacked']} kernels"] if "unpacked" in result else []
    for kernel, counters in result.get("counters", {}).items():
        parts.append(f"{kernel} ({', '.join(f'{name} {value}' for name, value in counters.items())})")
    return ", ".join(parts) or "measured"


def render(data: Mapping[str, Any]) -> str:
    """Return a summary of all results as text."""
    facts = data["machine"]
    marks = ["DRY RUN, these times mean nothing"] if data["dry_run"] else []
    marks += [f"CORRECTNESS GATES FAILED: {'; '.join(failed)}"] if (failed := _failed_gates(data)) else []
    lines = [f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, commit {data['commit']}", *marks]
    if found := data.get("kernels"):
        others = ", ".join(f"{count} {name}" for name, count in found["compiled"].items())
        lines.append(f"kernels: {found['hits']} from the cache; compiled here: {others or 'none'}")
    for name, stage in data["stages"].items():
        cases = stage["cases"]
        lines += ["", f"{name}: {stage['about']} ({len(cases)} cases, {stage['seconds']:.0f} s)"]
        lines += [f"  note: {note}" for note in stage["notes"]]
        if name == (linear.FIRST if linear.FIRST in data["stages"] else linear.REST):
            lines += _grid(_measured(data, linear.FIRST, linear.REST), _linear_cell)
        elif name == linear.AUTOTUNED:
            lines += _grid(_measured(data, name), _linear_cell)
        elif name == candidates.NAME:
            lines += _grid(_measured(data, name), _candidate_cell)
        if name in (linear.FIRST, linear.REST, linear.AUTOTUNED, candidates.NAME):
            cases = {case: result for case, result in cases.items() if "error" in result or result.get("errors")}
        lines += [f"  {case}: {in_words(result)}" for case, result in cases.items()]
        lines += [
            f"    {kind}: {test}" for result in cases.values() for kind in _UNWELL for test in result.get(kind, [])
        ]
        if stage["left_out"]:
            lines.append(f"  left out: {', '.join(stage['left_out'])}")
    lines += predictions.lines(data)
    lines += ["", _met(data)]
    return "\n".join(lines)


def markdown(data: Mapping[str, Any]) -> str:
    """Return the main results of a day as Markdown: linear layers, and a decoded token."""
    facts = data["machine"]
    versions = f"torch {facts['torch']}, Triton {facts['triton']}, driver {facts['driver']}, {facts['date']}"
    parts = [f"**{facts['device']}**, commit {data['commit']}. {versions}; {_met(data)}."]
    predicted = data.get("predicted", {"linear": {}, "decode": {}})
    cells, bars_of = {}, list[str]()
    for name, case in predictions.cases_of(data, linear.FIRST, linear.REST):
        bars_of = max(bars_of, list(case["bars"]), key=len)
        expected = predicted["linear"].get(name)
        cells[case["m"], case["shape"]] = _linear_cell(case) + (f" ({expected['ratio']:.2f})" if expected else "")
    if cells:
        note = "in brackets, the prediction; " if predicted["linear"] else ""
        parts.append(
            f"One linear layer against the fastest bfloat16 `F.linear`: {' / '.join(bars_of)} ({note}✗: below the bar)."
        )
        header, *rows = _rows(cells)
        parts.append(tables.markdown(rows, header, left=0))
    for case in _measured(data, decode.NAME):
        layers = case["sizes"]["layers"]
        rates = [
            [name, f"{rate:.1f}", f"{1e3 * case['medians'][name]:.2f}"]
            for name, rate in case["tokens_per_second"].items()
        ]
        expected = predicted["decode"].get(str(layers))
        note = f" (predicted: {expected['ratio']:.2f})" if expected else ""
        ratio = case["ratios"][decode.OURS]["ratio"]
        parts.append(
            f"A Llama of {layers} layers, one token, batch 1: int8 is {ratio:.2f} times as fast as bfloat16{note}."
        )
        parts.append(tables.markdown(rates, ["", "tokens per second", "ms per token"]))
    return "\n\n".join(parts)


def plot(data: Mapping[str, Any], folder: Path) -> str:
    """Draw the plots of a day into a folder. Return why none were drawn; "" if they were."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: no plots were drawn"
    try:
        from matplotlib.figure import Figure

        for file, draw in ((SPEED_UPS, _speed_ups), (DECODING, _decoding)):
            figure = Figure(figsize=(7, 4), layout="constrained")
            if draw(data, figure.add_subplot()):
                figure.savefig(folder / file, dpi=110)
    except Exception as error:
        # Measurements matter more, and --report can draw the plots later.
        return f"the plots could not be drawn: {described(error)}"
    return ""


def _speed_ups(data: Mapping[str, Any], axes: Any) -> bool:
    cases = _measured(data, linear.FIRST, linear.REST)
    for shape in dict.fromkeys(case["shape"] for case in cases):
        chosen = sorted((case for case in cases if case["shape"] == shape), key=lambda case: case["m"])
        label = "{shape} {k}x{n}".format(**chosen[0])
        _line(axes, chosen, linear.OURS, marker=".", label=label)
    least = {m: bars.linear(m) for m in sorted({case["m"] for case in cases})}
    finish_speed_ups(axes, least, "times faster than the fastest bf16 F.linear", _title("int8 linear", data))
    axes.legend(fontsize=6, ncols=2)
    return bool(cases)


def finish_speed_ups(axes: Any, least: Mapping[int, float], ylabel: str, title: str) -> None:
    """Add bars by M, labels and a logarithmic axis to a plot of speed-ups over M."""
    axes.plot(list(least), list(least.values()), "k_", markersize=12, label="bar")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rows M")
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)


def _line(axes: Any, cases: Sequence[CaseResult], name: str, **style: Any) -> Any:
    """Draw ratios over M, with quartiles of the rounds' ratios as error bars."""
    points = [(case["m"], case["ratios"][name]) for case in cases if name in case["ratios"]]
    ratios = [found["ratio"] for _, found in points]
    # Both quartiles of the rounds' ratios may lie on one side of the ratio of the medians.
    below = [max(0.0, found["ratio"] - found["quartiles"][0]) for _, found in points]
    above = [max(0.0, found["quartiles"][1] - found["ratio"]) for _, found in points]
    return axes.errorbar([m for m, _ in points], ratios, [below, above], capsize=2, **style).lines[0]


def _decoding(data: Mapping[str, Any], axes: Any) -> bool:
    cases = _measured(data, decode.NAME)
    if not cases:
        return False
    rates = cases[-1]["tokens_per_second"]
    drawn = axes.bar(list(rates), list(rates.values()), color=["C0" if name == decode.OURS else "C7" for name in rates])
    axes.bar_label(drawn, fmt="%.1f")
    best = max(rate for name, rate in rates.items() if name != decode.OURS)
    axes.axhline(bars.DECODE * best, color="black", linestyle=":", linewidth=0.8, label=f"bar: {bars.DECODE:g} times")
    axes.set_ylabel("tokens per second, batch 1")
    axes.set_title(_title(f"Llama, {cases[-1]['sizes']['layers']} layers", data), fontsize=10)
    axes.legend(fontsize=7)
    return True


def _title(what: str, data: Mapping[str, Any]) -> str:
    return f"{'DRY RUN: ' if data['dry_run'] else ''}{what}, {data['machine']['device']}"


def _met(data: Mapping[str, Any]) -> str:
    met = [bar["met"] for stage in data["stages"].values() for bar in _bars(stage)]
    return f"{sum(met)} of {len(met)} bars are met"


def _measured(data: Mapping[str, Any], *stages: str) -> list[CaseResult]:
    return [case for _, case in predictions.cases_of(data, *stages)]


def _grid(cases: Sequence[CaseResult], cell: Callable[[CaseResult], str]) -> list[str]:
    """Return lines of a table of cases, by M and shape."""
    if not cases:
        return []
    rows = _rows({(case["m"], case["shape"]): cell(case) for case in cases})
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]


def _rows(cells: Mapping[tuple[int, str], str]) -> list[list[str]]:
    """Arrange cells by M and shape, with a header."""
    shapes = list(dict.fromkeys(shape for _, shape in cells))
    ms = sorted({m for m, _ in cells})
    return [["M", *shapes], *([str(m), *(cells.get((m, shape), "") for shape in shapes)] for m in ms)]


def _linear_cell(case: CaseResult) -> str:
    return " / ".join(tables.judged(f"{bar['value']:.2f}", bar["met"]) for bar in case["bars"].values())


def _candidate_cell(case: CaseResult) -> str:
    return "ok" if case["best"] == case["choice"] else f"{case['best']} ({case['lost']:+.1%})"


def _bars(stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [bar for case in stage["cases"].values() for bar in case.get("bars", {}).values()]


def _failed_gates(data: Mapping[str, Any]) -> list[str]:
    cases = data["stages"].get(GATES, {"cases": {}})["cases"]
    return [name for name, result in cases.items() if not result.get("passed")]


def passed(data: Mapping[str, Any]) -> bool:
    """Return whether all planned tests and gates passed, and models gave correct outputs with CUDA graphs."""
    for name in (GATES, checks.TESTS, checks.EXPORT_TESTS):
        stage = data["stages"].get(name, {"cases": {}, "left_out": []})
        if stage["left_out"] or not all(result.get("passed") for result in stage["cases"].values()):
            return False
    for name in (decode.NAME, exported.NAME):
        if any("error" in result for result in data["stages"].get(name, {"cases": {}})["cases"].values()):
            return False
    # There are no CUDA graphs on a CPU.
    needed = [decode.SIMILAR] if data["dry_run"] else [decode.SIMILAR, decode.SKIPPED]
    return all(case["bars"][bar]["met"] for case in _measured(data, decode.NAME) for bar in needed)
