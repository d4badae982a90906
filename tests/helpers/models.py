"""Small models that several tests use, and their results by the operators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from int8compile.backend import int8
from int8compile.ops import column_linear, input_scales, linear, quantize_weight, rotation_of, rotation_size


class Block(nn.Module):
    """A residual MLP of two linears, 32 features wide."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Several blocks, frozen, so that grad mode does not keep them in float."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Uses(nn.Module):
    """A frozen model that holds some modules and tensors, used by `call`."""

    def __init__(self, call: Callable[..., Any], **held: Any) -> None:
        super().__init__()
        self.call = call
        for name, value in held.items():
            setattr(self, name, value)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


class CountingBackend:
    """The int8 backend, counting the graphs it receives."""

    def __init__(self, **options: object) -> None:
        self.graphs = 0
        self.options = options

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list) -> Callable[..., object]:
        self.graphs += 1
        return int8(gm, example_inputs, options=self.options)

    # FreedWeight looks for the compiler: a wrapper names the function it wraps, as Dynamo's own wrappers do.
    @property
    def compiler_fn(self) -> Callable[..., object]:
        return int8


def rotation_from(*weights: Tensor) -> Tensor | None:
    """Return the d of weights that share one, without calibration; None where K has few factors of two."""
    return rotation_of(input_scales(weights)) if rotation_size(weights[0].shape[-1]) > 1 else None


# Names of linears that share their input with no other linear of their parent.
_ALONE = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj", "to_out")


def rotations(model: nn.Module) -> dict[nn.Module, Tensor | None]:
    """Return the d of each linear of a model: one d for the linears of a parent with equally many inputs."""
    groups: dict[tuple[str, int], list[nn.Linear]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            group = path if name in _ALONE or name.isdigit() else parent
            groups.setdefault((group, module.in_features), []).append(module)
    return {part: rotation_from(*(each.weight for each in group)) for group in groups.values() for part in group}


def by_operator(part: nn.Linear, x: Tensor, d: Tensor | None, threshold: float | None = None) -> Tensor:
    """Return a linear's result by the operator in eager mode; a compiled linear must equal it."""
    if threshold is None:
        threshold = 6.0 if d is None else 12.0
    return linear(x, *quantize_weight(part.weight, d), d, part.bias, threshold)


def by_column(part: nn.Linear, x: Tensor, threshold: float = 6.0) -> Tensor:
    """Return a linear's result in the column policy."""
    return column_linear(x, *quantize_weight(part.weight, None), part.bias, threshold)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Limit torch to that many threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of the expected tensor."""
    return ((actual - expected).norm() / expected.norm()).item()


# int8 with per-row scales: each factor is off by at most half a step of 1/127 of its row's largest element. For normal
# rows of 32 to 128 elements (largest about 2.5 standard deviations) that is 0.6 % standard error for each factor, so a
# product is about 0.8 % off; 3 % leaves room for two layers and residuals, and is far below what a wrong scale,
# a transposed weight or a missing bias gives.
INT8_ERROR = 0.03


# The d of each linear of a model.
Rotations = dict[nn.Module, Tensor | None]


def reference(
    model: Stack, x: Tensor, threshold: float | None = None, *, rotated: Rotations | None = None, columns: bool = False
) -> Tensor:
    """Return the stack's result by the operators in eager mode; the compiled model must equal it.

    Args:
        model: The stack.
        x: Its input.
        threshold: The threshold of the options.
        rotated: The d of each linear, where it was made from other weights.
        columns: Whether to use the column policy.
    """
    d = rotations(model) if rotated is None else rotated

    def product(part: nn.Linear, x: Tensor) -> Tensor:
        return by_column(part, x, threshold or 6.0) if columns else by_operator(part, x, d[part], threshold)

    for layer in model.layers:
        x = x + product(layer.down, torch.relu(product(layer.up, x)))
    return x


class Attention(nn.Module):
    """Linears of one input."""

    def __init__(self, names: str = "qkv") -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(32, 48))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self.children()]
