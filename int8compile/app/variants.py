"""Ways to run a model, each in a process of its own: `python -m int8compile.app.variants JOB` for `app.speed`.

The process loads the model, compiles it, and prints a line of JSON with what that took. Then it answers each line on
stdin, the name of a case, with the seconds of a call.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from int8compile.app import loading
from int8compile.app.machine import STATUS, read_bytes
from int8compile.config import Int8Config
from int8compile.errors import Int8Warning, ModelError, first_line
from int8compile.exporting.exporter import export
from int8compile.exporting.package import inspect, load_exported
from int8compile.stored.convert import memory_footprint
from int8compile.timing import timed
from int8compile.tuning import peers

# Tokens that the cache has room for after the prompt; every step reads the whole cache.
ROOM = 64
# A turn is the median of at most this many calls, or of as many as fit into this many seconds.
CALLS, SECONDS = 5, 0.2
DECODE, FORWARD = "decode", "forward"
PREFILL = "prompt"

_CPP = {"cpp_wrapper": True}
_INT8 = {"backend": "int8"}
_HEAD = {"backend": "int8", "options": {"lm_head": "int8_weight", "inductor": _CPP}}


class Variant(NamedTuple):
    """A way to run a model.

    Attributes:
        dtype: The dtype of its float parts.
        compiler: Arguments of torch.compile.
        quantized: The key of `_PEERS`, or "int8compile", that quantizes the loaded model; "" for none.
        exported: Whether it runs from a file of `int8compile.export`.
        package: The package that it needs; "" for none.
    """

    dtype: str
    compiler: Mapping[str, Any]
    quantized: str = ""
    exported: bool = False
    package: str = ""


VARIANTS = {
    "float32": Variant("float32", {}),
    "bfloat16": Variant("bfloat16", {}),
    "int8 float32": Variant("float32", _INT8),
    "int8 bfloat16": Variant("bfloat16", _INT8),
    "int8 bfloat16, lm_head, cpp_wrapper": Variant("bfloat16", _HEAD),
    "int8 bfloat16, quantize_": Variant("bfloat16", _INT8, quantized="int8compile"),
    "int8 bfloat16, exported": Variant("bfloat16", {}, exported=True),
    "bitsandbytes bfloat16": Variant("bfloat16", {}, quantized="bitsandbytes", package="bitsandbytes"),
    "torchao weight-only bfloat16": Variant("bfloat16", {}, quantized="torchao weight-only", package="torchao"),
    "torchao dynamic bfloat16": Variant("bfloat16", {}, quantized="torchao dynamic", package="torchao"),
}
_PEERS: dict[str, Callable[[Any], Any]] = {
    "bitsandbytes": peers.with_bitsandbytes,
    "torchao weight-only": lambda model: peers.with_torchao(model, dynamic=False),
    "torchao dynamic": lambda model: peers.with_torchao(model, dynamic=True),
}


class Job(NamedTuple):
    """A model, a variant and the sizes that a process has to run.

    Attributes:
        model: The model's name, as for `loading.load`.
        variant: A key of `VARIANTS`.
        batches: The numbers of texts, or of other inputs, at a time.
        prompt: The number of tokens of a text.
        kind: "decode" for a language model that generates, "forward" for one call of any model; "" to find out.
        outputs: The file that the outputs of the first calls are written to, by case.
        package: For the exported variant, the file to write or to run.
    """

    model: str
    variant: str
    batches: Sequence[int]
    prompt: int
    kind: str
    outputs: str
    package: str = ""


class Ready(NamedTuple):
    """A model that is ready to run.

    Attributes:
        calls: By case, a call that returns a tensor.
        load: Seconds to load it, and to quantize it.
        weights: Bytes of its weights; None if they cannot be counted. To be called after the model has run.
        kind: See `Job`.
        note: Why not all cases run; "" if they do.
    """

    calls: dict[str, Callable[[], Tensor]]
    load: float
    weights: Callable[[], int | None]
    kind: str
    note: str = ""


def main() -> None:
    """Run the job in the process's argument."""
    job = Job(**json.loads(sys.argv[1]))
    if VARIANTS[job.variant].exported and not Path(job.package).exists():
        serve(lambda: write_package(job))
    else:
        serve(lambda: prepare(job), job.outputs)


def serve(make: Callable[[], Any], outputs: str = "") -> None:
    """Make a model, print what that took, then answer each line on stdin with the seconds of that case.

    An error is printed, too.

    Args:
        make: Returns a `Ready`, or the answer itself and there is nothing to run.
        outputs: The file for the outputs of the first calls.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.no_grad():
                made = make()
                answer = _first_calls(made, outputs) if isinstance(made, Ready) else made
        except Exception as error:
            text = first_line(error)
            if not isinstance(error, ModelError):
                text = f"{type(error).__name__}: {text}"
            _say({"error": text, "model": isinstance(error, ModelError)})
            return
    # Warnings of this package say that something is slower or less exact than it should be; others are not our topic.
    own = [first_line(each.message) for each in caught if isinstance(each.message, Int8Warning)]
    _say({**answer, "warnings": list(dict.fromkeys(own))})
    if not isinstance(made, Ready):
        return
    with torch.no_grad():
        for line in sys.stdin:
            call = made.calls[line.strip()]
            # The untimed call reads the weights that the process before has evicted.
            call()
            seconds = [timed(call)]
            while len(seconds) < CALLS and sum(seconds) < SECONDS:
                seconds.append(timed(call))
            _say({"seconds": statistics.median(seconds), "cpu": sum(os.times()[:2])})


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(answer)}\n")
    sys.stdout.flush()


def prepare(job: Job) -> Ready:
    """Load the model of a job and set it up to be called.

    Raises:
        ModelError: It cannot be loaded, or it is int8 already.
    """
    # Imports are not part of loading, and the kernel is built once for all programs.
    from int8compile import cpu
    from int8compile.integrations.decoder import StaticCacheDecoder

    cpu.available()
    variant = VARIANTS[job.variant]
    if variant.exported:
        return _exported(job)
    began = time.perf_counter()
    model: Any = _load(job, variant)
    seconds = time.perf_counter() - began
    weights = _counting(model)
    kind, note = job.kind, ""
    if kind != FORWARD and loading.is_causal(model):
        try:
            # The float variants, which come first, are checked.
            decoder = StaticCacheDecoder(model, job.prompt + ROOM, check=variant.quantized not in _PEERS)
        except ModelError as error:
            if kind:
                raise
            note = f"forward passes are timed, since it cannot generate with a cache of fixed size: {error}"
        else:
            call = torch.compile(decoder, fullgraph=True, **variant.compiler)
            vocabulary = model.config.get_text_config(decoder=True).vocab_size
            calls = decoding(call, decoder.new_cache(), vocabulary, job.batches, job.prompt)
            return Ready(calls, seconds, weights, DECODE)
    inputs = {batch: loading.example_inputs(model, batch, job.prompt) for batch in job.batches}
    if not kind:
        loading.check_runs(model, inputs[min(inputs)])
    compiled: Any = torch.compile(model, **variant.compiler)
    calls = {case(batch): _forward(compiled, **given) for batch, given in inputs.items()}
    return Ready(calls, seconds, weights, FORWARD, note)


def _forward(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
    return lambda: first_tensor(call(*args, **kwargs))


def case(batch: int) -> str:
    """Return the name of the case with a batch."""
    return f"batch {batch}"


def decoding(
    call: Callable[..., Any], cache: list[Tensor], vocabulary: int, batches: Sequence[int], prompt: int
) -> dict[str, Callable[[], Tensor]]:
    """Return calls that read a random prompt, and that generate the token after it.

    Every row of a batch has the same prompt, but a token of its own after it.

    Args:
        call: Maps ids [B, S], the number of tokens in the cache, and the cache to logits [B, vocabulary].
        cache: An empty cache for one text.
        vocabulary: The number of tokens that the model knows.
        batches: The numbers of texts at a time.
        prompt: The number of tokens of the prompt.
    """
    ids, tokens = random_tokens(vocabulary, max(batches, default=0), prompt)
    zero, start = torch.tensor(0), torch.tensor(prompt)

    def generate(batch: int) -> Callable[[], Tensor]:
        copies: list[Tensor] = []

        def step() -> Tensor:
            if not copies:  # After the prompt was read.
                copies.extend(each.repeat(batch, 1, 1, 1) for each in cache)
            result: Tensor = call(tokens[:batch], start, copies)
            return result

        return step

    return {PREFILL: lambda: call(ids, zero, cache), **{case(batch): generate(batch) for batch in batches}}


def random_tokens(vocabulary: int, rows: int, prompt: int) -> tuple[Tensor, Tensor]:
    """Return a prompt and the tokens after it, the same in every process. Shapes: [1, prompt] and [rows, 1]."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(0, vocabulary, size, generator=generator) for size in ((1, prompt), (rows, 1)))  # type: ignore[return-value]


def write_package(job: Job) -> dict[str, Any]:
    """Export the model of a job to its file, and beside it what a process needs to call it."""
    variant = VARIANTS[job.variant]
    model: Any = _load(job, variant)
    began = time.perf_counter()
    if job.kind == DECODE:
        from int8compile.integrations.decoder import StaticCacheDecoder

        # For one text: torch.export finds that code for several cannot also run one.
        decoder = StaticCacheDecoder(model, job.prompt + ROOM)
        made = loading.Exportable(decoder, *decoder.example())
        needed: Any = (decoder.new_cache(), model.config.get_text_config(decoder=True).vocab_size)
    else:
        made = loading.exportable(model)
        needed = {}
        for batch in job.batches:
            inputs = loading.example_inputs(model, batch, job.prompt)
            needed[batch] = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
            if "attention_mask" in made.args[0]:
                needed[batch]["attention_mask"] = torch.ones_like(inputs["input_ids"])
    export(made.model, made.args, job.package, dynamic_shapes=made.dynamic_shapes)
    seconds = time.perf_counter() - began
    torch.save(needed, f"{job.package}.inputs")
    return {"compile": seconds}


def _exported(job: Job) -> Ready:
    needed: Any = torch.load(f"{job.package}.inputs")
    began = time.perf_counter()
    call: Any = load_exported(job.package)
    seconds = time.perf_counter() - began
    inside = inspect(job.package).metadata["bytes"]
    if job.kind == DECODE:
        cache, vocabulary = needed
        calls = decoding(call, cache, vocabulary, [batch for batch in job.batches if batch == 1], job.prompt)
    else:
        calls = {case(batch): _forward(call, given) for batch, given in needed.items()}
    note = (
        "exported for one text at a time, so larger batches are not measured"
        if len(calls) - 1 < len(job.batches) and job.kind == DECODE
        else ""
    )
    return Ready(calls, seconds, lambda: int(inside["int8"] + inside["float"]), job.kind, note)


def _load(job: Job, variant: Variant) -> Any:
    held = Int8Config() if variant.quantized == "int8compile" else None
    model: Any = loading.load(job.model, getattr(torch, variant.dtype), held)
    if held is None and (about := getattr(model.config, "quantization_config", None)):
        raise ModelError(f"{job.model!r} is quantized already: {about}; give the float model")
    if variant.quantized in _PEERS:
        model = _PEERS[variant.quantized](model)
    return model.requires_grad_(False)


def _first_calls(made: Ready, outputs: str) -> dict[str, Any]:
    """Call each case once, which compiles it, and return what the process took so far."""
    began = time.perf_counter()
    found = {name: call().detach().float().clone() for name, call in made.calls.items()}
    seconds = time.perf_counter() - began
    torch.save(found, outputs)
    # Inductor's compiler processes would stay. Where nothing was compiled, its module was not imported.
    if compiling := sys.modules.get("torch._inductor.async_compile"):
        compiling.shutdown_compile_workers()
    return {
        "cases": list(made.calls),
        "kind": made.kind,
        "note": made.note,
        "load": made.load,
        "compile": seconds,
        "peak": peak_memory(),
        "weights": made.weights(),
    }


def _counting(model: Any) -> Callable[[], int | None]:
    def count() -> int | None:
        try:
            return memory_footprint(model)
        except (RuntimeError, NotImplementedError, AttributeError):  # Some libraries' tensors have no storage.
            return None

    return count


def peak_memory() -> int | None:
    """Return the most memory that this process has had resident, in bytes; None if the system does not tell.

    `ru_maxrss` would include the memory of the process that started this one.
    """
    return read_bytes(STATUS, "VmHWM")


def first_tensor(output: Any) -> Tensor:
    """Return the first float tensor of a model's output."""
    values = output.values() if isinstance(output, Mapping) else output
    for value in [values] if isinstance(values, Tensor) else values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ModelError(f"the output of the model, {type(output).__name__}, holds no float tensor")


if __name__ == "__main__":
    main()
