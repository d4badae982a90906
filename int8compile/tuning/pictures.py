"""Pictures of an evaluation: the error of each layer, and the outliers before and after the rotation."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from int8compile.config import default_threshold
from int8compile.errors import InputError
from int8compile.tuning.layers import Layer, Spread, depth_of

# Panels beside each other, and the size of one in inches.
_COLUMNS, _WIDTH, _HEIGHT = 3, 4.2, 2.9


def draw(layers: Mapping[str, Sequence[Layer]], spreads: Sequence[Spread], path: str | os.PathLike[str]) -> None:
    """Draw a PNG: a panel of errors for each candidate, and two of the largest activations.

    Args:
        layers: The layers by candidate.
        spreads: The largest activations of the linears.
        path: The file.

    Raises:
        InputError: matplotlib is not installed.
    """
    check_installed()
    from matplotlib.figure import Figure
    from PIL import Image

    compared: list[Layer | Spread] = [*itertools.chain(*layers.values()), *spreads]
    kinds = list(dict.fromkeys(layer.kind for layer in compared))
    lines = (len(layers) + _COLUMNS - 1) // _COLUMNS
    height = _HEIGHT * (lines + 1) + 0.3 * (2 + (len(kinds) + _COLUMNS) // _COLUMNS)
    figure = Figure(figsize=(_COLUMNS * _WIDTH, height), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(lines, 1.05))
    above, below = parts
    above.suptitle("Error of each layer's own output: signal-to-quantization-noise ratio, higher is nearer to float32")
    panels = above.subplots(lines, _COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    for place, (name, panel) in enumerate(zip(layers, panels, strict=False)):
        panel.set_title(name)
        _draw_lines(panel, {layer: layer.sqnr_db for layer in layers[name]}, kinds)
        if place % _COLUMNS == 0:
            panel.set_ylabel("SQNR [dB]")
        if place + _COLUMNS >= len(layers):
            panel.set_xlabel("layer of the model")
            panel.tick_params(labelbottom=True)
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    below.suptitle("Outliers: the largest activation that a layer reads, over the mean magnitude of its row")
    left, right = below.subplots(1, 2, sharex=True, sharey=True)
    for panel, rotated in ((left, False), (right, True)):
        panel.set_title("after the rotation" if rotated else "before the rotation")
        _draw_lines(panel, {each: each.rotated if rotated else each.plain for each in spreads}, kinds)
        threshold = default_threshold(rotated=rotated)
        panel.axhline(threshold, color="black", linestyle="--", linewidth=0.8)
        panel.annotate(
            f"larger: outliers (threshold {threshold:g})",
            (1, threshold),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
        panel.set_yscale("log")
        panel.set_xlabel("layer of the model")
    left.set_ylabel("largest / mean magnitude")
    handles = {line.get_label(): line for panel in (*panels, left) for line in panel.get_lines() if line.get_gid()}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=_COLUMNS, fontsize=8)
    figure.savefig(drawn := io.BytesIO(), dpi=80, format="png")
    # With few colors the file is a third as large. matplotlib needs Pillow itself.
    Image.open(drawn).convert("RGB").quantize(64).save(path, format="png", optimize=True)


def check_installed() -> None:
    """Raise `InputError` if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('matplotlib is not installed; run `pip install "int8compile[plots]"`')


def _draw_lines(panel: Any, values: Mapping[Layer | Spread, float], kinds: Sequence[str]) -> None:
    """Draw one line for each kind of layer over depth."""
    for number, kind in enumerate(kinds):
        points = [(depth_of(layer.path), value) for layer, value in values.items() if layer.kind == kind]
        # A point for a kind that occurs once.
        style = {"marker": "o", "markersize": 2.5 if len(points) > 1 else 6, "linewidth": 1.2}
        if points:
            panel.plot(*zip(*points, strict=True), label=kind, gid=kind, color=f"C{number % 10}", **style)
    panel.grid(alpha=0.3)
