"""The rows of a report: linears, fusions that were not made, and the typed reasons of both."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, TypeAlias


class Reason(enum.Enum):
    """A reason why something was not changed. The value is a sentence for the user, with a remedy if there is one."""

    def why(self, detail: str = "") -> str:
        """Return the sentence, with what was found in parentheses."""
        return f"{self.value} ({detail})" if detail else str(self.value)


# The result of a rule: None, or a reason and the detail that it found.
Verdict: TypeAlias = tuple[Any, str] | None


class SkipReason(Reason):
    """A reason why a linear stays in float."""

    NAME = "its module path matches skip_modules"
    LM_HEAD = "it is the lm_head, which stays in float for accuracy; lm_head='int8_weight' or 'int8' rewrites it"
    TIED = (
        "its weight is also the embedding table; lm_head='int8_weight' or 'int8' makes it int8 (and the table "
        "with quantize_; torch.compile leaves that in float)"
    )
    NOT_STATIC = "its weight is a buffer, an input, or computed from one; only parameters are quantized"
    COMPUTED = "its weight is computed from parameters at every call; fold the computation into a parameter first"
    CHANGED = "the model changes its weight during the forward pass, so it cannot be quantized beforehand"
    TRAINED = (
        "its weight requires grad and grad mode is on, so it may be in training; "
        "call it under torch.no_grad(), or freeze it with requires_grad_(False)"
    )
    UNINITIALIZED = "it has no weight before its first call; run the model once, then quantize it"
    SUBCLASS = "its weight is a tensor subclass (sharded, or quantized already); give a plain parameter"
    MODULE = (
        "it is not an nn.Linear, or other code reads its weight, so no int8 module can take its place; "
        "torch.compile(backend='int8') can rewrite it"
    )
    HOOKED = (
        "it has hooks, which would be lost when an int8 module takes its place; quantize before they are added (with a "
        "device map, load with quantization_config=)"
    )
    SAVED_IN_FLOAT = "its library saves and loads it in float only; torch.compile(backend='int8') can rewrite it"
    SMALL = "it has fewer features than min_features, so quantizing its input costs as much as its matmul"
    LARGE = "it has more than 131071 inputs, too many for exact int32 sums; split the layer"
    DTYPE = "its dtype is not float32, float16 or bfloat16; convert the model, e.g. model.to(torch.bfloat16)"
    FORM = "this form of the call has no int8 counterpart; write it as F.linear or as x @ W"
    BAD_VALUES = "its weight holds NaN or Inf, which has no int8 value; compiling it raises BadWeightError"
    FUSED_OP = (
        "it is inside an operator that PyTorch has fused already; call the module instead "
        "(nn.MultiheadAttention, nn.TransformerEncoderLayer), whose linears can be rewritten"
    )
    NOT_CAPTURED = (
        "no captured graph uses it: Dynamo skipped its code after a graph break (TORCH_LOGS=graph_breaks shows where), "
        "or these inputs do not reach it"
    )
    CUSTOM_OP = (
        "it is the argument of a custom operator, which no pass can rewrite; use a plain PyTorch implementation of it"
    )
    NESTED = "it is inside a region that is captured as a graph of its own (torch.cond, checkpointing)"
    COLUMN_BATCHED = "outliers='column' multiplies single matrices only, as LLM.int8(); outliers='row' makes it int8"
    ACTIVATION = "its input is not an ordinary dense tensor; give a padded tensor, or one tensor with all rows"
    TRANSFORMED = "torch.func differentiates it inside the compiled function; quantize_(model) makes it int8 there, too"


class FusionReason(Reason):
    """A reason why linears of one input were not joined, or an activation or norm not computed with a linear."""

    RECORDED = "autograd records it; call it under torch.no_grad()"
    STREAM = "it runs on a stream of its own"
    HELD = (
        "a module holds its int8 weight, and joining would store it twice; torch.compile with free_weights=True "
        "releases the module's copy"
    )
    WEIGHT_SHARED = "another call reads its weight too"
    SWITCHED = "a tensor is written, or autocast or grad mode switched, between the two; move that before or after them"
    ROTATED_APART = (
        "linears that read one input are rotated differently, so it is quantized for each; rotate=False rotates none"
    )
    THRESHOLDS = "their outlier thresholds differ; quantize the modules with one threshold"
    BIAS = "some of them have a bias and others have none"
    LATE_BIAS = "its bias is computed after the first of them"
    COUNT = "at most three are joined"
    READ_ELSEWHERE = "its result is also read by another call"
    ROUNDED = "autocast casts its result to another dtype; load the model in that dtype"
    JOINED = "its linear is joined with others of the same input"
    SHAPES = "the shapes of the two differ"
    FORM = (
        "its form is not known, or its result is changed before it is quantized; write a norm as F.rms_norm or "
        "F.layer_norm"
    )
    DIMENSIONS = "it normalizes more than the last dimension"
    NO_VECTOR = "its weight or bias is not a vector with one number per input"
    DTYPES = "its weight, input and result differ in dtype; load the model in one dtype"
    PRECISION = "its steps are not computed in float32; F.rms_norm computes in float32 for any input"
    RESHAPED = "its result is reshaped before it is quantized"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A matmul with a weight.

    Attributes:
        path: Module path, as in `model.named_modules()`; of the parameter where a bare parameter is used.
        op: The call in the model: "linear", "matmul", "einsum", ...
        source: "file.py:line" of the user's code.
        shape: M, K, N (rows, inputs, outputs), or B, M, K, N for batched weights; empty where unknown. A size that
            changes from call to call is a symbol.
        weight: Name of the weight's parameter, to count shared bytes once.
        layout: The weight as a view of that parameter. Each layout that is used has int8 values of its own.
        weight_bytes: Bytes of the whole parameter.
        bytes_before: Bytes of the weight in the model.
        bytes_after: Bytes of int8 values and scales, or `bytes_before` where it is not rewritten.
        reason: Why it is not rewritten, None where it is.
        detail: What was found, e.g. the pattern that matched.
        weight_only: Whether its weight is int8 and its activations keep the precision of float.
        rotation: The number of elements of its activations that are mixed with each other; 1 where none are.
        calibrated: Whether the rotation was computed from activations, see `int8compile.calibrate`.
        outliers: The share of its activations that took more than 8 bits, or ran in float with outliers="column"; None
            where it was not counted.
        pays: The M for which int8 can be faster than float on this device, by its roofline; "" where it is not known.
    """

    path: str
    op: str
    source: str
    shape: tuple[str, ...]
    weight: str
    layout: str = ""
    weight_bytes: int
    bytes_before: int
    bytes_after: int
    reason: SkipReason | None = None
    detail: str = ""
    weight_only: bool = False
    rotation: int = 1
    calibrated: bool = False
    outliers: float | None = None
    pays: str = ""

    @property
    def rewritten(self) -> bool:
        """True if the site runs in int8."""
        return self.reason is None

    @property
    def runs_in(self) -> str:
        """The precision that the site is computed in."""
        return "float" if not self.rewritten else "int8 weight" if self.weight_only else "int8"

    def rotated(self) -> str:
        """Return the size of the rotation and whether it is calibrated, "" where there is none."""
        if self.rotation == 1:
            return ""
        return f"{self.rotation}, calibrated" if self.calibrated else f"{self.rotation}"

    def why(self) -> str:
        """Return the reason as a sentence, "" for a rewritten site."""
        return self.reason.why(self.detail) if self.reason else ""

    def to_dict(self) -> dict[str, Any]:
        """Return the site as plain data."""
        return {
            "path": self.path,
            "op": self.op,
            "source": self.source,
            "shape": list(self.shape),
            "rewritten": self.rewritten,
            "runs_in": self.runs_in,
            "rotation": self.rotation,
            "calibrated": self.calibrated,
            "outliers": self.outliers,
            "reason": self.why() or None,
            "reason_code": self.reason.name.lower() if self.reason else None,
            "pays": self.pays,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


@dataclasses.dataclass(frozen=True)
class NotFused:
    """A fusion that was not made.

    Attributes:
        kind: "siblings" (linears of one input), "gate" (`silu(gate) * up`), "activation" or "norm".
        path: Module path, or the name of the node where there is none.
        reason: Why it was not made.
        detail: What was found.
    """

    kind: str
    path: str
    reason: FusionReason
    detail: str = ""

    def why(self) -> str:
        """Return the reason as a sentence."""
        return self.reason.why(self.detail)

    def to_dict(self) -> dict[str, str]:
        """Return the fusion as plain data."""
        return {"kind": self.kind, "path": self.path, "reason": self.why(), "reason_code": self.reason.name.lower()}
