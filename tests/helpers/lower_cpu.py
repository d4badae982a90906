"""A model whose linears share calls, and its results by one operator call for each linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from int8compile.weights import STORE, QuantizedWeight
from tests.helpers.implementations import profiled
from tests.helpers.models import by_operator, rotations

SINGLE, PAIR, TRIPLE = "packed_linear_no_grad", "packed_linear_pair_no_grad", "packed_linear_triple_no_grad"


class Siblings(nn.Module):
    """Linears of one input."""

    def __init__(
        self, outputs: Sequence[int] = (48, 20, 33), bias: bool | Sequence[bool] = True, inputs: int = 32
    ) -> None:
        super().__init__()
        biases = [bias] * len(outputs) if isinstance(bias, bool) else bias
        for i, (n, has) in enumerate(zip(outputs, biases, strict=True)):
            self.add_module(f"part{i}", nn.Linear(inputs, n, bias=has))
        self.requires_grad_(False)

    @property
    def parts(self) -> list[nn.Linear]:
        return list(self.children())  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self.parts]


def by_operators(
    model: Siblings, x: Tensor, threshold: float | None = None, rotated: dict[nn.Module, Tensor | None] | None = None
) -> list[Tensor]:
    """Return the results of all linears, by the operator in eager mode.

    Args:
        model: The linears.
        x: Their input.
        threshold: The threshold of the options.
        rotated: The d of each linear, where it was made from other weights.
    """
    d = rotations(model) if rotated is None else rotated
    return [by_operator(part, x, d[part], threshold) for part in model.parts]


def by_groups(model: nn.Module) -> Callable[[nn.Linear, Tensor], Tensor]:
    """Return a function that computes a linear of the model with the d of its group."""
    d = rotations(model)
    return lambda part, x: by_operator(part, x, d[part])


def calls(compiled: Callable[..., object], *inputs: Tensor) -> dict[str, int]:
    """Count the calls of each of our operators in a compiled function."""
    compiled(*inputs)
    names = profiled(lambda: compiled(*inputs))
    return {name.split("::")[1]: count for name, count in names.items() if name.startswith("int8compile::")}


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one, other)


def weights_of(model: nn.Module) -> list[QuantizedWeight]:
    """Return the int8 weights of a model, in the order of its parameters."""
    return [weight for parameter in model.parameters() for weight in STORE.weights(parameter).values()]


class Layer(nn.Module):
    """Siblings in series, as in a transformer: q, k, v, then gate, up."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Siblings([32, 32, 32]), Siblings([48, 48], bias=False)
        self.down = nn.Linear(48, 32).requires_grad_(False)

    def forward(self, x: Tensor, product: Callable[[nn.Linear, Tensor], Tensor] = nn.Linear.__call__) -> Tensor:
        q, k, v = (product(part, x) for part in self.attention.parts)
        x = x + torch.maximum(torch.minimum(q, k), v)
        gate, up = (product(part, x) for part in self.mlp.parts)
        return x + product(self.down, torch.relu(gate) * up)


class Small(nn.Module):
    """Calls every operator that a graph without gradients can have."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(80, 32), Layer()
        self.lm_head = nn.Linear(32, 80, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.layer(self.embedding(ids)))
