"""Lowering to the CPU kernel: linears that share a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8compile.ops import linear, quantize_weight
from tests.helpers.implementations import needs_kernel, profiled
from tests.helpers.lower_cpu import (
    PAIR,
    SINGLE,
    TRIPLE,
    Siblings,
    assert_equal,
    by_groups,
    by_operators,
    calls,
    weights_of,
)
from tests.helpers.models import INT8_ERROR, CountingBackend, by_column, by_operator, relative_error, rotation_from

pytestmark = needs_kernel


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
    """The threshold is the one for unrotated weights."""
    model, x = Siblings(), torch.randn(5, 32)
    x[1, 2] = 30.0
    compiled = torch.compile(model, backend="int8", fullgraph=True, options={"rotate": False})
    assert calls(compiled, x) == {TRIPLE: 1}
    assert_equal(compiled(x), [by_operator(part, x, None, 6.0) for part in model.parts])
    assert not torch.equal(compiled(x)[0], by_operator(model.parts[0], x, None, 12.0))


def test_sizes_with_few_factors_of_two_share_a_call_too() -> None:
    """These sizes are not rotated."""
    model, x = Siblings(inputs=40), torch.randn(5, 40)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    assert calls(compiled, x) == {TRIPLE: 1}
    assert_equal(compiled(x), [by_operator(part, x, None, 6.0) for part in model.parts])
    assert {weight.d for weight in weights_of(model)} == {None}


def test_linears_that_are_rotated_otherwise_share_no_call() -> None:
    """Numbered modules usually follow one another. Where they do read one x, each has its own d and a right result."""
    model, x = nn.ModuleList(nn.Linear(32, 48) for _ in range(2)).requires_grad_(False), torch.randn(5, 32)
    compiled = torch.compile(lambda x: [part(x) for part in model], backend="int8", fullgraph=True)
    assert calls(compiled, x) == singles(2)
    assert_equal(compiled(x), [by_operator(part, x, rotation_from(part.weight)) for part in model])


def test_columns_stay_with_their_operator() -> None:
    """Outlier columns have no kernel, and cause no graph break."""
    model, x = Siblings(), torch.randn(5, 32)
    x[1, 2] = 9.0
    for threshold in (None, 2.5):
        options = {"outliers": "column", "threshold": threshold}
        compiled = torch.compile(model, backend="int8", fullgraph=True, options=options)
        assert calls(compiled, x) == {"column_linear": 3}
        assert_equal(compiled(x), [by_column(part, x, threshold or 6.0) for part in model.parts])
        assert not torch.equal(compiled(x)[0], by_column(model.parts[0], x, 0.0))


def assert_differentiable(actual: Sequence[Tensor], expected: Sequence[Tensor], x: Tensor) -> None:
    """Require equal bits, and gradients that are close."""
    assert_equal([each.detach() for each in actual], [each.detach() for each in expected])
    grads = [torch.randn_like(each) for each in actual]
    # The same products, added in another order.
    torch.testing.assert_close(
        torch.autograd.grad(actual, x, grads), torch.autograd.grad(expected, x, grads), rtol=1e-5, atol=1e-5
    )


def test_columns_have_gradients() -> None:
    model, x = Siblings(), torch.randn(5, 32, requires_grad=True)
    compiled = torch.compile(model, backend="int8", fullgraph=True, options={"outliers": "column"})
    assert calls(compiled, x) == {"column_linear": 3}
    assert_differentiable(compiled(x), [by_column(part, x) for part in model.parts], x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_biases_of_different_dtypes(dtype: torch.dtype) -> None:
    """Biases are joined in the wider dtype, which holds both."""
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
    """The second bias is computed from the first result."""
    y = m.parts[0](x)
    return [y, F.linear(x, m.parts[1].weight, y[0, :20])]


@torch._dynamo.assume_constant_result
def constant() -> Tensor:
    """Becomes an attribute of the graph, read at its first use."""
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
    """Require the bits of linears that share no call."""
    torch._dynamo.reset()
    monkeypatch.setattr("int8compile.passes.lower_cpu.find_siblings", lambda *_: [])
    assert_equal(actual, torch.compile(lambda x: call(model, x), backend="int8", fullgraph=True)(x))


@pytest.mark.parametrize(("call", "expected"), APART.values(), ids=APART.keys())
def test_what_does_not_share_a_call(
    call: Callable[[Siblings, Tensor], list[Tensor]], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each linear gives the bits it gives alone."""
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
    """The biases of the second and third linears are computed before the second linear."""
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
    """After a write, the linears before it share one call and those after it share another."""
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
    """A fused projection with separate halves: two weights of one parameter."""
    weight, x = nn.Parameter(torch.randn(64, 32), requires_grad=False), torch.randn(5, 32)
    compiled = torch.compile(lambda x: [x @ half.t() for half in weight.chunk(2)], backend="int8", fullgraph=True)
    assert calls(compiled, x) == {PAIR: 1}
    d = rotation_from(*weight.chunk(2))
    assert_equal(compiled(x), [linear(x, *quantize_weight(half, d), d, None, 12.0) for half in weight.chunk(2)])


def test_gradients_keep_them_apart() -> None:
    """Single operators have gradients, equal to those of the unpacked operator."""
    model, x = Siblings(), torch.randn(5, 32, requires_grad=True)
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    assert calls(compiled, x) == {"packed_linear": 3}
    assert_differentiable(compiled(x), by_operators(model, x), x)
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
    """Frozen linears with trained side branches: gradients pass through the second, not through the first."""

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
    # x @ down @ up may be rounded otherwise when compiled, which can move a quantized value by a step.
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
