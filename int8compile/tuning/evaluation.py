"""`evaluate()`: how far a model's candidates, in int8 and other formats, are from the model in float32."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from int8compile.errors import InputError, Int8CompileError, ModelError, first_line, listed
from int8compile.observation import args_in, buffers_restored, check_has_data, dtype_of, model_in, plain
from int8compile.progress import progress_bar
from int8compile.report import Report
from int8compile.sites import SkipReason
from int8compile.stored.convert import dequantize_, memory_footprint, report
from int8compile.stored.modules import Int8Module
from int8compile.tuning.calibration import NO_BATCH, arguments, as_batches, takes_tokens
from int8compile.tuning.candidates import FLOAT, Candidate, chosen
from int8compile.tuning.layers import Layer, Observed, Spread

# Elements of logits to compare at once: in float64 they take 2 MB, which a cache holds. 64 times as many take four
# times as long.
_AT_ONCE = 2**18
# On fewer positions, means are too uncertain to choose by.
FEW = 256
# Why a linear that torch.compile may rewrite is not converted by `quantize_`.
HIDDEN = (SkipReason.MODULE, SkipReason.HOOKED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The distance of a candidate from the model in float32. A value is NaN where the candidate's output has NaN.

    Attributes:
        kl: Mean over positions of KL(float32 || candidate), in nats; None for a model without logits.
        kl_error: The standard error of that mean, from the sums of the batches; None for a single batch.
        kl_by_batch: The mean of each batch; () for a model without logits.
        top1: The share of positions whose most likely class or token is the same; None for a model without logits.
        perplexity: The candidate's perplexity of the next token; None for a model that does not predict it.
        error: The norm of the difference of the outputs over the norm of the float32 outputs, as the mean over the
            tensors of an output. Of a model with logits, these are the output.
        positions: The number of positions that were compared: the logits of so many tokens or images. Padding is left
            out. For a model without logits, the number of batches.
        bytes: The bytes of its parameters and buffers; None for a candidate that is not a module.
        layers: Its layers with their own errors, those that are exact left out.
    """

    kl: float | None
    kl_error: float | None
    kl_by_batch: tuple[float, ...]
    top1: float | None
    perplexity: float | None
    error: float
    positions: int
    bytes: int | None
    layers: tuple[Layer, ...] = ()

    @property
    def worst(self) -> Layer | None:
        """The layer with the largest error."""
        return min(self.layers, key=lambda layer: layer.sqnr_db, default=None)

    @property
    def outliers(self) -> float | None:
        """The share of outliers among the activations of all layers; None where none are counted."""
        counted = [(layer.outliers, layer.inputs) for layer in self.layers if layer.outliers is not None]
        return sum(share * k for share, k in counted) / sum(k for _, k in counted) if counted else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `evaluate`. `print(evaluation)` shows tables.

    Attributes:
        results: Results by candidate; "float32" is the first.
        spreads: The largest activation that each linear reads, before and after the rotation.
        notes: Candidates that were left out and values that are not there, in sentences.
    """

    results: Mapping[str, Result]
    spreads: tuple[Spread, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n\n".join(filter(None, (self._table(), self._kinds(), "\n".join(self.notes))))

    def _table(self) -> str:
        columns: dict[str, Callable[[Result], str | None]] = {
            "KL divergence [nats]": _kl_text,
            "same most likely": lambda result: None if result.top1 is None else f"{result.top1:.1%}",
            "perplexity": lambda result: None if result.perplexity is None else f"{result.perplexity:.3f}",
            "error of outputs": lambda result: f"{result.error:.2%}",
            "MiB": lambda result: None if result.bytes is None else f"{result.bytes / 2**20:.1f}",
            "least exact layer": lambda result: (
                f"{result.worst.sqnr_db:.1f} dB, {result.worst.path}" if result.worst else None
            ),
        }
        texts = {name: [text(result) for result in self.results.values()] for name, text in columns.items()}
        shown = {name: column for name, column in texts.items() if any(column)}
        rows = [[name, *(column[i] or "" for column in shown.values())] for i, name in enumerate(self.results)]
        return _tabulated(rows, ["", *shown])

    def _kinds(self) -> str:
        found = {name: _by_kind(result.layers) for name, result in self.results.items() if result.layers}
        kinds = list(dict.fromkeys(kind for by in found.values() for kind in by))
        if not kinds:
            return ""
        rows = [
            [kind, *(f"{statistics.mean(by[kind]):.1f}" if kind in by else "" for by in found.values())]
            for kind in kinds
        ]
        return f"Signal-to-quantization-noise ratio [dB], mean of the layers:\n{_tabulated(rows, ['', *found])}"

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as values that JSON has; NaN and infinite values are None."""

        def value(given: Any) -> Any:
            if isinstance(given, tuple):
                return [value(each) for each in given]
            return None if isinstance(given, float) and not math.isfinite(given) else given

        def row(given: Any) -> dict[str, Any]:
            fields = given._asdict() if hasattr(given, "_asdict") else vars(given)
            return {
                name: [row(each) for each in field] if name == "layers" else value(field)
                for name, field in fields.items()
            }

        return {
            "results": {name: row(result) for name, result in self.results.items()},
            "spreads": [row(spread) for spread in self.spreads],
            "notes": list(self.notes),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` to a JSON file.

        Raises:
            InputError: The file cannot be written.
        """
        with writing(path):
            Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the error of each layer by depth, and the largest activations before and after the rotation, as a PNG.

        Raises:
            InputError: matplotlib is not installed, the file cannot be written, or no layer was compared.
        """
        from int8compile.tuning import pictures

        layers = {name: result.layers for name, result in self.results.items() if result.layers}
        if not layers:
            raise InputError("no layer was compared, so there is nothing to draw; evaluate with layers=True")
        with writing(path):
            pictures.draw(layers, self.spreads, path)


def evaluate(
    model: nn.Module,
    batches: Any = None,
    configs: Mapping[str, Any] | Iterable[str] | None = None,
    *,
    layers: bool = True,
    progress: bool = True,
) -> Evaluation:
    """Compare candidates with a model in float32: KL divergence, perplexity, error of outputs and of each layer.

    The model is not changed, and runs in evaluation mode. Candidates are made from copies in float32, one after the
    other, and run without a compiler, with the same kernels. A calibration of the model itself is not used. A model
    that is int8 already is compared with its dequantized copy, as the candidate "as stored". The logits of the float32
    model are kept in a temporary folder.

    Args:
        model: A model. It may return logits, in `.logits` or `["logits"]`: [B, classes] or [B, T, classes]. For a
            model that returns none, all float tensors of its output are compared.
        batches: Inputs, as for `calibrate`: each a tensor, a tuple of arguments or a dictionary of keyword arguments.
            Where an `attention_mask` is 0, nothing is compared.
        configs: Names of candidates, of `int8compile.tuning.candidates.CANDIDATES`; or a mapping from any name to such
            a name, an `Int8Config`, a mapping of its options, a `Candidate`, or a model to call as it is. None is all
            standard candidates; other libraries take part where they are installed.
        layers: Whether to compare layers, too.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: A candidate or an option is not known.
        FreedWeightError: The model's float weights were freed.
        InputError: The model is no module; there is no batch, a batch is of another type, all of it is padding, or the
            model does not run on it.
        ModelError: The model has no data, or its float32 outputs have NaN.
    """
    model = plain(model)
    check_module(model)
    if batches is None:
        raise InputError(
            "batches is None; give a list of inputs: evaluate(model, [tokenizer(text, return_tensors='pt')])"
        )
    given = list(as_batches(batches))
    calls = [Call.of(model, batch) for batch in given]
    if not calls:
        raise InputError(NO_BATCH)
    check_has_data(model, "evaluate")
    stored = any(isinstance(module, Int8Module) for module in model.modules())
    wanted, notes = chosen(configs, model if stored else None)
    if stored:
        notes.append(
            "The model is int8: float32 is the dequantized model, so the loss of quantizing the weights is not in the "
            "figures. Evaluate the float model for that."
        )
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="int8compile-") as folder, unchanged(model), torch.no_grad():
        if stored:
            dequantize_(reference := copy.deepcopy(model))
            reference.float()
        else:
            reference = model_in(model, torch.float32)
        with progress_bar(total=len(calls) * (1 + len(wanted)), desc="Evaluating", shown=progress) as bar:
            bar.set_postfix_str(FLOAT)
            expected = Expected(reference, calls, Path(folder), layers=layers, done=bar.update)
            results[FLOAT] = expected.own
            if expected.own.kl is None:
                notes.append("The model returns no logits, so only the error of its outputs is compared.")
            elif expected.own.positions < FEW:
                notes.append(few_positions(expected.own.positions))
            for name, spec in wanted.items():
                bar.set_postfix_str(name)
                notes += _notes(name, spec, reference)
                made = spec.make(copy.deepcopy(reference), given) if isinstance(spec, Candidate) else spec
                results[name] = expected.compare(name, made, bar.update)
                del made
                if math.isnan(results[name].error):
                    notes.append(f"{name}: its outputs have NaN, so it cannot be compared.")
                elif isinstance(spec, Candidate) and spec.config is None and not results[name].error:
                    notes.append(f"{name}: its outputs are those of float32 exactly, so it may have converted nothing.")
        spreads = expected.observed.spreads() if expected.observed else []
    return Evaluation(results=results, spreads=tuple(spreads), notes=tuple(dict.fromkeys(notes)))


def check_module(model: Any) -> None:
    """Raise `InputError` if a model is no module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is {type(model).__name__}; give an nn.Module")


def few_positions(positions: int) -> str:
    """Return a note on too few positions."""
    count = f"{positions} position{'s' if positions > 1 else ''}"
    return f"Measured on {count} only, so the figures are uncertain: give some thousand tokens, or some hundred images."


def in_float_note(paths: Iterable[str]) -> str:
    """Return a note on linears that `torch.compile` may rewrite and `quantize_` does not convert."""
    return f"Measured in float, because quantize_ does not convert them; torch.compile may: {listed(paths)}."


def none_in_int8(found: Report) -> str:
    """Return why a model has nothing in int8, as a sentence; "" if it has something."""
    if found.rewritten:
        return ""
    if not found.sites:
        return "nothing of it is int8: it has no module that quantize_ converts; torch.compile may find linears"
    return f"nothing of it is int8: {found.first_reasons()}"


def _notes(name: str, spec: Any, reference: nn.Module) -> list[str]:
    """Return notes on a candidate that is made from the reference."""
    if not isinstance(spec, Candidate) or spec.config is None:
        return []
    found = report(reference, spec.config)
    notes = []
    if why := none_in_int8(found):
        notes.append(f"{name}: {why}.")
    if found.unused_patterns:
        notes.append(f"{name}: these patterns match no linear: {listed(map(repr, found.unused_patterns))}.")
    if hidden := [site.path for site in found.skipped if site.reason in HIDDEN]:
        notes.append(in_float_note(hidden))
    if spec.calibrates and not takes_tokens(reference):
        notes.append(
            f"{name}: calibrated on the batches that are compared, because the model reads no tokens; on other inputs "
            "it may be less exact."
        )
    return notes


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Return KL(expected || found) at each position, in nats.

    Shapes:
        expected, found: [..., classes] logits; result: [...] float64.
    """
    rows = []
    flat = [each.reshape(-1, each.shape[-1]) for each in (expected, found)]
    count = max(1, _AT_ONCE // expected.shape[-1])
    for p, q in zip(*(each.split(count) for each in flat), strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        # A class that is impossible in float32 adds nothing: 0 * -inf is NaN.
        difference = torch.where(log_p == -math.inf, 0, log_p - log_q)
        rows.append((log_p.exp() * difference).sum(-1))
    return torch.cat(rows).reshape(expected.shape[:-1]) if rows else expected.new_zeros(0, dtype=torch.float64)


def logits_of(output: Any) -> Tensor | None:
    """Return the logits in a model's output, [B, classes] or [B, T, classes]; None if it has none.

    A single class is a regression, and more dimensions are those of images: neither is a distribution over the last
    dimension.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() not in (2, 3) or found.shape[-1] < 2:
        return None
    return found


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call, and which positions of it count.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        predicts: Whether the model may predict the next token.
        own_decoder_ids: Whether it has a decoder and makes the tokens that this reads itself, from labels or inputs.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    predicts: bool
    own_decoder_ids: bool = False

    @classmethod
    def of(cls, model: Any, batch: Any) -> Call:
        """Return the call of a model with a batch."""
        args, kwargs = arguments(batch)
        generates = getattr(model, "can_generate", None)
        if generates is not None and "use_cache" not in kwargs and hasattr(getattr(model, "config", None), "use_cache"):
            # Without it, the keys and values of all layers are part of the output.
            kwargs["use_cache"] = False
        decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        return cls(args, kwargs, generates is None or bool(generates()), decodes and "decoder_input_ids" not in kwargs)

    @property
    def tokens(self) -> Tensor | None:
        """The tokens that logits belong to, [B, T]; None where the model reads something else."""
        first = self.args[0] if self.args else None
        found = self.kwargs.get("decoder_input_ids", self.kwargs.get("input_ids", first))
        tokens = isinstance(found, Tensor) and found.dim() == 2 and not found.is_floating_point()
        return found if tokens else None

    @property
    def mask(self) -> Tensor | None:
        """The positions that count, [B, T] bool; None where all of them do."""
        decodes = self.own_decoder_ids or "decoder_input_ids" in self.kwargs
        name = "decoder_attention_mask" if decodes else "attention_mask"
        found = self.kwargs.get(name)
        return found != 0 if isinstance(found, Tensor) and found.dim() == 2 else None

    def run(self, model: Any) -> tuple[list[Tensor], bool]:
        """Return the outputs of a model without padding, and whether they are logits [positions, classes]."""
        dtype = dtype_of(model) if isinstance(model, nn.Module) else None
        args, kwargs = args_in((self.args, dict(self.kwargs)), dtype)
        torch.manual_seed(0)  # A model that draws random numbers draws the same every time.
        output = model(*args, **kwargs)
        logits = logits_of(output)
        if logits is not None:
            return [logits[self._kept(logits)] if logits.dim() == 3 else logits], True
        tensors = [
            each for each in pytree.tree_leaves(_plain(output)) if isinstance(each, Tensor) and each.is_floating_point()
        ]
        return [each[self._kept(each)] if each.dim() >= 3 else each for each in tensors], False

    def _kept(self, output: Tensor) -> Tensor:
        mask = self.mask
        if mask is None or mask.shape != output.shape[:2]:
            return torch.ones(output.shape[:2], dtype=torch.bool)
        return mask

    def targets(self, logits: Tensor) -> Tensor | None:
        """Return the next token at each position that `run` keeps, [positions]; -1 where there is none.

        None where the model does not predict tokens.

        Shapes:
            logits: [positions, classes]
        """
        tokens, mask = self.kwargs.get("labels") if self.own_decoder_ids else self.tokens, self.mask
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or not tokens.numel() or not self.predicts:
            return None
        kept = mask if mask is not None and mask.shape == tokens.shape else torch.ones_like(tokens, dtype=torch.bool)
        if self.own_decoder_ids:
            following = tokens.masked_fill(tokens < 0, -1)  # The decoder reads them shifted.
        else:
            following = torch.full_like(tokens, -1)
            following[:, :-1] = tokens[:, 1:].masked_fill(~kept[:, 1:], -1)
        # Logits of fewer classes than there are tokens are of something else, such as a class of each token.
        found = following[kept]
        return found if len(found) == len(logits) and int(tokens.max()) < logits.shape[-1] else None


class Scores:
    """Sums over batches of the differences between two models."""

    def __init__(self) -> None:
        self._divergences: list[tuple[float, int]] = []
        self._agreed = 0
        self._negative_log_likelihood, self._predicted = 0.0, 0
        self._noise: list[float] = []
        self._signal: list[float] = []
        self._batches = 0

    def add(self, expected: Sequence[Tensor], found: Sequence[Tensor], *, logits: bool) -> None:
        """Add the outputs of a batch."""
        self._batches += 1
        self._noise = self._noise or [0.0] * len(expected)
        self._signal = self._signal or [0.0] * len(expected)
        for i, (one, other) in enumerate(zip(expected, found, strict=True)):
            noise, signal = _squares(one, other)
            self._noise[i] += noise
            self._signal[i] += signal
        if logits:
            one, other = expected[0], found[0]
            self._divergences.append((float(divergence(one, other).sum()), len(one)))
            self._agreed += int((one.argmax(-1) == other.argmax(-1)).sum())

    def add_tokens(self, logits: Tensor, targets: Tensor) -> None:
        """Add logits [positions, vocabulary] and the tokens that follow, -1 for none."""
        for part, following in zip(*(each.split(1024) for each in (logits, targets)), strict=True):
            loss = F.cross_entropy(part.float(), following, reduction="sum", ignore_index=-1)
            self._negative_log_likelihood += float(loss)
        self._predicted += int((targets >= 0).sum())

    def result(self, model: Any, layers: Sequence[Layer] = ()) -> Result:
        """Return the means."""
        errors = [
            math.sqrt(noise / signal) if signal else (math.inf if noise else 0.0)
            for noise, signal in zip(self._noise, self._signal, strict=True)
        ]
        error = statistics.fmean(errors)
        positions = sum(count for _, count in self._divergences)
        means = [total / count for total, count in self._divergences if count]
        broken = math.isnan(error)
        return Result(
            kl=sum(total for total, _ in self._divergences) / positions if positions else None,
            kl_error=_standard_error(self._divergences),
            kl_by_batch=tuple(means),
            top1=(math.nan if broken else self._agreed / positions) if positions else None,
            perplexity=_exp(self._negative_log_likelihood / self._predicted) if self._predicted else None,
            error=error,
            positions=positions or self._batches,
            bytes=_bytes(model),
            layers=tuple(layers),
        )


class Expected:
    """The float32 model's outputs, in files, and its layers.

    Attributes:
        own: The result of the model itself.
        observed: Its layers; None if they are not to be compared.
        rows: The rows of the outputs of each batch: its positions, for a model with logits.

    Args:
        model: The model.
        calls: The calls to compare.
        folder: An empty folder.
        layers: Whether to compare layers.
        done: Called after each call.
    """

    def __init__(
        self, model: nn.Module, calls: Sequence[Call], folder: Path, *, layers: bool, done: Callable[[], object]
    ) -> None:
        self._calls = calls
        self._files = [folder / f"output-{number}.pt" for number in range(len(calls))]
        self.observed = Observed(model, folder, len(calls)) if layers else None
        self.rows: list[int] = []
        scores, logits = Scores(), False
        with self.observed.recording() if self.observed else contextlib.nullcontext():
            for number, (call, file) in enumerate(zip(calls, self._files, strict=True)):
                with _naming(type(model).__name__, number):
                    outputs, logits = call.run(model)
                _check_outputs(model, outputs, number)
                self.rows.append(sum(math.prod(each.shape[:-1]) for each in outputs))
                scores.add(outputs, outputs, logits=logits)
                if logits and (targets := call.targets(outputs[0])) is not None:
                    scores.add_tokens(outputs[0], targets)
                torch.save(outputs, file)
                done()
        self.own = scores.result(model)

    def compare(
        self,
        name: str,
        candidate: Any,
        done: Callable[[], object] = lambda: None,
        *,
        count: int | None = None,
        layers: bool = True,
    ) -> Result:
        """Return the distance of a candidate.

        Args:
            name: Its name, for errors.
            candidate: A model to call.
            done: Called after each call.
            count: The number of batches to compare, from the first; None for all.
            layers: Whether to compare layers, if those of the float32 model were observed.

        Raises:
            InputError: It does not run on a batch.
            ModelError: Its outputs have other shapes.
        """
        scores = Scores()
        for number, (call, file) in enumerate(list(zip(self._calls, self._files, strict=True))[:count]):
            expected = torch.load(file, mmap=True, weights_only=True)
            with _naming(name, number):
                found, logits = call.run(candidate)
            if [each.shape for each in found] != [each.shape for each in expected]:
                shapes = [[list(each.shape) for each in outputs] for outputs in (found, expected)]
                raise ModelError(f"{name} returns other outputs than the model: {shapes[0]}, not {shapes[1]}")
            scores.add(expected, found, logits=logits)
            if logits and (targets := call.targets(found[0])) is not None:
                scores.add_tokens(found[0], targets)
            done()
        module = isinstance(candidate, nn.Module) and plain(candidate) is candidate
        observed = self.observed if layers and module else None
        return scores.result(candidate, observed.compare(candidate) if observed else ())


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise `InputError` where a file cannot be written inside the context."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be written: {first_line(error)}. Name a file in a folder that exists"
        ) from error


@contextlib.contextmanager
def _naming(name: str, number: int) -> Iterator[None]:
    """Raise `InputError`, with the model and the number of the batch, where a model does not run."""
    try:
        yield
    except Int8CompileError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{name} does not run on batch {number}: {what}. Give it inputs that it takes") from error


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode inside the context; restore its modes, buffers and the random numbers."""
    modes = {module: module.training for module in model.modules()}
    with buffers_restored(model), torch.random.fork_rng():
        try:
            model.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def _check_outputs(model: nn.Module, outputs: Sequence[Tensor], number: int) -> None:
    """Raise an error where the float32 outputs of a batch cannot be compared with."""
    if not outputs:
        raise ModelError(f"{type(model).__name__} returns no float tensors, so there is nothing to compare")
    if not all(len(each) for each in outputs if each.dim()):
        raise InputError(f"batch {number} has no position to compare: it is empty, or all of it is padding")
    if any(each.isnan().any() for each in outputs):
        said = f"the float32 outputs of {type(model).__name__} on batch {number} have NaN"
        broken = (name for name, each in model.named_parameters() if each.is_floating_point() and not _is_finite(each))
        if name := next(broken, None):
            raise ModelError(f"{said}, because its {name} has NaN or Inf. Load the weights again")
        raise ModelError(f"{said}. Give it inputs that it can compute")


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _squares(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Return the sums of squares of the difference of two tensors, and of the first."""
    noise = signal = 0.0
    for one, other in zip(*(each.reshape(-1).split(_AT_ONCE) for each in (expected, found)), strict=True):
        one, other = one.double(), other.double()
        # Both may be -inf, for classes that are impossible.
        noise += float(torch.where(one == other, 0, other - one).square().sum())
        signal += float(one.masked_fill(one.isinf(), 0).square().sum())
    return noise, signal


def _standard_error(batches: Sequence[tuple[float, int]]) -> float | None:
    """Return the standard error of a mean over the positions of all batches; None for a single batch, NaN where one is.

    It is that of a ratio of two sums (Cochran, Sampling Techniques, 1977, section 2.11). For batches of one size it is
    the standard deviation of their means over the root of their number.

    Args:
        batches: The sum and the number of positions of each batch.
    """
    batches = [(total, count) for total, count in batches if count]
    number, positions = len(batches), sum(count for _, count in batches)
    if number < 2:
        return None
    mean = sum(total for total, _ in batches) / positions
    squares = sum((total - mean * count) ** 2 for total, count in batches)
    return math.sqrt(squares * number / (number - 1)) / positions


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf * value  # NaN stays NaN.


def _bytes(model: Any) -> int | None:
    """Return the bytes of a model; None where it is no module, or its tensors hold other tensors."""
    if not isinstance(model, nn.Module) or any(hasattr(each, "__tensor_flatten__") for each in model.parameters()):
        return None
    return memory_footprint(model)


def _plain(output: Any) -> Any:
    """Return the fields of an output that is a dataclass, which pytrees do not look into."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type | Mapping):
        return [getattr(output, field.name) for field in dataclasses.fields(output)]
    return output


def _by_kind(layers: Iterable[Layer]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for layer in layers:
        found.setdefault(layer.kind, []).append(layer.sqnr_db)
    return found


def _kl_text(result: Result) -> str | None:
    if result.kl is None:
        return None
    figures = ".4f" if result.kl >= 0.001 or not result.kl else ".1e"
    spread = f" ± {result.kl_error:{figures}}" if result.kl_error else ""
    return f"{result.kl:{figures}}{spread}"


def _tabulated(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    from tabulate import tabulate

    align = ["left"] + ["left" if "layer" in name else "right" for name in headers[1:]]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=align)
