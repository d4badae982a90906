"""A language model that generates a token at a time, compiled in bfloat16 and in int8."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.gpu import bars, ceilings
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import Call, described_times
from benchmarks.gpu.day import CaseResult, Stage
from benchmarks.gpu.linear import Ceilings
from benchmarks.gpu.llama import Llama
from benchmarks.interleaved import rounded

NAME = "decode"
# Layers of the model: as many as compile twice in a minute. A layer runs the same kernels in any model.
LAYERS = 8
OURS = "int8"
SKIPPED, SIMILAR = "skipped CUDA graphs", "cosine to bfloat16"
# Number of profiled steps, and of kernels in the result.
PROFILED, MOST_KERNELS = 10, 16
# With a smaller cosine to bfloat16's, the output is wrong.
SAME = 0.9


class Decoders:
    """The model and its compiled variants, made at first use; `measured` returns the results of `ceilings`."""

    def __init__(self, bench: Bench, measured: Ceilings) -> None:
        self._sizes, self._clock, self._device, _ = bench
        self._measured = measured
        self._variants: dict[str, Any] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._model: Llama | None = None

    def case(self, names: tuple[str, ...]) -> CaseResult:
        """Compare int8 with baselines, in turns."""
        calls: dict[str, list[Call]] = {name: self._steps(name) for name in (*names, OURS)}
        measured = self._clock.times(calls, self._sizes.rounds, eager=tuple(calls))
        times = measured.needed(*calls)
        best = times.fastest(names)
        outputs = {name: self._step(name).float().flatten() for name in calls}
        similarity = float(torch.cosine_similarity(outputs[OURS], outputs[names[0]], dim=0))
        return {
            "sizes": vars(self._sizes.llama),
            **described_times(measured, names),
            "tokens_per_second": {name: round(1 / times.median(name), 2) for name in calls},
            "roofline_share": self._roofline({name: times.median(name) for name in calls}),
            "compiled": {name: self._facts[name] for name in calls},
            "similarity": round(similarity, 5),
            "kernels": {name: self._kernels(name) for name in calls},
            "bars": {
                # Without graphs, the time is that of the host and not of the kernels.
                SKIPPED: bars.at_most(self._facts[OURS]["skipped_cuda_graphs"], 0),
                "times faster": bars.at_least(times.ratio(OURS, best), bars.DECODE),
                SIMILAR: bars.at_least(similarity, SAME),
            },
        }

    def close(self) -> None:
        """Free the memory."""
        self._variants.clear()
        self._model = None
        torch._dynamo.reset()

    def _steps(self, name: str) -> list[Call]:
        if name not in self._variants:
            self._compile(name)
        return [lambda: self._step(name)] * self._sizes.steps

    def _step(self, name: str) -> Tensor:
        # CUDA graphs may now overwrite the output of the step before.
        torch.compiler.cudagraph_mark_step_begin()
        output: Tensor = self._variants[name](self._ids, self._positions)
        return output

    def _compile(self, name: str) -> None:
        if self._model is None:
            self._model = Llama(self._sizes.llama, self._device)
            self._ids = torch.tensor([[self._sizes.llama.vocabulary // 2]], device=self._device)
            self._positions = torch.tensor([self._sizes.llama.length // 2], device=self._device)
        how = self._sizes.int8_decoder if name == OURS else self._sizes.decoders[name]
        skipped, began = _skipped_graphs(), time.perf_counter()
        self._variants[name] = torch.compile(self._model, fullgraph=True, dynamic=False, **how)
        for _ in range(4):  # The second call records CUDA graphs, later calls replay them.
            self._step(name)
        self._clock.synchronize()
        self._facts[name] = {
            "seconds": round(time.perf_counter() - began, 1),
            "skipped_cuda_graphs": _skipped_graphs() - skipped,
        }

    def _kernels(self, name: str) -> dict[str, float]:
        """Return the microseconds of a step by kernel, of the slowest kernels; nothing on a CPU."""
        if self._device.type != "cuda":
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(PROFILED):
                self._step(name)
            self._clock.synchronize()
        found = {event.key[:80]: event.self_device_time_total / PROFILED for event in profile.key_averages()}
        most = sorted(found, key=lambda key: -found[key])[:MOST_KERNELS]
        return {key: round(found[key], 2) for key in most}

    def _roofline(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Return the share of a token's time that the roofline needs to read the weights once."""
        assert self._model is not None
        head = self._model.lm_head.weight.numel()
        layers = sum(each.numel() for each in self._model.layers.parameters())
        shares = {}
        for name, taken in seconds.items():
            kind, itemsize = ("int8", 1) if name == OURS else ("bf16", 2)
            nbytes, operations = itemsize * layers + 2 * head, 2 * (layers + head)
            least = ceilings.floor(self._measured(), nbytes, operations, kind)
            if least is not None:
                shares[name] = rounded(least / taken, 3)
        return shares


def stage(bench: Bench, measured: Ceilings) -> Stage:
    """Return the stage: one token at batch 1."""
    decoders = Decoders(bench, measured)
    names = tuple(bench.sizes.decoders)
    return Stage(
        NAME,
        f"Llama of {bench.sizes.llama.layers} layers with random weights, batch 1, one token",
        seconds=90,
        cases={", ".join(names): lambda: decoders.case(names)},
        expected=60,
        close=decoders.close,
    )


def _skipped_graphs() -> int:
    return int(counters["inductor"]["cudagraph_skips"])
