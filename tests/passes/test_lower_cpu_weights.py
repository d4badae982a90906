"""Lowering to the CPU kernel: the memory of packed weights, int8 heads, and models without the kernel."""

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
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8compile.ops import linear, pack_weight, packed_shape, quantize_weight, weight_only_linear
from int8compile.weights import STORE, FreedWeight
from tests.helpers.implementations import needs_kernel, profiled
from tests.helpers.lower_cpu import (
    PAIR,
    SINGLE,
    TRIPLE,
    Layer,
    Siblings,
    Small,
    assert_equal,
    by_groups,
    by_operators,
    calls,
    weights_of,
)
from tests.helpers.models import INT8_ERROR, CountingBackend, by_operator, relative_error, rotation_from, rotations

pytestmark = needs_kernel


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's linears when packed, with their scales."""
    shapes = [parameter.shape for parameter in model.parameters() if parameter.dim() == 2]
    return sum(math.prod(packed_shape(*shape)) + 4 * shape[0] for shape in shapes)


def storages(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the memory behind tensors, each counted once."""
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def test_a_shared_weight_is_held_once() -> None:
    """The weights are slices of one tensor; no unpacked copy and no packed single weights remain."""

    def alive() -> list[Tensor]:
        gc.collect()
        found = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
        return [each for each in found if each.dtype in (torch.uint8, torch.int8) and each.device.type == "cpu"]

    model, x = Siblings(), torch.randn(5, 32)
    torch.compile(nn.Linear(32, 32).requires_grad_(False), backend="int8")(x)  # Compiling itself leaves tensors behind.
    before = {id(each) for each in alive()}
    bytes_before = STORE.nbytes()
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    compiled(x)
    assert STORE.nbytes() - bytes_before == packed_bytes(model) + 4 * 32  # Plus d.
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
    """There is no reference cycle, which would keep the memory until Python's next collection."""
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
    # The weight is quantized again with its former d.
    assert_equal(compiled(x), by_operators(model, x, rotated=rotated))
    assert STORE.quantized - quantized == 4
    (again,) = {id(weight.fused): weight.fused for weight in weights_of(model)}.values()
    assert again is not None
    assert again.qweight.untyped_storage().data_ptr() == weights_of(model)[0].qweight.data_ptr()
    # Other users of the old tensors are not affected.
    assert torch.equal(fused.qweight, before[0])
    assert torch.equal(fused.scale, before[1])


def test_load_state_dict() -> None:
    for assign in (False, True):
        model, other, x = Siblings(), Siblings(), torch.randn(5, 32)
        compiled = torch.compile(model, backend="int8", fullgraph=True)
        compiled(x)
        rotated = rotations(other if assign else model)  # Parameters keep their d.
        model.load_state_dict(other.state_dict(), assign=assign)
        expected = [by_operator(part, x, d) for part, d in zip(other.parts, rotated.values(), strict=True)]
        assert_equal(compiled(x), expected)
        weights = weights_of(model)
        assert storages([each for weight in weights for each in (weight.qweight, weight.scale)]) == packed_bytes(model)


def test_graphs_that_share_weights_otherwise() -> None:
    """Three graphs take three weights, two, and one; all results are right, and each weight is held once."""
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
    """Single operators read slices of the shared tensor."""
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


@pytest.mark.parametrize("free", [False, True])
def test_regional_compilation(free: bool) -> None:
    """A single graph serves all layers; each layer's weights are joined once."""
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
    # Each layer has one d for its attention, one for gate and up, and one for down.
    assert len({id(weight.d) for weight in weights}) == 36
    names = profiled(run)
    assert [names[f"int8compile::{name}"] for name in (SINGLE, PAIR, TRIPLE)] == [12, 12, 12]


def test_a_llama() -> None:
    pytest.importorskip("transformers")
    from tests.helpers.architectures import IDS, llama

    model, ids = llama().eval().requires_grad_(False), IDS
    compiled = torch.compile(
        lambda ids: model(ids, use_cache=False).logits,
        backend="int8",
        fullgraph=True,
        options={"lm_head": "int8_weight"},
    )
    # o_proj and down_proj share their input with no other linear.
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
    # Both see an update at the next call.
    embedding.weight.mul_(2)
    assert torch.equal(compiled(ids)[0], embedding.weight[:7])
    assert torch.equal(compiled(ids)[1], linear(x * 6, *quantize_weight(embedding.weight, None), None, None, 6.0))


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    """The whole model gives the same bits alone, at other places, and beside other sequences."""
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
    """A head alone."""

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


PROGRAM = """
import hashlib, torch
from int8compile import cpu
from int8compile.weights import STORE
from tests.helpers.lower_cpu import Small
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
    """With INT8COMPILE_CPU_KERNEL=0 weights are not packed, and the definition runs."""
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
    """Inductor's C++ wrapper calls operators without gradients without going through Python."""
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
