"""Every configuration that the kernels' table has for a product, so that its order can be corrected."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.gpu import inputs
from benchmarks.gpu.clock import Call, Clock, described_times
from benchmarks.gpu.day import CaseResult, Stage
from benchmarks.gpu.linear import THRESHOLD, product_call
from benchmarks.gpu.sizes import Shape, Sizes
from int8compile.ops import quantize_rows, quantize_weight
from int8compile.ops.digits import NONE, Activations
from int8compile.ops.quantized import empty_result
from int8compile.triton_kernels import tables
from int8compile.triton_kernels.policy import Policy
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
        f"quantized_linear (threshold 6, row policy; {sizes.outlier_columns} outlier columns in the activations) with "
        "each configuration of the table",
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
    # As a language model's lie: anywhere, outliers would take most of the time of many rows, and decide the order.
    given = inputs.with_outlier_columns(m, shape.k, sizes.outlier_columns, device)
    x = Activations(*quantize_rows(given, THRESHOLD, False))
    qweight, scale = quantize_weight(inputs.weight(shape.k, shape.n, device))
    qweights = inputs.copies(qweight, l2_bytes)
    policy = Policy.of(m, shape.k, x.digits.shape[0], THRESHOLD, False, arch)
    configs = tables.candidates(arch, m, shape.k, lists=policy.lists)
    if sizes.dry_run:
        calls = {str(config): [product_call(x, one, scale, THRESHOLD) for one in qweights] for config in configs}
    else:
        calls = {str(config): _launches(x, qweights, scale, policy, config) for config in configs}
    measured = clock.times(calls, sizes.rounds)
    choice = str(tables.choose(configs, m, shape.n, multiprocessors))
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


def _of(device: torch.device) -> tuple[Architecture | None, int]:
    """The table of a device, and its multiprocessors."""
    if device.type != "cuda":
        return tables.ARCHITECTURES[DRY_RUN], 132
    # It imports Triton, which need not be there for a dry run.
    from int8compile.triton_kernels import operators

    index = torch.cuda.current_device()
    return operators.architecture(index), operators.multiprocessors(index)


def _launches(x: Activations, qweights: list[Tensor], scale: Tensor, policy: Policy, config: Config) -> list[Call]:
    from int8compile.triton_kernels.operators import launch_of
    from int8compile.triton_kernels.product import Product

    # All write to one result: a model's are in the L2 cache as well.
    y = empty_result(x.planes, qweights[0], NONE, 0, torch.bfloat16)
    products = [
        Product(x=x, qweight=one, scale=scale, bias=None, y=y, activation=NONE, n0=0, n1=0, policy=policy)
        for one in qweights
    ]
    return [launch_of(product, config).run for product in products]
