"""Speed without a clock: exact counts of what a compiled model does, on a CPU with the kernel.

A count that grows makes the model slower on every machine, perhaps by less than a noisy machine can measure. Each
failure says what changed and where to look. A change that lowers a count lowers the number here, too.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensor

import int8compile
from int8compile.weights import FREED, STORE
from tests.helpers.implementations import needs_kernel, profiled
from tests.helpers.lower_cpu import PAIR, SINGLE, TRIPLE

transformers = pytest.importorskip("transformers")

from tests.helpers.architectures import DECODER  # noqa: E402

pytestmark = needs_kernel

PACKAGE = Path(int8compile.__file__).parent
# Folders of the package, of which passes is beside it in a checkout.
OURS = (str(PACKAGE), str(PACKAGE.parent / "passes"))
LAYERS = 2
IDS = torch.arange(8)[None]


def llama(layers: int = LAYERS) -> nn.Module:
    config = transformers.LlamaConfig(**DECODER | {"num_hidden_layers": layers})
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


class Decoder(nn.Module):
    """A decoder layer with its rotary embedding, as a function of hidden states alone."""

    def __init__(self) -> None:
        super().__init__()
        whole = llama(1).model
        self.layer, self.rotary = whole.layers[0], whole.rotary_emb
        self.register_buffer("positions", torch.arange(8)[None])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, position_embeddings=self.rotary(x, self.positions))


@dataclasses.dataclass
class Code:
    """A compiled model, and the Python code that Inductor generated for it."""

    call: Callable[[], object]
    text: str

    @property
    def calls(self) -> str:
        """Return the code that runs at each call."""
        return re.sub(r"#.*", "", self.text[self.text.index("def call(") :])

    def ours(self) -> dict[str, int]:
        return dict(collections.Counter(re.findall(r"torch\.ops\.int8compile\.(\w+)\.\w+\(", self.calls)))

    def floats(self) -> int:
        """Count products in float."""
        product = r"(?:mm|addmm|bmm|baddbmm|_int_mm|linear)"
        return len(re.findall(rf"extern_kernels\.{product}\(|aten\.{product}\.\w+\(|mkl\._mkl_linear\(", self.calls))

    def kernels(self) -> int:
        """Count calls of generated C++ kernels."""
        return len(re.findall(r"\bcpp_fused\w*\(", self.calls))


def compiled(model: nn.Module, *inputs: Tensor, **options: object) -> Code:
    counters.clear()
    run = torch.compile(model, backend="int8", options=options)
    call = torch.no_grad()(lambda: run(*inputs) if inputs else run(input_ids=IDS, use_cache=False))
    _, codes = run_and_get_code(call)
    assert counters["graph_break"] == {}, (
        f"Dynamo breaks the graph: {dict(counters['graph_break'])}. Each part then has guards and a call of its own. "
        "Look for the named code in int8compile/backend.py and int8compile/ops/, or in a newer transformers."
    )
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == len(codes) == 1, f"the model became {graphs} graphs and {len(codes)} functions instead of 1"
    return Code(call, codes[0])


@dataclasses.dataclass
class Facts:
    """Counts of what compiling a model and calling it does.

    Attributes:
        code: The compiled model.
        quantized: Weights that were quantized until the first call, and after some more.
        dispatched: Operators of a call.
        functions: Functions of this package that a call runs.
    """

    code: Code
    quantized: tuple[int, int]
    dispatched: dict[str, int]
    functions: dict[str, int]


@pytest.fixture(scope="module")
def model() -> Facts:
    before = STORE.quantized
    code = compiled(llama())
    first = STORE.quantized - before
    # The first calls fill caches.
    code.call()
    dispatched = {name: count for name, count in profiled(code.call).items() if re.fullmatch(r"\w+::\w+", name)}
    functions: collections.Counter[str] = collections.Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(OURS) and not frame.f_code.co_name.startswith("<"):
            functions[frame.f_code.co_qualname] += 1

    profiler = sys.getprofile()
    sys.setprofile(count)
    try:
        code.call()
    finally:
        sys.setprofile(profiler)
    return Facts(code, (first, STORE.quantized - before), dispatched, functions)


UNFUSED = (
    "Inductor made {} kernels instead of {}: a fusion is prevented, or a copy was added around an operator of ours; "
    "compare the code (TORCH_LOGS=output_code) with an earlier commit's"
)
# Of a layer: q, k and v; o; gate and up; down.
OF_A_LAYER = {TRIPLE: 1, SINGLE: 2, PAIR: 1}


def test_a_layer_has_four_calls_of_ours_and_no_product_in_float() -> None:
    layer = compiled(Decoder(), torch.randn(1, 8, DECODER["hidden_size"]))
    assert layer.ours() == OF_A_LAYER, (
        "the linears of a decoder layer are grouped otherwise; look at passes/lower_cpu.py and passes/siblings.py"
    )
    assert layer.floats() == 0, "a product of a decoder layer is in float; print int8compile.explain of the model"
    # Norm; rotary embedding, mask and attention's inputs; the first half of the mask; residual and norm; gate.
    assert layer.kernels() == 5, UNFUSED.format(layer.kernels(), 5)


def test_a_model_has_its_layers_calls_and_one_product_in_float(model: Facts) -> None:
    code = model.code
    assert code.ours() == {name: LAYERS * count for name, count in OF_A_LAYER.items()}, (
        "the model's linears are grouped otherwise; look at passes/lower_cpu.py and passes/siblings.py"
    )
    assert code.floats() == 1, f"{code.floats()} products are in float; only lm_head should be"
    # Four for each layer, as above, without the last residual; the mask; the last norm.
    assert code.kernels() == 10, UNFUSED.format(code.kernels(), 10)


def test_no_float_weight_is_copied(model: Facts) -> None:
    """Neither as a constant of the code, nor as a tensor that stays after free_weights."""
    assert not re.search(r"_tensor_constant|\bconstant\d|_frozen_param|freez", model.code.text), (
        "Inductor folded a constant into the code; look at inductor_patches and at `freezing` in int8compile/backend.py"
    )
    freed = llama()
    linears = [each for name, each in freed.named_modules() if isinstance(each, nn.Linear) and name != "lm_head"]
    sizes = [(each.in_features, each.out_features) for each in linears]
    before = float_bytes()
    code = compiled(freed, free_weights=True)
    assert all(type(each.weight) in FREED for each in linears)
    left = float_bytes() - (before - sum(4 * k * n for k, n in sizes))
    # A scale for each output, and the factors of a rotation for each input.
    assert left <= sum(4 * (k + n) for k, n in sizes), (
        f"{left} bytes of new float tensors are alive after free_weights; a graph or the weight store keeps a copy"
    )
    code.call()


def float_bytes() -> int:
    """Return the bytes of all float tensors of this process, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    with torch._C.DisableTorchFunctionSubclass():
        for each in gc.get_objects():
            if not issubclass(type(each), Tensor) or isinstance(each, FakeTensor) or each.device.type != "cpu":
                continue
            if each.layout == torch.strided and each.is_floating_point():
                storages[each.untyped_storage()._cdata] = each.untyped_storage().nbytes()
    return sum(storages.values())


def test_weights_are_quantized_once(model: Facts) -> None:
    first, again = model.quantized
    assert first == 7 * LAYERS, f"compiling quantized {first} weights instead of {7 * LAYERS}"
    assert again == first, (
        f"calls quantized {again - first} weights again although none has changed: look at Snapshot in "
        "int8compile/changes.py"
    )


# Operators of a call that pass the dispatcher, each of which costs about a microsecond: at most so many, and why.
DISPATCHED: Mapping[str, tuple[int, str]] = {
    f"int8compile::{TRIPLE}": (LAYERS, "q, k and v"),
    f"int8compile::{PAIR}": (LAYERS, "gate and up"),
    f"int8compile::{SINGLE}": (2 * LAYERS, "o and down"),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (LAYERS, "attention"),
    "aten::transpose": (6 * LAYERS, "in attention: of q, k, v and the result"),
    "aten::as_strided": (7 * LAYERS, "of each transpose, and of the expanded mask"),
    "aten::expand": (LAYERS, "in attention: the mask"),
    "aten::view": (LAYERS, "in attention: the mask"),
    "aten::empty": (3 * LAYERS, "in attention: its result, logarithms and buffer"),
    "aten::empty_like": (LAYERS, "in attention"),
    "aten::empty_strided": (LAYERS, "in attention"),
    "aten::resolve_conj": (2, "in lm_head's product"),
    "aten::mm": (1, "lm_head"),
    "aten::cumsum": (1, "the mask of transformers"),
    "aten::to": (1, "in cumsum"),
}


def test_what_passes_the_dispatcher(model: Facts) -> None:
    assert_allowed(
        model.dispatched,
        DISPATCHED,
        "dispatches more operators",
        "the generated code (TORCH_LOGS=output_code) for copies and views around our operators",
    )
    assert model.dispatched[f"int8compile::{TRIPLE}"] == LAYERS  # The kernel's operators are seen at all.


def assert_allowed(found: Mapping[str, int], allowed: Mapping[str, tuple[int, str]], what: str, where: str) -> None:
    limits = {name: allowed.get(name, (0, "nothing needs it")) for name in found}
    more = [
        f"{name}: {count} instead of {limits[name][0]} ({limits[name][1]})"
        for name, count in found.items()
        if count > limits[name][0]
    ]
    assert not more, f"a call {what} than before: {'; '.join(more)}. Look at {where}"


# Functions of this package that a call runs, at most so often. Comprehensions are not counted: Python 3.12 has no frame
# for them.
FUNCTIONS: Mapping[str, tuple[int, str]] = {
    "_compile.<locals>.run": (1, "the compiled function: chooses the weights and calls Inductor's code"),
    "_Arguments.__call__": (1, "the arguments of the graph, weights looked up"),
    "_Arguments._find": (1, "the table of weights for this call's parameters"),
    "Snapshot.holds": (7 * LAYERS, "whether a parameter has changed, for each weight"),
    "WeightStore.fused": (2 * LAYERS, "weights that one operator takes together: q, k, v; gate, up"),
    "WeightStore.alone": (2 * LAYERS, "weights of an operator of one: o; down"),
}


def test_python_functions_of_a_call(model: Facts) -> None:
    assert_allowed(
        model.functions,
        FUNCTIONS,
        "runs more Python",
        "_compile in int8compile/backend.py and WeightStore in int8compile/weights.py",
    )
    assert model.functions["Snapshot.holds"] == 7 * LAYERS  # Functions are seen at all.


def test_what_is_not_allowed_is_named() -> None:
    with pytest.raises(AssertionError, match=r"runs more than before: f: 3 instead of 2 \(why\). Look at there"):
        assert_allowed({"f": 3, "g": 1}, {"f": (2, "why"), "g": (1, "")}, "runs more", "there")
    with pytest.raises(AssertionError, match="g: 1 instead of 0"):
        assert_allowed({"g": 1}, {}, "runs more", "there")
