"""All configurations in the kernels' table for a product, to correct the table's order."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from benchmarks.gpu import inputs
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import Call, described_times
from benchmarks.gpu.day import CaseResult, Stage
from benchmarks.gpu.linear import THRESHOLD, product_call
from benchmarks.gpu.sizes import Shape
from benchmarks.interleaved import rounded
from int8compile.ops import quantize_rows
from int8compile.ops.quantized import NONE, empty_result
from int8compile.triton_kernels import tables
from int8compile.triton_kernels.tables import Architecture, Config

NAME = "candidates"
# Architecture whose table a dry run uses.
DRY_RUN = "sm_90"


def stage(bench: Bench) -> Stage:
    """Return the stage: the table's candidates for each bucket and shape."""
    arch, multiprocessors = _of(bench.device)
    cases = {}
    if arch is not None and arch.matrix_instruction:
        cases = bench.cases(bench.sizes.candidate_rows, functools.partial(case, bench, arch, multiprocessors))
    return Stage(
        NAME,
        "quantized_linear (threshold 12, activations without outliers) with each configuration of the table, also with "
        "the splits it has as the only candidate",
        seconds=70,
        cases=cases,
        notes=[] if cases else ["there are no kernels for int8 activations on this GPU"],
    )


def case(bench: Bench, arch: Architecture, multiprocessors: int, shape: Shape, m: int) -> CaseResult:
    """Measure a shape with a number of rows."""
    qweight, scale, d = inputs.quantized(inputs.weight(shape.k, shape.n, bench.device))
    x = quantize_rows(inputs.activations(m, shape.k, bench.device), d, THRESHOLD)
    qweights = inputs.copies(qweight, bench.l2_bytes)
    configs = configs_of(arch, m, shape, multiprocessors)
    if bench.sizes.dry_run:
        calls = {str(config): [product_call(x, one, scale) for one in qweights] for config in configs}
    else:
        calls = {str(config): _launches(x, qweights, scale, config) for config in configs}
    measured = bench.clock.times(calls, bench.sizes.rounds)
    table = tables.candidates(arch, m, shape.k)
    choice = str(tables.choose(table, m, shape.n, shape.k, multiprocessors))
    times = measured.needed(choice)
    best = times.fastest(times.seconds)
    return {
        **shape.facts(m),
        "bucket": tables.bucket_of(m),
        **described_times(measured, [choice]),
        "choice": choice,
        "best": best,
        "lost": rounded(times.ratio(best, choice) - 1, 3),
    }


def configs_of(arch: Architecture, m: int, shape: Shape, multiprocessors: int) -> list[Config]:
    """Return the table's configurations for a product, each without splits and with those of an only candidate."""
    found: dict[Config, None] = {}
    for config in tables.candidates(arch, m, shape.k):
        chosen = tables.choose((config,), m, shape.n, shape.k, multiprocessors)
        found |= {chosen: None, dataclasses.replace(chosen, splits=1): None}
    # The table's choice may have other splits because of the other candidates.
    found[tables.choose(tables.candidates(arch, m, shape.k), m, shape.n, shape.k, multiprocessors)] = None
    return list(found)


def _of(device: torch.device) -> tuple[Architecture | None, int]:
    """Return the architecture of a device, and the number of its multiprocessors."""
    if device.type != "cuda":
        return tables.ARCHITECTURES[DRY_RUN], 132
    # Imported here, since it needs Triton and a dry run does not.
    from int8compile.triton_kernels import operators

    index = torch.cuda.current_device()
    return operators.architecture(index), operators.multiprocessors(index)


def _launches(x: tuple[Tensor, Tensor, Tensor], qweights: list[Tensor], scale: Tensor, config: Config) -> list[Call]:
    from int8compile.triton_kernels.operators import launch_of
    from int8compile.triton_kernels.product import Product

    # All calls write to one result, which stays in the L2 cache as in a model.
    y = empty_result(x[0], qweights[0], NONE, 0, torch.bfloat16)
    products = [Product(*x, one, scale, None, y, activation=NONE, n0=0, n1=0) for one in qweights]
    return [launch_of(product, config).run for product in products]
