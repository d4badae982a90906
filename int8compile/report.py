"""The report on a model's linears that `explain()`, `quantize_()` and `export()` return."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from int8compile.rendering import percent, readable, reasons, table
from int8compile.sites import FusionReason, NotFused, Site, SkipReason

__all__ = ["FusionReason", "NotFused", "Report", "Site", "SkipReason", "percent", "readable"]


@dataclasses.dataclass
class Report:
    """The result for a model's linears, over all its graphs.

    Attributes:
        sites: One entry per call site, in the order of execution.
        activation_matmuls: Matmuls of two activations (attention scores and values); they have no weight to quantize.
        graphs: Number of graphs the model was captured in; more than one means graph breaks.
        unused_patterns: Patterns of `skip_modules` and `modules` that matched nothing.
        notes: Further information for the user, in sentences.
        fused_norms: The number of norms that are fused with the quantization of their results, on GPUs.
        unfused: Fusions of int8 linears with each other, or with norms and activations, that were not made, and why.
    """

    sites: list[Site] = dataclasses.field(default_factory=list)
    activation_matmuls: int = 0
    graphs: int = 0
    unused_patterns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fused_norms: int = 0
    unfused: list[NotFused] = dataclasses.field(default_factory=list)

    @property
    def unfused_norms(self) -> list[tuple[str, str]]:
        """Norms before int8 linears on GPUs that are computed separately, with the reason."""
        return [(fusion.path, fusion.why()) for fusion in self.unfused if fusion.kind == "norm"]

    @property
    def rewritten(self) -> list[Site]:
        """The sites that run in int8."""
        return [site for site in self.sites if site.rewritten]

    @property
    def skipped(self) -> list[Site]:
        """The sites that stay in float."""
        return [site for site in self.sites if not site.rewritten]

    def totals(self) -> dict[str, Any]:
        """Return counts and bytes. A weight that several sites share is counted once."""
        before = {site.weight: site.weight_bytes for site in self.sites}
        # A weight that one site uses in float and another in int8 is in memory twice.
        after: dict[tuple[str, str], int] = {}
        for site in self.rewritten:
            # Of the sites that share a d, one counts its bytes.
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
        """Return the report as plain data: `sites`, `totals`, `unused_patterns`, `notes`, `norms`, `unfused`."""
        return {
            "sites": [site.to_dict() for site in self.sites],
            "totals": self.totals(),
            "unused_patterns": list(self.unused_patterns),
            "notes": list(self.notes),
            "norms": {"fused": self.fused_norms, "unfused": [list(norm) for norm in self.unfused_norms]},
            "unfused": [fusion.to_dict() for fusion in self.unfused],
        }

    def summary(self) -> str:
        """Return the totals in one line."""
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
        """Return the first sites with their reasons, for warnings."""
        return "; ".join(f"{site.path}: {site.why()}" for site in self.sites[:3])

    def __str__(self) -> str:
        lines = [table(self.sites), "", self.summary(), *reasons(self.skipped, self.unfused)]
        lines.extend(f"- pattern {pattern!r} matched nothing" for pattern in self.unused_patterns)
        lines.extend(f"- {note}" for note in self.notes)
        return "\n".join(lines)
