"""Every configuration that the kernels' table has for a product, so that its order can be corrected."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from benchmarks.gpu import inputs
from benchmarks.gpu.clock import Call, Clock, described_times
from benchmarks.gpu.day import CaseResult, Stage
from benchmarks.gpu.linear import THRESHOLD, product_call
from benchmarks.gpu.sizes import Shape, Sizes
from int8compile.ops import quantize_rows
from int8compile.ops.quantized import NONE, empty_result
from int8compile.triton_kernels import tables
from int8compile.triton_kernels.tables import Architecture, Config

NAME = "candidates"
# A dry run goes through this one's table.
DRY_RUN = "sm_90"


def stage(sizes: Sizes, clock: Clock, device: torch.device, l2_bytes: int) -> Stage:
    """The table's candidates of each bucket and shape."""
    arch, multiprocessors = _of(device)
    cases = {}
    if arch is not None and arch.instruction:
        cases = {
            f"M={m} {shape}": functools.partial(case, sizes, clock, device, l2_bytes, arch, multiprocessors, shape, m)
            for m in sizes.candidate_rows
            for shape in sizes.shapes
        }
    return Stage(
        NAME,
        "quantized_linear (threshold 12, activations without outliers) with each configuration of the table, also with "
        "the splits that it would have if it were the only one",
        seconds=70,
        cases=cases,
        notes=[] if cases else ["there are no kernels for int8 activations on this GPU"],
    )


def case(
    sizes: Sizes,
    clock: Clock,
    device: torch.device,
    l2_bytes: int,
    arch: Architecture,
    multiprocessors: int,
    shape: Shape,
    m: int,
) -> CaseResult:
    """One shape with one number of rows."""
    qweight, scale, d = inputs.quantized(inputs.weight(shape.k, shape.n, device))
    x = quantize_rows(inputs.activations(m, shape.k, device), d, THRESHOLD)
    qweights = inputs.copies(qweight, l2_bytes)
    configs = configs_of(arch, m, shape, multiprocessors)
    if sizes.dry_run:
        calls = {str(config): [product_call(x, one, scale) for one in qweights] for config in configs}
    else:
        calls = {str(config): _launches(x, qweights, scale, config) for config in configs}
    measured = clock.times(calls, sizes.rounds)
    table = tables.candidates(arch, m, shape.k)
    choice = str(tables.choose(table, m, shape.n, shape.k, multiprocessors))
    times = measured.needed(choice)
    best = times.fastest(times.seconds)
    return {
        "shape": shape.name,
        "k": shape.k,
        "n": shape.n,
        "m": m,
        "bucket": tables.bucket_of(m),
        **described_times(measured, [choice]),
        "choice": choice,
        "best": best,
        "lost": float(f"{times.ratio(best, choice) - 1:.3g}"),
    }


def configs_of(arch: Architecture, m: int, shape: Shape, multiprocessors: int) -> list[Config]:
    """Return the table's configurations for a product: each with the splits that it would have, and without."""
    found: dict[Config, None] = {}
    for config in tables.candidates(arch, m, shape.k):
        chosen = tables.choose((config,), m, shape.n, shape.k, multiprocessors)
        found |= {chosen: None, dataclasses.replace(chosen, splits=1): None}
    # What the table chooses may have splits because of the others.
    found[tables.choose(tables.candidates(arch, m, shape.k), m, shape.n, shape.k, multiprocessors)] = None
    return list(found)


def _of(device: torch.device) -> tuple[Architecture | None, int]:
    """The table of a device, and its multiprocessors."""
    if device.type != "cuda":
        return tables.ARCHITECTURES[DRY_RUN], 132
    # It imports Triton, which need not be there for a dry run.
    from int8compile.triton_kernels import operators

    index = torch.cuda.current_device()
    return operators.architecture(index), operators.multiprocessors(index)


def _launches(x: tuple[Tensor, Tensor, Tensor], qweights: list[Tensor], scale: Tensor, config: Config) -> list[Call]:
    from int8compile.triton_kernels.operators import launch_of
    from int8compile.triton_kernels.product import Product

    # All write to one result: a model's are in the L2 cache as well.
    y = empty_result(x[0], qweights[0], NONE, 0, torch.bfloat16)
    products = [Product(*x, one, scale, None, y, activation=NONE, n0=0, n1=0) for one in qweights]
    return [launch_of(product, config).run for product in products]
