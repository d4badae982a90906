"""What was rewritten, what was not, and why: typed reasons, and the table and the data that `explain()` returns."""

from __future__ import annotations

import collections
import dataclasses
import enum
from typing import Any


class SkipReason(enum.Enum):
    """Why a linear site stays in float. The value is a sentence for the user with what to do about it."""

    NAME = "its module path matches skip_modules"
    LM_HEAD = "it is the lm_head, which stays in float for accuracy; lm_head='int8_weight' or 'int8' rewrites it"
    TIED = (
        "its weight is also the embedding table; lm_head='int8_weight' or 'int8' makes it int8 (and the table "
        "with quantize_; torch.compile leaves that in float)"
    )
    NOT_STATIC = "its weight is no parameter but a buffer, an input, or made from one; only parameters are quantized"
    COMPUTED = "its weight is computed from parameters at every call; fold the computation into a parameter first"
    CHANGED = "the model changes its weight during the forward pass; nothing to quantize beforehand"
    TRAINED = (
        "its weight requires grad and grad mode is on, so it may be being trained; "
        "call it under torch.no_grad(), or freeze it with requires_grad_(False)"
    )
    UNINITIALIZED = "it has no weight before its first call; run the model once, then quantize it"
    SUBCLASS = "its weight is a tensor subclass (sharded, or quantized already); give a plain parameter"
    MODULE = (
        "it is no nn.Linear, or the code around it reads its weight, so no module can take its place; "
        "torch.compile(backend='int8') can rewrite it"
    )
    HOOKED = (
        "it has hooks, which are lost when another module takes its place; quantize before they are added (with a "
        "device map: while loading, by quantization_config=)"
    )
    SAVED_IN_FLOAT = "its library saves and loads it in float only; torch.compile(backend='int8') can rewrite it"
    SMALL = "it has fewer features than min_features, so quantizing its input costs as much as its matmul"
    LARGE = "its reduction is too long for exact int32 sums (over 131071 inputs); split the layer"
    DTYPE = "its dtype is not float32, float16 or bfloat16; convert the model, e.g. model.to(torch.bfloat16)"
    FORM = "this form of the call has no int8 counterpart; write it as F.linear or as x @ W"
    BAD_VALUES = "its weight holds NaN or Inf, which has no int8 value; compiling it raises BadWeightError"
    FUSED_OP = (
        "it is inside an operator that PyTorch has fused already; call the module that it is for "
        "(nn.MultiheadAttention, nn.TransformerEncoderLayer), whose linears are seen"
    )
    NOT_CAPTURED = (
        "no captured graph uses it: Dynamo skipped its code after a graph break (TORCH_LOGS=graph_breaks shows where), "
        "or these inputs do not reach it"
    )
    CUSTOM_OP = (
        "it is the argument of a custom operator, which no pass can rewrite; use a plain PyTorch implementation of it"
    )
    NESTED = "it is inside a region that is captured as a graph of its own (torch.cond, checkpointing)"
    COLUMN_BATCHED = "outliers='column' multiplies matrices only, as LLM.int8() does; outliers='row' has it in int8"
    ACTIVATION = "its input is no ordinary dense tensor; give a tensor that is padded, or of rows one behind the other"
    TRANSFORMED = "torch.func differentiates it inside the compiled function; quantize_(model) makes it int8 there, too"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One matmul with a weight.

    Attributes:
        path: Module path, as in `model.named_modules()`; of the parameter where a bare parameter is used.
        op: How the model spells it: "linear", "matmul", "einsum", ...
        source: "file.py:line" of the user's code.
        shape: M, K, N (rows, inputs, outputs), or B, M, K, N for batched weights; empty where unknown. A size that
            changes from call to call is a symbol.
        weight: Name of the weight's parameter, to count shared bytes once.
        layout: How the weight views that parameter; each layout that is used has int8 values of its own.
        weight_bytes: Bytes of the whole parameter.
        bytes_before: Bytes of the weight in the model.
        bytes_after: Bytes of int8 values and scales, or `bytes_before` where it is not rewritten.
        reason: Why it is not rewritten, None where it is.
        detail: What the reason found, e.g. the pattern that matched.
        weight_only: Whether its weight is int8 and its activations keep the precision of float.
        rotation: How many elements of its activations are mixed with each other; 1 where they are not rotated.
        calibrated: Whether that was made for such activations, see `int8compile.calibrate`.
        outliers: The share of its activations that took more than 8 bits, or ran in float with outliers="column"; None
            where that was not seen.
        pays: For which M int8 can be faster than float on this device, by its roofline; "" where that is not known.
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
        """Whether the site runs in int8."""
        return self.reason is None

    @property
    def runs_in(self) -> str:
        """What the site is computed in."""
        return "float" if not self.rewritten else "int8 weight" if self.weight_only else "int8"

    def rotated(self) -> str:
        """Return how its activations are rotated, "" where they are not."""
        if self.rotation == 1:
            return ""
        return f"{self.rotation}, calibrated" if self.calibrated else f"{self.rotation}"

    def why(self) -> str:
        """The reason as a sentence, "" for a rewritten site."""
        if self.reason is None:
            return ""
        return self.reason.value + (f" ({self.detail})" if self.detail else "")

    def to_dict(self) -> dict[str, Any]:
        """The site as plain data."""
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


@dataclasses.dataclass
class Report:
    """What happened to a model's linears, over all its graphs.

    Attributes:
        sites: One entry per call site, in the order of execution.
        activation_matmuls: Matmuls of two activations (attention scores and values); they have no weight to quantize.
        graphs: Number of graphs the model was captured in; more than one means graph breaks.
        unused_patterns: Entries of `skip_modules` that matched nothing.
        notes: What else the user should know, in sentences.
        fused_norms: Norms that are computed as their results are quantized, on GPUs.
        unfused_norms: Norms before int8 linears on GPUs that are computed by themselves, by module path or name of the
            node, and why. Known once a graph is compiled or exported: it is in what the backend logs (DEBUG) and in
            what `export` returns, not in what `explain` does.
    """

    sites: list[Site] = dataclasses.field(default_factory=list)
    activation_matmuls: int = 0
    graphs: int = 0
    unused_patterns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fused_norms: int = 0
    unfused_norms: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def rewritten(self) -> list[Site]:
        """The sites that run in int8."""
        return [site for site in self.sites if site.rewritten]

    @property
    def skipped(self) -> list[Site]:
        """The sites that stay in float."""
        return [site for site in self.sites if not site.rewritten]

    def totals(self) -> dict[str, Any]:
        """Counts and bytes; a weight that several sites share is counted once."""
        before = {site.weight: site.weight_bytes for site in self.sites}
        # A weight that one site uses in float and another in int8 is there twice.
        after: dict[tuple[str, str], int] = {}
        for site in self.rewritten:
            # One of those that share a d has its bytes.
            key = (site.weight, site.layout)
            after[key] = max(site.bytes_after, after.get(key, 0))
        after |= {(site.weight, ""): site.weight_bytes for site in self.skipped}
        return {
            "sites": len(self.sites),
            "rewritten": len(self.rewritten),
            "skipped": len(self.skipped),
            "reasons": dict(collections.Counter(site.reason.name.lower() for site in self.sites if site.reason)),
            "activation_matmuls": self.activation_matmuls,
            "graphs": self.graphs,
            "bytes_before": sum(before.values()),
            "bytes_after": sum(after.values()),
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: `sites`, `totals`, `unused_patterns`, `notes`, `norms`."""
        return {
            "sites": [site.to_dict() for site in self.sites],
            "totals": self.totals(),
            "unused_patterns": list(self.unused_patterns),
            "notes": list(self.notes),
            "norms": {"fused": self.fused_norms, "unfused": [list(norm) for norm in self.unfused_norms]},
        }

    def summary(self) -> str:
        """The totals in one line."""
        totals = self.totals()
        line = (
            f"{totals['rewritten']} of {totals['sites']} linears in int8, weights "
            f"{readable(totals['bytes_before'])} -> {readable(totals['bytes_after'])}"
        )
        if not totals["graphs"]:
            return line  # Nothing was captured: modules were replaced.
        line += f", {totals['activation_matmuls']} matmuls of two activations left alone, {totals['graphs']} graph"
        line += "" if totals["graphs"] == 1 else "s"
        norms = self.fused_norms + len(self.unfused_norms)
        return f"{line}, {self.fused_norms} of {norms} norms fused with quantization" if norms else line

    def first_reasons(self) -> str:
        """The first sites with their reasons, for warnings."""
        return "; ".join(f"{site.path}: {site.why()}" for site in self.sites[:3])

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [
            (
                site.path,
                site.op,
                site.source,
                " x ".join(site.shape),
                site.runs_in,
                site.rotated(),
                percent(site.outliers),
                readable(site.bytes_before),
                readable(site.bytes_after),
                site.pays,
            )
            for site in self.sites
        ]
        header = (
            "module",
            "op",
            "source",
            "M x K x N",
            "runs in",
            "rotated",
            "outliers",
            "before",
            "after",
            "can be faster",
        )
        lines = [tabulate(rows, headers=header, tablefmt="simple", disable_numparse=True), "", self.summary()]
        by_reason: dict[str, list[str]] = collections.defaultdict(list)
        for site in self.skipped:
            by_reason[f"float: {{}}: {site.why()}"].append(site.path)
        for path, why in self.unfused_norms:
            by_reason[f"norm not fused: {{}}: {why}"].append(path)
        for why, paths in by_reason.items():
            named = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
            lines.append(f"- {why}".replace("{}", named, 1))
        lines.extend(f"- skip_modules pattern {pattern!r} matched nothing" for pattern in self.unused_patterns)
        lines.extend(f"- {note}" for note in self.notes)
        return "\n".join(lines)


def readable(size: int) -> str:
    """Bytes as "12.3 KiB" or "4.5 MiB"."""
    return f"{size / 2**10:.1f} KiB" if size < 2**20 else f"{size / 2**20:.1f} MiB"


def percent(share: float | None) -> str:
    """A share as "1.9 %" or "0.00021 %", "" for none."""
    return "" if share is None else f"{100 * share:.2g} %"
