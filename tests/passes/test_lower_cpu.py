"""Lowering to the CPU kernel: which linears share a call, where their weights live, and that nothing else changes."""

from __future__ import annotations

import gc
import hashlib
import math
import os
import pathlib
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8compile.ops import linear, pack_weight, packed_shape, quantize_weight, weight_only_linear
from int8compile.weights import STORE, FreedWeight, QuantizedWeight
from tests.helpers.implementations import needs_kernel, profiled
from tests.helpers.models import (
    INT8_ERROR,
    CountingBackend,
    by_column,
    by_operator,
    relative_error,
    rotation_from,
    rotations,
)

pytestmark = needs_kernel

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
    """All its linears through the operator, in eager mode.

    Args:
        model: The linears.
        x: Their input.
        threshold: That of the options.
        rotated: The d of each, where it was made of other weights.
    """
    d = rotations(model) if rotated is None else rotated
    return [by_operator(part, x, d[part], threshold) for part in model.parts]


def by_groups(model: nn.Module) -> Callable[[nn.Linear, Tensor], Tensor]:
    """What multiplies with the linears of a model, each with the d of its group."""
    d = rotations(model)
    return lambda part, x: by_operator(part, x, d[part])


def calls(compiled: Callable[..., object], *inputs: Tensor) -> dict[str, int]:
    """How often a compiled function calls each operator of ours."""
    compiled(*inputs)
    names = profiled(lambda: compiled(*inputs))
    return {name.split("::")[1]: count for name, count in names.items() if name.startswith("int8compile::")}


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one, other)


# What shares a call


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, {SINGLE: 1}), (2, {PAIR: 1}), (3, {TRIPLE: 1}), (4, {TRIPLE: 1, SINGLE: 1}), (5, {TRIPLE: 1, PAIR: 1})],
)
@pytest.mark.parametrize("bias", [True, False])
def test_linears_of_one_input_share_a_call(count: int, expected: dict[str, int], bias: bool) -> None:
    model, x = Siblings([48, 20, 33, 16, 17][:count], bias), torch.randn(5, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    assert calls(compiled, x) == expected
    assert_equal(compiled(x), by_operators(model, x))


def test_the_threshold_reaches_the_shared_call() -> None:
    model, x = Siblings(), torch.randn(5, 32)
    x[1, 2] = 9.0
    compiled = torch.compile(model, backend="int8", fullgraph=True, options={"threshold": 2.5})
    assert calls(compiled, x) == {TRIPLE: 1}
    assert_equal(compiled(x), by_operators(model, x, 2.5))
    assert not torch.equal(compiled(x)[0], by_operators(model, x)[0])


def test_without_rotation_they_share_a_call_too() -> None:
    """The threshold is that of weights that are not rotated."""
    model, x = Siblings(), torch.randn(5, 32)
    x[1, 2] = 30.0
    compiled = torch.compile(model, backend="int8", fullgraph=True, options={"rotate": False})
    assert calls(compiled, x) == {TRIPLE: 1}
    assert_equal(compiled(x), [by_operator(part, x, None, 6.0) for part in model.parts])
    assert not torch.equal(compiled(x)[0], by_operator(model.parts[0], x, None, 12.0))


def test_sizes_with_few_factors_of_two_share_a_call_too() -> None:
    """They are not rotated."""
    model, x = Siblings(inputs=40), torch.randn(5, 40)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    assert calls(compiled, x) == {TRIPLE: 1}
    assert_equal(compiled(x), [by_operator(part, x, None, 6.0) for part in model.parts])
    assert {weight.d for weight in weights_of(model)} == {None}


def test_linears_that_are_rotated_otherwise_share_no_call() -> None:
    """Numbered ones lie one behind the other as a rule; where they do read one x, each has its own d, and is right."""
    model, x = nn.ModuleList(nn.Linear(32, 48) for _ in range(2)).requires_grad_(False), torch.randn(5, 32)
    compiled = torch.compile(lambda x: [part(x) for part in model], backend="int8", fullgraph=True)
    assert calls(compiled, x) == singles(2)
    assert_equal(compiled(x), [by_operator(part, x, rotation_from(part.weight)) for part in model])


def test_columns_stay_with_their_operator() -> None:
    """There is no kernel for them, and no graph break."""
    model, x = Siblings(), torch.randn(5, 32)
    x[1, 2] = 9.0
    for threshold in (None, 2.5):
        options = {"outliers": "column", "threshold": threshold}
        compiled = torch.compile(model, backend="int8", fullgraph=True, options=options)
        assert calls(compiled, x) == {"column_linear": 3}
        assert_equal(compiled(x), [by_column(part, x, threshold or 6.0) for part in model.parts])
        assert not torch.equal(compiled(x)[0], by_column(model.parts[0], x, 0.0))


def test_columns_have_gradients() -> None:
    model, x = Siblings(), torch.randn(5, 32, requires_grad=True)
    compiled = torch.compile(model, backend="int8", fullgraph=True, options={"outliers": "column"})
    assert calls(compiled, x) == {"column_linear": 3}
    y, expected = compiled(x), [by_column(part, x) for part in model.parts]
    assert_equal([each.detach() for each in y], [each.detach() for each in expected])
    grads = [torch.randn_like(each) for each in y]
    (actual,) = torch.autograd.grad(y, x, grads)
    (wanted,) = torch.autograd.grad(expected, x, grads)
    # The same products, added in another order.
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_biases_of_different_dtypes(dtype: torch.dtype) -> None:
    """They are put together in the wider dtype, which holds both."""
    model, x = Siblings().to(dtype), torch.randn(5, 32, dtype=dtype)
    others = [torch.randn(48), torch.randn(20, dtype=torch.float64), torch.randn(33, dtype=dtype)]
    for part, bias in zip(model.parts, others, strict=True):
        part.bias = nn.Parameter(bias, requires_grad=False)
    expected = by_operators(model, x)
    with torch.autocast("cpu", dtype):
        # Under autocast linears take biases of any dtype.
        fused = torch.compile(model, backend="int8", fullgraph=True)
        assert calls(fused, x) == {TRIPLE: 1}
        assert_equal(fused(x), expected)


def singles(count: int) -> dict[str, int]:
    return {SINGLE: count}


def mutated(m: Siblings, x: Tensor) -> list[Tensor]:
    x = x * 1
    y = m.parts[0](x)
    x.mul_(2)
    return [y, m.parts[1](x)]


def mutated_view(m: Siblings, x: Tensor) -> list[Tensor]:
    x = x * 1
    row = x[1]
    y = m.parts[0](x)
    row[3] = 100.0
    return [y, m.parts[1](x)]


def mutated_by_out(m: Siblings, x: Tensor) -> list[Tensor]:
    x = x * 1
    y = m.parts[0](x)
    torch.add(y[:, :32], 1, out=x)
    return [y, m.parts[1](x)]


def mutated_by_list(m: Siblings, x: Tensor) -> list[Tensor]:
    x = x * 1
    y = m.parts[0](x)
    torch._foreach_mul_([x], 3.0)
    return [y, m.parts[1](x)]


def mutated_in_a_relu(m: Siblings, x: Tensor) -> list[Tensor]:
    x = x * 1
    y = m.parts[0](x)
    F.relu(x, inplace=True)
    return [y, m.parts[1](x)]


def changed_bias(m: Siblings, x: Tensor) -> list[Tensor]:
    bias = x[0, :20] * 1
    y = m.parts[0](x)
    bias.add_(1)
    return [y, F.linear(x, m.parts[1].weight, bias)]


def autocast_between(m: Siblings, x: Tensor) -> list[Tensor]:
    y = m.parts[0](x)
    with torch.autocast("cpu", torch.bfloat16):
        return [y, m.parts[1](x)]


def autocast_left_between(m: Siblings, x: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        y = m.parts[0](x)
    return [y, m.parts[1](x)]


def one_of_a_chain(m: Siblings, x: Tensor) -> list[Tensor]:
    """The bias of the second is made from the first."""
    y = m.parts[0](x)
    return [y, F.linear(x, m.parts[1].weight, y[0, :20])]


@torch._dynamo.assume_constant_result
def constant() -> Tensor:
    """Becomes an attribute of the graph, read where it is used first."""
    return torch.ones(20)


APART: dict[str, tuple[Callable[[Siblings, Tensor], list[Tensor]], dict[str, int]]] = {
    "x is written to": (mutated, singles(2)),
    "a view of x is written to": (mutated_view, singles(2)),
    "x is an out argument": (mutated_by_out, singles(2)),
    "x is in a list that is written to": (mutated_by_list, singles(2)),
    "x goes through an in-place function": (mutated_in_a_relu, singles(2)),
    "a bias is written to": (changed_bias, singles(2)),
    "autocast begins": (autocast_between, singles(2)),
    "autocast ends": (autocast_left_between, singles(2)),
    "a bias is computed": (lambda m, x: [m.parts[0](x), F.linear(x, m.parts[1].weight, x[0, :20])], singles(2)),
    "a bias is an attribute": (lambda m, x: [m.parts[0](x), F.linear(x, m.parts[1].weight, constant())], singles(2)),
    "a bias is made from the other": (one_of_a_chain, singles(2)),
    "another x": (lambda m, x: [m.parts[0](x), m.parts[1](x * 2)], singles(2)),
    "a weight of two sites": (
        lambda m, x: [m.parts[0](x), m.parts[1](x), m.parts[0](torch.relu(x))],
        singles(3),
    ),
    "some without bias": (
        lambda m, x: [m.parts[0](x), F.linear(x, m.parts[1].weight), m.parts[2](x)],
        {PAIR: 1, SINGLE: 1},
    ),
    "only some apart": (
        lambda m, x: [m.parts[0](x), m.parts[1](x * 2), m.parts[2](x)],
        {PAIR: 1, SINGLE: 1},
    ),
}


def assert_as_each_alone(
    actual: list[Tensor],
    call: Callable[[Siblings, Tensor], list[Tensor]],
    model: Siblings,
    x: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit what linears give that share no call."""
    torch._dynamo.reset()
    monkeypatch.setattr("int8compile.passes.lower_cpu.siblings", lambda *_: [])
    assert_equal(actual, torch.compile(lambda x: call(model, x), backend="int8", fullgraph=True)(x))


@pytest.mark.parametrize(("call", "expected"), APART.values(), ids=APART.keys())
def test_what_does_not_share_a_call(
    call: Callable[[Siblings, Tensor], list[Tensor]], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is right, bit for bit: as each alone."""
    model, x = Siblings(), torch.randn(5, 32)
    compiled = torch.compile(lambda x: call(model, x), backend="int8", fullgraph=True)
    assert calls(compiled, x) == expected
    actual, in_float = compiled(x), call(model, x)
    for one, other in zip(actual, in_float, strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one.float(), other.float()) < INT8_ERROR
    assert_as_each_alone(actual, call, model, x, monkeypatch)


def computed_before(m: Siblings, x: Tensor) -> list[Tensor]:
    biases = [part.bias * 2 for part in m.parts]
    return [F.linear(x, part.weight, bias) for part, bias in zip(m.parts, biases, strict=True)]


def computed_in_turns(m: Siblings, x: Tensor) -> list[Tensor]:
    """The biases of the second and the third are there before the second."""
    first = m.parts[0](x)
    biases = [part.bias * 2 for part in m.parts[1:]]
    return [first, *(F.linear(x, part.weight, bias) for part, bias in zip(m.parts[1:], biases, strict=True))]


def attribute_before(m: Siblings, x: Tensor) -> list[Tensor]:
    bias = constant()
    return [F.linear(x, part.weight[:20], bias) for part in m.parts]


BEFORE = {
    "computed": (computed_before, {TRIPLE: 1}),
    "computed in turns": (computed_in_turns, {SINGLE: 1, PAIR: 1}),
    "an attribute": (attribute_before, {TRIPLE: 1}),
}


@pytest.mark.parametrize(("call", "expected"), BEFORE.values(), ids=BEFORE.keys())
def test_biases_that_are_there_before_the_first_call_share_it(
    call: Callable[[Siblings, Tensor], list[Tensor]], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Siblings(), torch.randn(5, 32)
    compiled = torch.compile(lambda x: call(model, x), backend="int8", fullgraph=True)
    assert calls(compiled, x) == expected
    actual = compiled(x)
    assert_as_each_alone(actual, call, model, x, monkeypatch)


def test_later_linears_share_a_call_again() -> None:
    """After a write: those before it among themselves, those after it too."""
    model = Siblings([16, 17, 18, 19])

    def call(x: Tensor) -> list[Tensor]:
        x = x * 1
        before = [part(x) for part in model.parts[:2]]
        x.add_(1)
        return before + [part(x) for part in model.parts[2:]]

    x = torch.randn(5, 32)
    compiled = torch.compile(call, backend="int8", fullgraph=True)
    assert calls(compiled, x) == {PAIR: 2}
    assert_equal(compiled(x), by_operators(model, x)[:2] + by_operators(model, x + 1)[2:])


def test_views_of_one_parameter_share_a_call() -> None:
    """A fused projection whose halves are used apart: two weights of one parameter."""
    weight, x = nn.Parameter(torch.randn(64, 32), requires_grad=False), torch.randn(5, 32)
    compiled = torch.compile(lambda x: [x @ half.t() for half in weight.chunk(2)], backend="int8", fullgraph=True)
    assert calls(compiled, x) == {PAIR: 1}
    d = rotation_from(*weight.chunk(2))
    assert_equal(compiled(x), [linear(x, *quantize_weight(half, d), d, None, 12.0) for half in weight.chunk(2)])


def test_gradients_keep_them_apart() -> None:
    """Operators with a formula for gradients, whose gradients are those of the unpacked operator."""
    model, x = Siblings(), torch.randn(5, 32, requires_grad=True)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    assert calls(compiled, x) == {"packed_linear": 3}
    y, expected = compiled(x), by_operators(model, x)
    assert_equal([each.detach() for each in y], [each.detach() for each in expected])
    grads = [torch.randn_like(each) for each in y]
    (actual,) = torch.autograd.grad(y, x, grads)
    (wanted,) = torch.autograd.grad(expected, x, grads)
    # The same products, added in another order.
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert calls(compiled, x) == {TRIPLE: 1}


def test_a_trained_bias_gets_its_gradient() -> None:
    model, x = Siblings([48, 20]), torch.randn(5, 32)
    model.parts[1].bias.requires_grad_(True)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    assert calls(compiled, x) == {SINGLE: 1, "packed_linear": 1}
    compiled(x)[1].sum().backward()
    assert torch.equal(model.parts[1].bias.grad, torch.full((20,), 5.0))


def test_lora() -> None:
    """Frozen linears with trained side branches: the second is differentiated through, the first is not."""

    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 40)
            self.requires_grad_(False)
            self.down, self.up = (nn.Parameter(torch.randn(shape) / 8) for shape in ((32, 4), (4, 48)))

        def forward(self, x: Tensor, product: Callable[[nn.Linear, Tensor], Tensor] = nn.Linear.__call__) -> Tensor:
            return product(self.second, torch.relu(product(self.first, x) + x @ self.down @ self.up))

    model, x = Lora(), torch.randn(5, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    product = by_groups(model)
    y, expected = compiled(x), model(x, product)
    # x @ down @ up may be compiled to other roundings, and those can move a quantized value by a step.
    assert relative_error(y, expected) < INT8_ERROR
    y.square().sum().backward()
    actual = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    model(x, product).square().sum().backward()
    assert set(actual) == {"down", "up"}
    for name, grad in actual.items():
        assert relative_error(grad, model.get_parameter(name).grad) < INT8_ERROR
    names = profiled(lambda: compiled(x))
    assert (names[f"int8compile::{SINGLE}"], names["int8compile::packed_linear"]) == (1, 1)


SPELLINGS: dict[str, Callable[[Siblings, Tensor], list[Tensor]]] = {
    "rows": lambda m, x: [part(x) for part in m.parts],
    "one row": lambda m, x: [part(x[0]) for part in m.parts],
    "three dimensions": lambda m, x: [part(x[None].expand(3, 5, 32)) for part in m.parts],
    "transposed x": lambda m, x: [part(x.t().contiguous().t()) for part in m.parts],
    "transposed leading dimensions": lambda m, x: [part(x.expand(3, 5, 32).transpose(0, 1)) for part in m.parts],
    "matmul": lambda m, x: [x @ part.weight.t() for part in m.parts],
    "transposed results": lambda m, x: [part(x).t() for part in m.parts],
    "weight first": lambda m, x: [part.weight @ x.t() for part in m.parts],
    "einsum into heads": lambda m, x: [torch.einsum("sk,hdk->hsd", x, m.parts[0].weight.unflatten(0, (4, 12)))],
}


@pytest.mark.parametrize("call", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_strides_are_those_of_eager_mode(call: Callable[[Siblings, Tensor], list[Tensor]]) -> None:
    model, x = Siblings(), torch.randn(5, 32)
    actual = torch.compile(lambda x: call(model, x), backend="int8", fullgraph=True)(x)
    for one, other in zip(actual, call(model, x), strict=True):
        assert (one.shape, one.stride()) == (other.shape, other.stride())
        assert relative_error(one, other) < INT8_ERROR


def test_any_number_of_rows() -> None:
    model, backend = Siblings(), CountingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for rows in (5, 9, 2, 40):
        x = torch.randn(rows, 32)
        assert_equal(compiled(x), by_operators(model, x))
    assert backend.graphs == 2
    assert calls(compiled, torch.randn(17, 32)) == {TRIPLE: 1}


def test_experts_are_packed() -> None:
    experts, x = nn.Parameter(torch.randn(3, 32, 40), requires_grad=False), torch.randn(3, 5, 32)
    compiled = torch.compile(lambda x: torch.bmm(x, experts), backend="int8", fullgraph=True)
    assert calls(compiled, x) == {"packed_batched_linear": 1}
    d = torch.stack([rotation_from(expert.mT) for expert in experts])
    expected = torch.ops.int8compile.batched_linear(x, *quantize_weight(experts.mT, d), d, None, 12.0)
    assert torch.equal(compiled(x), expected)


# Where the weights live


def weights_of(model: nn.Module) -> list[QuantizedWeight]:
    """The int8 weights of a model, in the order of its parameters."""
    return [weight for parameter in model.parameters() for weight in STORE.weights(parameter).values()]


def packed_bytes(model: nn.Module) -> int:
    """What a model's linears take when packed, with their scales."""
    shapes = [parameter.shape for parameter in model.parameters() if parameter.dim() == 2]
    return sum(math.prod(packed_shape(*shape)) + 4 * shape[0] for shape in shapes)


def storages(tensors: Sequence[Tensor]) -> int:
    """Bytes of the memory behind tensors, each counted once."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def test_a_shared_weight_is_held_once() -> None:
    """Slices of one tensor; neither an unpacked copy nor the packed ones that it was put together from are left."""

    def alive() -> list[Tensor]:
        gc.collect()
        found = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
        return [each for each in found if each.dtype in (torch.uint8, torch.int8) and each.device.type == "cpu"]

    model, x = Siblings(), torch.randn(5, 32)
    torch.compile(nn.Linear(32, 32).requires_grad_(False), backend="int8")(x)  # What compiling itself leaves behind.
    before = {id(each) for each in alive()}
    bytes_before = STORE.nbytes()
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    compiled(x)
    assert STORE.nbytes() - bytes_before == packed_bytes(model) + 4 * 32  # And what rotates them.
    weights = weights_of(model)
    assert storages([each for weight in weights for each in (weight.qweight, weight.scale)]) == packed_bytes(model)
    fused = weights[0].fused
    assert fused is not None
    assert all(weight.fused is fused for weight in weights)
    assert {weight.qweight.untyped_storage().data_ptr() for weight in weights} == {fused.qweight.data_ptr()}
    new = [each for each in alive() if id(each) not in before]
    assert storages(new) == fused.qweight.nbytes
    d = rotation_from(*(part.weight for part in model.parts))
    for part, weight in zip(model.parts, weights, strict=True):
        assert torch.equal(weight.qweight, pack_weight(quantize_weight(part.weight, d)[0]))
        assert torch.equal(weight.d, d)
    assert len({id(weight.d) for weight in weights}) == 1


def test_memory_goes_with_the_model_at_once() -> None:
    """No reference cycle: it would stay until Python looks for cycles, which takes long."""
    model = Siblings()
    torch.compile(model, backend="int8")(torch.randn(5, 32))
    memory = weakref.ref(weights_of(model)[0].fused)
    torch._dynamo.reset()
    gc.collect()
    assert memory() is not None
    gc.disable()
    try:
        del model
        assert memory() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_stale_member_is_replaced_and_joined_again(changed: int) -> None:
    model, x, quantized = Siblings(), torch.randn(5, 32), STORE.quantized
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    compiled(x)
    assert STORE.quantized - quantized == 3
    fused = weights_of(model)[0].fused
    assert fused is not None
    before, rotated = (fused.qweight.clone(), fused.scale.clone()), rotations(model)
    model.parts[changed].weight.copy_(torch.randn_like(model.parts[changed].weight))
    # It is quantized again with the d that it had.
    assert_equal(compiled(x), by_operators(model, x, rotated=rotated))
    assert STORE.quantized - quantized == 4
    (again,) = {id(weight.fused): weight.fused for weight in weights_of(model)}.values()
    assert again is not None
    assert again.qweight.untyped_storage().data_ptr() == weights_of(model)[0].qweight.data_ptr()
    # Whoever computes with the old ones goes on with them.
    assert torch.equal(fused.qweight, before[0])
    assert torch.equal(fused.scale, before[1])


def test_load_state_dict() -> None:
    for assign in (False, True):
        model, other, x = Siblings(), Siblings(), torch.randn(5, 32)
        compiled = torch.compile(model, backend="int8", fullgraph=True)
        compiled(x)
        rotated = rotations(other if assign else model)  # Parameters keep theirs.
        model.load_state_dict(other.state_dict(), assign=assign)
        expected = [by_operator(part, x, d) for part, d in zip(other.parts, rotated.values(), strict=True)]
        assert_equal(compiled(x), expected)
        weights = weights_of(model)
        assert storages([each for weight in weights for each in (weight.qweight, weight.scale)]) == packed_bytes(model)


def test_graphs_that_share_weights_otherwise() -> None:
    """One graph takes three together, another two of them or one: right, in turns, and held once in the end."""
    model, x, quantized = Siblings(), torch.randn(5, 32), STORE.quantized
    expected, rotated = by_operators(model, x), rotations(model)
    all_three = torch.compile(model, backend="int8", fullgraph=True)
    two = torch.compile(lambda x: [model.parts[2](x), model.parts[0](x)], backend="int8", fullgraph=True)
    one = torch.compile(lambda x: [model.parts[1](x)], backend="int8", fullgraph=True)
    for _ in range(3):
        assert_equal(all_three(x), expected)
        assert_equal(one(x), expected[1:2])
        assert_equal(two(x), [expected[2], expected[0]])
        assert_equal(one(x), expected[1:2])
    assert STORE.quantized - quantized == 3
    model.parts[0].weight.mul_(3)
    expected[0] = by_operator(model.parts[0], x, rotated[model.parts[0]])
    assert_equal(two(x), [expected[2], expected[0]])
    assert_equal(all_three(x), expected)
    weights = weights_of(model)
    assert storages([each for weight in weights for each in (weight.qweight, weight.scale)]) == packed_bytes(model)


def test_with_and_without_gradients_they_are_held_once() -> None:
    """Single operators read slices of what the shared one reads."""
    model, x = Siblings(), torch.randn(5, 32, requires_grad=True)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    with torch.no_grad():
        expected = compiled(x)
    fused = weights_of(model)[0].fused
    assert_equal([each.detach() for each in compiled(x)], expected)
    with torch.no_grad():
        assert_equal(compiled(x), expected)
    weights = weights_of(model)
    assert all(weight.fused is fused for weight in weights)
    assert storages([each for weight in weights for each in (weight.qweight, weight.scale)]) == packed_bytes(model)


def test_free_weights() -> None:
    model, x = Siblings(), torch.randn(5, 32)
    expected = by_operators(model, x)
    compiled = torch.compile(model, backend="int8", fullgraph=True, options={"free_weights": True})
    for _ in range(3):
        assert_equal(compiled(x), expected)
    assert calls(compiled, x) == {TRIPLE: 1}
    assert all(isinstance(part.weight, FreedWeight) for part in model.parts)
    assert sum(part.weight.untyped_storage().nbytes() for part in model.parts) == 0
    more = torch.cat([x, x])
    assert_equal(compiled(more), [torch.cat([each, each]) for each in expected])
    new = Siblings()
    model.load_state_dict(new.state_dict(), assign=True)
    assert_equal(compiled(x), by_operators(new, x))


class Layer(nn.Module):
    """Siblings in series: q, k, v and gate, up, as a transformer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Siblings([32, 32, 32]), Siblings([48, 48], bias=False)
        self.down = nn.Linear(48, 32).requires_grad_(False)

    def forward(self, x: Tensor, product: Callable[[nn.Linear, Tensor], Tensor] = nn.Linear.__call__) -> Tensor:
        q, k, v = (product(part, x) for part in self.attention.parts)
        x = x + torch.maximum(torch.minimum(q, k), v)
        gate, up = (product(part, x) for part in self.mlp.parts)
        return x + product(self.down, torch.relu(gate) * up)


@pytest.mark.parametrize("free", [False, True])
def test_regional_compilation(free: bool) -> None:
    """One graph serves all layers, each with its own weights, each layer's put together once."""
    layers, x, backend = (
        nn.ModuleList(Layer() for _ in range(12)),
        torch.randn(5, 32),
        CountingBackend(free_weights=free),
    )
    quantized = STORE.quantized
    expected = x
    for layer in layers:
        expected = layer(expected, by_groups(layer))
        layer.compile(backend=backend, fullgraph=True)

    def run() -> Tensor:
        y = x
        for layer in layers:
            y = layer(y)
        return y

    for _ in range(3):
        assert torch.equal(run(), expected)
    assert backend.graphs <= (2 if free else 1)
    assert STORE.quantized - quantized == 12 * 6
    weights = weights_of(layers)
    assert len({id(weight.fused) for weight in weights if weight.fused is not None}) == 24
    # Each layer has a d for its attention, one for gate and up, and one for down.
    assert len({id(weight.d) for weight in weights}) == 36
    names = profiled(run)
    assert [names[f"int8compile::{name}"] for name in (SINGLE, PAIR, TRIPLE)] == [12, 12, 12]


def test_a_llama() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
    )
    model, ids = transformers.LlamaForCausalLM(config).eval().requires_grad_(False), torch.arange(14).view(2, 7)
    compiled = torch.compile(
        lambda ids: model(ids, use_cache=False).logits,
        backend="int8",
        fullgraph=True,
        options={"lm_head": "int8_weight"},
    )
    # o_proj and down_proj have their inputs for themselves.
    assert calls(compiled, ids) == {TRIPLE: 1, PAIR: 1, SINGLE: 2, "packed_weight_only_linear_no_grad": 1}
    assert relative_error(compiled(ids), model(ids).logits) < INT8_ERROR


# lm_head="int8_weight"


class Transformer(nn.Module):
    """A small decoder, its head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, 32)
        self.norm = nn.RMSNorm(32)
        self.layer = Layer()
        self.mix = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 80, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        y = self.norm(x)[:, None]
        x = self.layer(x + F.scaled_dot_product_attention(y, y, y, is_causal=True)[:, 0])
        return self.lm_head(self.mix(self.norm(x)))


def test_a_tied_head_leaves_the_table_in_float() -> None:
    embedding, ids = nn.Embedding(80, 32).requires_grad_(False), torch.arange(7)
    lm_head = nn.Linear(32, 80, bias=False)
    lm_head.weight = embedding.weight
    for lm, free in (("int8_weight", False), ("int8_weight", True), ("int8", False)):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda ids: (embedding(ids), lm_head(embedding(ids) * 3)),
            backend="int8",
            fullgraph=True,
            options={"lm_head": lm, "free_weights": free},
        )
        x, logits = compiled(ids)
        assert torch.equal(x, embedding.weight[:7])
        qweight, scale = quantize_weight(embedding.weight, None)
        expected = weight_only_linear(x * 3, qweight, scale, None, None)
        if lm == "int8":
            expected = linear(x * 3, qweight, scale, None, None, 6.0)
        assert torch.equal(logits, expected)
        assert not isinstance(embedding.weight, FreedWeight)
        assert 0 < relative_error(logits, lm_head(x * 3)) < (INT8_ERROR if lm == "int8" else INT8_ERROR / 2)
        operator = SINGLE if lm == "int8" else "packed_weight_only_linear_no_grad"
        assert calls(compiled, ids) == {operator: 1}
    # An update is seen by both, at the next call.
    embedding.weight.mul_(2)
    assert torch.equal(compiled(ids)[0], embedding.weight[:7])
    assert torch.equal(compiled(ids)[1], linear(x * 6, *quantize_weight(embedding.weight, None), None, None, 6.0))


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    """The whole model, bit by bit: alone, at other places, beside other sequences."""
    model, ids = Transformer(), torch.randint(80, (6, 9))
    compiled = torch.compile(model, backend="int8", fullgraph=True, dynamic=True, options={"lm_head": "int8_weight"})
    logits = compiled(ids)
    assert relative_error(logits, model(ids)) < INT8_ERROR
    for chosen in ([3], [0, 1], [5, 4, 3, 2, 1, 0], [2, 2, 2, 1]):
        assert torch.equal(compiled(ids[chosen]), logits[chosen])
    others = torch.where(torch.arange(6)[:, None] == 3, ids, torch.randint(80, (6, 9)))
    assert torch.equal(compiled(others)[3], logits[3])
    names = calls(compiled, ids)
    assert names["packed_weight_only_linear_no_grad"] == 1


class Headed(nn.Module):
    """Nothing but a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(32, 80)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lm_head_in_half(dtype: torch.dtype) -> None:
    model, x = Headed().to(dtype), torch.randn(5, 32, dtype=dtype)
    compiled = torch.compile(model, backend="int8", fullgraph=True, options={"lm_head": "int8_weight"})
    head = model.lm_head
    d = rotation_from(head.weight)
    assert torch.equal(compiled(x), weight_only_linear(x, *quantize_weight(head.weight, d), d, head.bias))
    assert calls(compiled, x) == {"packed_weight_only_linear_no_grad": 1}


def test_gradients_through_an_int8_weight_head() -> None:
    model, x = Headed(), torch.randn(5, 32, requires_grad=True)
    compiled = torch.compile(model, backend="int8", fullgraph=True, options={"lm_head": "int8_weight"})
    assert calls(compiled, x) == {"packed_weight_only_linear": 1}
    y, head = compiled(x), model.lm_head
    grad = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, x, grad)
    d = rotation_from(head.weight)
    y = weight_only_linear(x, *quantize_weight(head.weight, d), d, head.bias)
    torch.testing.assert_close(actual, torch.autograd.grad(y, x, grad)[0], rtol=1e-5, atol=1e-5)


# Without the kernel, and through Inductor's C++ wrapper


class Small(nn.Module):
    """Every operator of a graph without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(80, 32), Layer()
        self.lm_head = nn.Linear(32, 80, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.layer(self.embedding(ids)))


PROGRAM = """
import hashlib, torch
from int8compile import cpu
from int8compile.weights import STORE
from tests.passes.test_lower_cpu import Small
assert not cpu.available()
torch.manual_seed(0)
model, ids = Small(), torch.randint(80, (9,))
options = {"lm_head": "int8_weight"}
logits = torch.compile(model, backend="int8", fullgraph=True, options=options)(ids)
packed = {weight.qweight.dtype for p in model.parameters() for weight in STORE.weights(p).values()}
assert packed == {torch.int8}, packed
print("bits", hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_without_the_kernel_the_numbers_are_the_same() -> None:
    """INT8COMPILE_CPU_KERNEL=0: weights are not packed, and the definition runs."""
    torch.manual_seed(0)
    model, ids = Small(), torch.randint(80, (9,))
    logits = torch.compile(model, backend="int8", fullgraph=True, options={"lm_head": "int8_weight"})(ids)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"INT8COMPILE_CPU_KERNEL": "0"},
        cwd=pathlib.Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert f"bits {hashlib.sha256(logits.numpy().tobytes()).hexdigest()}" in result.stdout.splitlines()


def test_cpp_wrapper_gives_the_same_bits() -> None:
    """Inductor's C++ wrapper calls the operators that need no gradients without Python."""
    from torch._inductor.utils import run_and_get_code

    model, ids = Small(), torch.randint(80, (9,))
    expected = torch.compile(model, backend="int8", fullgraph=True, options={"lm_head": "int8_weight"})(ids)
    torch._dynamo.reset()
    options = {"lm_head": "int8_weight", "inductor": {"cpp_wrapper": True, "fx_graph_cache": False}}
    compiled = torch.compile(model, backend="int8", fullgraph=True, options=options)
    logits, (code, *_) = run_and_get_code(compiled, ids)
    assert torch.equal(logits, expected)
    called = re.findall(r'aoti_torch_call_dispatcher\("int8compile::(\w+)"', code)
    assert sorted(called) == sorted([SINGLE, PAIR, TRIPLE, "packed_weight_only_linear_no_grad"])
