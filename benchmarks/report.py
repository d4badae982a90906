"""Turns result files of the benchmarks into README's tables, and into plots.

python -m benchmarks.report benchmarks/results/*.json            # prints the tables
python -m benchmarks.report --write                              # README.md and the plots, from benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from benchmarks.bench_models import BASELINES, CPP_BASELINES, LLAMA, SMOLLM2

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- benchmarks: begin.*?-->\n)(.*?)(<!-- benchmarks: end -->)", re.DOTALL)
# How many times faster than the faster of float32 and bfloat16 `F.linear`, by M. No other M may be slower.
LINEAR_BARS = {1: 2.4, 4: 5.0, 8: 4.0, 32: 1.9, 128: 1.6, 512: 1.35}
# An output with a smaller cosine to float32's is another model's: its speed is shown, but nothing is compared with it.
SAME = 0.9


class Check(NamedTuple):
    """A comparison of two groups of variants, the best of each.

    Attributes:
        what: In words.
        model: Of which model.
        phase: "prefill" or "decode".
        ours: A regular expression of the variants' names, from their beginning.
        theirs: The same.
        bar: The least ratio that is good enough; None where there is none.
    """

    what: str
    model: str
    phase: str
    ours: str
    theirs: str
    bar: float | None


INT8 = "int8 "
PLAIN = f"({'|'.join(BASELINES)})$"
CPP_PLAIN = f"({'|'.join(CPP_BASELINES)})$"
CHECKS = [
    Check("decode, against Inductor", SMOLLM2, "decode", r"int8 \w+$", PLAIN, 1.3),
    Check("decode, `lm_head` and `cpp_wrapper`, against Inductor", SMOLLM2, "decode", ".*lm_head", PLAIN, 1.7),
    Check("decode, the same against `cpp_wrapper`", SMOLLM2, "decode", ".*lm_head", CPP_PLAIN, None),
    Check("prefill of 512 tokens, against Inductor", SMOLLM2, "prefill", INT8, PLAIN, 1.2),
    Check("decode, against bitsandbytes", SMOLLM2, "decode", INT8, "bitsandbytes", 5.0),
    Check("decode, against torchao", SMOLLM2, "decode", INT8, "torchao", 1.4),
    Check("decode, against llama.cpp", SMOLLM2, "decode", INT8, "llama.cpp", None),
    Check("prefill, against llama.cpp", SMOLLM2, "prefill", INT8, "llama.cpp", None),
    Check("decode, against Inductor float32", LLAMA, "decode", INT8, "float32$", 3.0),
    Check("decode, against Inductor bfloat16", LLAMA, "decode", INT8, "bfloat16$", 1.7),
]


def load(path: Path) -> dict[str, Any]:
    """Reads a result file."""
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def render(results: Iterable[dict[str, Any]]) -> str:
    """README's block: all tables of all result files, in their order."""
    return "\n\n".join(part for result in results for part in _parts(result))


def write(readme: Path, block: str) -> None:
    """Replaces what stands between the markers in README.

    Raises:
        ValueError: It has no markers.
    """
    text = readme.read_text()
    if not BLOCK.search(text):
        raise ValueError(f"{readme} has no '<!-- benchmarks: begin -->' and '<!-- benchmarks: end -->'")
    readme.write_text(BLOCK.sub(lambda found: f"{found[1]}{block}\n{found[3]}", text))


def plot(result: dict[str, Any], path: Path) -> bool:
    """Draws the speed-up over M of each shape, on a logarithmic axis.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    rows = _of_kind(result, "linear")
    if not rows:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for k, n in _shapes(rows):
        for dtype, style in (("float32", "-"), ("bfloat16", "--")):
            chosen = [row for row in rows if (row["k"], row["n"], row["dtype"]) == (k, n, dtype)]
            chosen.sort(key=lambda row: row["m"])
            color = f"C{_shapes(rows).index((k, n))}"
            ms, ratios = [row["m"] for row in chosen], [_ratio(row)["ratio"] for row in chosen]
            axes.plot(ms, ratios, style, color=color, marker=".", label=f"{k}x{n}, {dtype}")
    axes.plot(list(LINEAR_BARS), list(LINEAR_BARS.values()), "k_", markersize=12, label="bar")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rows M")
    axes.set_ylabel("times faster than the better F.linear")
    axes.set_title(f"int8 linear, {_kernel(result)}", fontsize=10)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=90)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="default: all of benchmarks/results")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md and draw the plots")
    chosen = parser.parse_args(arguments)
    paths = chosen.files or committed()
    block = render(load(path) for path in paths)
    if not chosen.write:
        print(block)
        return
    write(ROOT / "README.md", block)
    for path in paths:
        plot(load(path), path.with_suffix(".png"))


def committed() -> list[Path]:
    """The result files that README shows, in its order."""
    return sorted(RESULTS.glob("*.json"))


def _parts(result: dict[str, Any]) -> list[str]:
    parts = [f"**{_kernel(result)}**. {_facts(result)}"]
    linear, sweeps, models = (_of_kind(result, kind) for kind in ("linear", "sweep", "model"))
    if linear:
        parts.append(
            "One linear layer, times faster than the faster of float32 and bfloat16 `F.linear`, by the dtype of the "
            "activations (✗: below the bar):"
        )
        parts.append(_linear_table(linear))
    if sweeps:
        parts.append(_sweep(sweeps))
    for model in dict.fromkeys(row["model"] for row in models):
        chosen = {row["phase"]: row for row in models if row["model"] == model}
        parts.append(
            f"{model}, batch 1, one graph; tokens per second, and in brackets times faster than the faster of "
            "Inductor's float32 and bfloat16; last, the cosine between the output and float32's:"
        )
        parts.append(_model_table(chosen))
        notes = dict.fromkeys(note for row in chosen.values() for note in row["notes"])
        parts += [f"- {note}." for note in notes]
        if checks := _check_table(chosen, model):
            parts.append(checks)
    return parts


def _kernel(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['threads']} threads, kernel {machine['kernel']}"


def _facts(result: dict[str, Any]) -> str:
    machine = result["machine"]
    facts = [f"torch {machine['torch']} ({machine['torch_isa']})", f"Python {machine['python']}", machine["date"]]
    if environment := machine["environment"]:
        settings = " ".join(f"{name}={value}" for name, value in environment.items())
        facts.append(f"restricted by `{settings}`, the baselines too")
    for row in _of_kind(result, "model")[:1]:
        facts += [f"{name} {version}" for name, version in row["packages"].items()]
    shares = [row["others"] for row in result["benchmarks"] if row.get("others") is not None]
    if shares:
        share = f"{statistics.median(shares):.0%} (median over the cases; at most {max(shares):.0%})"
        facts.append(f"other processes had {share} of the CPU's time")
    return ", ".join(facts) + "."


def _linear_table(rows: list[dict[str, Any]]) -> str:
    shapes, dtypes = _shapes(rows), list(dict.fromkeys(row["dtype"] for row in rows))
    cells = {(row["m"], row["k"], row["n"], row["dtype"]): _ratio(row)["ratio"] for row in rows}
    columns = [(k, n, dtype) for k, n in shapes for dtype in dtypes]
    table = []
    for m in sorted({row["m"] for row in rows}):
        bar = LINEAR_BARS.get(m, 1.0)
        ratios = [cells.get((m, *column)) for column in columns]
        table.append([m, f"{bar:g}", *("" if ratio is None else _judged(ratio, bar) for ratio in ratios)])
    return _table(table, ["M", "bar", *(f"{k} x {n}, {dtype}" for k, n, dtype in columns)])


def _sweep(rows: list[dict[str, Any]]) -> str:
    slowest = []
    for row in rows:
        for dtype, ratios in row["ratios"].items():
            slowest += [(ratio, int(m), f"{row['k']} x {row['n']}", dtype) for m, ratio in ratios.items()]
    slowest.sort()
    ratio, m, shape, dtype = slowest[0]
    below = sum(one[0] < 1 for one in slowest)
    values = len({m for _, m, _, _ in slowest})
    return (
        f"Of {len(slowest)} cases with {values} values of M from 1 to {max(m for _, m, _, _ in slowest)}, {below} are "
        f"slower than the faster `F.linear`; the least ratio is {ratio:.2f} (M={m}, {shape}, {dtype})."
    )


def _model_table(phases: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name in next(iter(phases.values()))["medians"]:
        cells = []
        for row in phases.values():
            best = min(row["medians"][baseline] for baseline in BASELINES)
            seconds = row["medians"][name]
            cells.append(f"{_rate(row['tokens'] / seconds)} ({best / seconds:.2f})")
        similarity = next(iter(phases.values()))["similarity"].get(name)
        rows.append([name, *cells, "" if similarity is None else f"{similarity:.3f}"])
    return _table(rows, ["", *phases, "cosine"], left=1)


def _check_table(phases: dict[str, dict[str, Any]], model: str) -> str:
    rows = []
    for check in CHECKS:
        if check.model != model or check.phase not in phases:
            continue
        row = phases[check.phase]
        ours, theirs = (_best(row, pattern) for pattern in (check.ours, check.theirs))
        if ours is None or theirs is None:
            if check.bar is not None:
                rows.append([check.what, f"{check.bar:g}", "not measured", ""])
            continue
        ratio = row["medians"][theirs] / row["medians"][ours]
        bar = "" if check.bar is None else f"{check.bar:g}"
        rows.append([check.what, bar, _judged(ratio, check.bar or 0.0), f"{ours}; {theirs}"])
    return _table(rows, ["the best of int8", "bar", "times faster", "of which variants"], left=1) if rows else ""


def _best(row: dict[str, Any], pattern: str) -> str | None:
    medians: dict[str, float] = row["medians"]
    fits = [name for name in medians if re.match(pattern, name) and row["similarity"].get(name, 1.0) >= SAME]
    return min(fits, key=lambda name: medians[name], default=None)


def _judged(ratio: float, bar: float) -> str:
    return f"{ratio:.2f}" + (" ✗" if ratio < bar else "")


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _table(rows: list[list[Any]], headers: list[str], left: int = 0) -> str:
    align = ["left" if column < left else "right" for column in range(len(headers))]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def _of_kind(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for row in result["benchmarks"] if row.get("kind") == kind]


def _shapes(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return list(dict.fromkeys((row["k"], row["n"]) for row in rows))


def _ratio(row: dict[str, Any]) -> dict[str, Any]:
    ratio: dict[str, Any] = row["ratios"][f"int8 {row['dtype']}"]
    return ratio


if __name__ == "__main__":
    main()
