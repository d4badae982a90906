"""`advise` for three goals, beside whole blocks that are skipped by hand: `python -m benchmarks.advice`.

The goals are fractions of the KL divergence that SmolLM2-135M has in int8 with the default config, and calibrated. By
hand, the calibrated model's blocks are put back to float, those first that help most alone, until the goal is met.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import tables
from int8compile import Advice, advise, quantize_
from int8compile.app import loading
from int8compile.progress import progress_bar
from int8compile.tuning.calibration import token_batches
from int8compile.tuning.evaluation import divergence
from int8compile.tuning.texts import TOPICS, prose

# Of the divergence with the default config, and of the calibrated one's.
OF_GIVEN, OF_CALIBRATED = 0.9, (0.7, 0.3)
TOKENS, BATCH = 1024, 256
# The batches that the effect of a block alone is measured on.
SCREENED = 2


class Outcome(NamedTuple):
    """A goal, and what keeps it.

    Attributes:
        advice: The result of `advise`.
        again: The KL divergence of a model that follows the advice, measured without `advise`, in nats.
        blocks: The number of whole blocks that must stay in float if they are chosen by hand.
        by_hand: The estimated seconds per step with these.
    """

    advice: Advice
    again: float
    blocks: int
    by_hand: float


class _Comparison:
    """A float model, batches, and its logits for them."""

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Any]]) -> None:
        self.model, self.batches = model, batches
        with torch.no_grad():
            self._expected = [model(**batch).logits for batch in batches]

    @torch.no_grad()
    def kl(self, other: Any, count: int | None = None) -> float:
        """Return the mean KL divergence of another model over the first batches; None for all."""
        pairs = list(zip(self._expected, self.batches, strict=True))[:count]
        found = [float(divergence(logits, other(**batch).logits).mean()) for logits, batch in pairs]
        return sum(found) / len(found)


class _ByHand:
    """The calibrated int8 model, whose blocks are put back to float one by one."""

    def __init__(self, comparison: _Comparison, calibrated: Advice) -> None:
        self._comparison = comparison
        self._made = followed(comparison.model, calibrated)
        self._int8 = list(self._made.model.layers)
        with progress_bar(range(len(self._int8)), desc="Blocks, one by one") as bar:
            alone = {block: self._kl([block], SCREENED) for block in bar}
        self._order = sorted(alone, key=alone.__getitem__)

    def blocks(self, goal: float) -> int:
        """Return the smallest number of blocks that keeps a goal."""
        return next(count for count in range(len(self._order) + 1) if self._kl(self._order[:count]) <= goal)

    def _kl(self, blocks: Sequence[int], count: int | None = None) -> float:
        for place, block in enumerate(self._int8):
            self._made.model.layers[place] = self._comparison.model.model.layers[place] if place in blocks else block
        return self._comparison.kl(self._made, count)


def followed(model: nn.Module, advice: Advice) -> Any:
    """Return a copy of a float model that is int8 as an advice says."""
    made = copy.deepcopy(model)
    if advice.calibration is not None:
        advice.calibration.apply(made)
    quantize_(made, advice.config, progress=False)
    return made


def measure(layers: int | None = None) -> list[Outcome]:
    """Return the outcomes for all goals, the first of which needs only a calibration.

    Args:
        layers: How many of the model's layers to keep; None for all 30.
    """
    model: Any = loading.load(loading.SMOLLM2)
    model.model.layers = model.model.layers[:layers]
    ids = loading.tokenizer_of(loading.SMOLLM2, "")(prose(TOPICS), return_tensors="pt").input_ids[:, :TOKENS]
    batches = list(token_batches(model, ids, BATCH))
    comparison = _Comparison(model, batches)
    given = advise(model, batches, kl=1.0).chosen.distance
    calibrated = advise(model, batches, kl=OF_GIVEN * given)
    goals = [share * calibrated.chosen.distance for share in OF_CALIBRATED]
    by_hand = _ByHand(comparison, calibrated)
    outcomes = []
    for advice in (calibrated, *(advise(model, batches, kl=goal) for goal in goals)):
        blocks, in_int8 = by_hand.blocks(advice.goal), advice.steps[0].seconds
        # Blocks are alike.
        seconds = in_int8 + blocks * (advice.in_float.seconds - in_int8) / len(model.model.layers)
        outcomes.append(Outcome(advice, comparison.kl(followed(model, advice)), blocks, seconds))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a table with a row for each goal; goals that are missed and results that are dearer are marked."""
    rows = []
    for advice, again, blocks, by_hand in outcomes:
        chosen = advice.chosen
        rows.append(
            (
                f"{advice.goal:.2g}",
                tables.judged(f"{again:.2g}", again <= advice.goal),
                f"{'calibrated' if advice.calibration is not None else 'as given'}, {chosen.skipped} in float",
                tables.judged(f"{1e3 * chosen.seconds:.2f}", chosen.seconds <= by_hand),
                f"{1e3 * by_hand:.2f}",
                str(blocks),
                f"{1e3 * advice.steps[0].seconds:.2f}",
                f"{1e3 * advice.in_float.seconds:.2f}",
            )
        )
    headers = ("KL allowed", "KL", "linears", "ms", "ms by hand", "blocks by hand", "ms all int8", "ms all float")
    return tables.markdown(rows, headers, left=0)


def main() -> None:
    """Measure and print the table."""
    parser = tables.parser(__doc__)
    parser.add_argument("--layers", type=int, metavar="N", help="keep N of the 30 layers (default: all)")
    args = parser.parse_args()
    outcomes = measure(args.layers)
    heading = (
        f"SmolLM2-135M, {args.layers or 'all'} of 30 layers, {TOKENS} tokens, on {tables.machine()}. "
        "Times are estimates for all linears and one step of one row, in the float dtype of the model."
    )
    tables.emit(f"{heading}\n\n{table(outcomes)}", args.out)


if __name__ == "__main__":
    main()
