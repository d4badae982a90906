"""`quantize_` and `dequantize_`: the modules that become int8, the memory they take, and the way back."""

from __future__ import annotations

import collections
import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import int8compile
from int8compile import (
    BadWeightError,
    ConfigError,
    Int8Config,
    Int8Embedding,
    Int8Experts,
    Int8Linear,
    Int8Warning,
    SkipReason,
    dequantize_,
    memory_footprint,
    quantize_,
)
from int8compile.errors import CheckpointError
from int8compile.groups import make_d
from int8compile.passes.static import WeightView
from int8compile.stored import convert
from int8compile.stored.convert import describe, plan, put_described
from int8compile.weights import STORE
from tests.helpers.models import INT8_ERROR, Stack, relative_error


class LanguageModel(nn.Module):
    """An embedding, a block, and an output projection that may be tied to the embedding."""

    def __init__(self, *, tied: bool = True, embedding: type[nn.Embedding] = nn.Embedding) -> None:
        super().__init__()
        self.embed = embedding(96, 32)
        self.block = Stack(1)
        self.lm_head = nn.Linear(32, 96, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.block(self.embed(ids)))


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 8


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def reasons(report: int8compile.Report) -> dict[str, SkipReason | None]:
    return {site.path: site.reason for site in report.sites}


def int8_parts(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Int8Linear | Int8Embedding)]


# Modules that become int8


@torch.no_grad()
def test_linears_become_int8() -> None:
    model, x = Stack(), torch.randn(5, 32)
    expected, before = model(x), memory_footprint(model)
    report = quantize_(model, progress=False)
    assert int8_parts(model) == [site.path for site in report.rewritten] == [site.path for site in report.sites]
    assert len(report.rewritten) == 4
    assert relative_error(model(x), expected) < INT8_ERROR
    # 4096 weights shrink from 4 bytes to 1; 4 bytes are added for each of 192 outputs and each of 192 rotated inputs.
    assert before - memory_footprint(model) == 2 * (3 * 2 * 32 * 64 - 4 * 96 - 4 * 96)
    totals = report.totals()
    assert (totals["bytes_before"], totals["bytes_after"]) == (4 * 4 * 32 * 64, 4 * 32 * 64 + 4 * 192 + 4 * 192)
    assert str(report).splitlines()[-1].startswith("4 of 4 linears in int8, weights 32.0 KiB -> 9.5 KiB")


@torch.no_grad()
def test_they_are_what_compiling_makes() -> None:
    model, x = Stack(), torch.randn(5, 32)
    compiled = torch.compile(model, backend="int8", fullgraph=True)(x)
    quantize_(model, progress=False)
    assert torch.equal(model(x), compiled)


class Attention(nn.Module):
    """Three projections of one x, one of another x, then a container."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 64), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o_proj = nn.Linear(64, 32)
        self.odd = nn.Linear(40, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.mlp(self.o_proj(q + torch.cat([k, v, k, v], -1)))


@torch.no_grad()
def test_linears_of_one_parent_have_one_rotation() -> None:
    model, x = Attention(), torch.randn(5, 32)
    together = make_d([model.q_proj.weight, model.k_proj.weight, model.v_proj.weight])
    alone = [make_d([module.weight]) for module in (model.o_proj, model.mlp[0], model.mlp[1])]
    skip = {"skip_modules": ["odd"]}
    compiled = torch.compile(copy.deepcopy(model), backend="int8", fullgraph=True, options=skip)(x)
    report = quantize_(model, progress=False)
    assert model.q_proj.d is model.k_proj.d is model.v_proj.d
    assert torch.equal(model.q_proj.d, together)
    for module, d in zip((model.o_proj, *model.mlp), alone, strict=True):
        assert torch.equal(module.d, d)
    # 40 has too few factors of two.
    assert (model.odd.d, model.odd.threshold, model.q_proj.threshold) == (None, 6.0, 12.0)
    assert torch.equal(model(x), compiled)
    rows = {site.path: (site.rotation, site.bytes_after) for site in report.sites}
    assert rows["q_proj"] == (32, 32 * 64 + 4 * 64 + 4 * 32)
    assert rows["k_proj"] == (32, 32 * 16 + 4 * 16), "d counts with the first"
    assert rows["odd"] == (1, 40 * 32 + 4 * 32)
    floats = sum(module.bias.nbytes for module in model.modules() if isinstance(module, Int8Linear))
    assert memory_footprint(model) == sum(size for _, size in rows.values()) + floats
    again = quantize_(model, progress=False)
    assert {site.path: (site.rotation, site.bytes_after) for site in again.sites} == rows


def test_a_linear_that_stays_in_float_has_no_rotation() -> None:
    model = Attention()
    together = make_d([model.k_proj.weight, model.v_proj.weight])
    report = quantize_(model, {"skip_modules": ["q_proj"]}, progress=False)
    assert model.k_proj.d is model.v_proj.d
    assert torch.equal(model.k_proj.d, together)
    rows = {site.path: (site.rotation, site.bytes_after) for site in report.sites}
    assert rows["q_proj"] == (1, 4 * 32 * 64)
    assert rows["k_proj"] == (32, 32 * 16 + 4 * 16 + 4 * 32)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"rotate": False}, {"outliers": "column"}])
def test_what_is_not_rotated(options: dict[str, Any]) -> None:
    model, x = Attention(), torch.randn(5, 32)
    expected = model(x)
    report = quantize_(model, options, progress=False)
    modules = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert {(module.d, module.threshold) for module in modules} == {(None, 6.0)}
    assert {module.outliers for module in modules} == {options.get("outliers", "row")}
    assert {site.rotation for site in report.sites} == {1}
    assert relative_error(model(x), expected) < INT8_ERROR


@torch.no_grad()
def test_rotations_that_were_calibrated_stay() -> None:
    model, x = Attention(), torch.randn(5, 32)
    expected, d = model(x), make_d([model.q_proj.weight]) * 1.5
    STORE.calibrate(
        [
            (each.weight, WeightView((n, 32), (32, 1), 0, (n, 32)))
            for each, n in ((model.q_proj, 64), (model.k_proj, 16))
        ],
        d,
    )
    quantize_(model, progress=False)
    assert model.q_proj.d is model.k_proj.d is d
    assert model.v_proj.d is not d
    assert relative_error(model(x), expected) < INT8_ERROR


def test_twice_changes_nothing() -> None:
    model = LanguageModel()
    config = {"lm_head": "int8_weight", "threshold": 5.0}
    first = quantize_(model, config, progress=False)
    modules, state = dict(model.named_modules()), {name: t.clone() for name, t in model.state_dict().items()}
    second = quantize_(model, config, progress=False)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {site.path: site.runs_in for site in first.rewritten if site.path != "embed"} == {
        site.path: site.runs_in for site in second.rewritten
    }
    # Another config changes nothing either.
    quantize_(model, {"threshold": 0.0}, progress=False)
    assert dict(model.named_modules()) == modules
    assert model.block.layers[0].up.threshold == 5.0


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"skip_modules": ["up"]}, {"layers.0.up": SkipReason.NAME, "layers.1.up": SkipReason.NAME}),
        (Int8Config(skip_modules=("layers.1",)), {"layers.1.up": SkipReason.NAME, "layers.1.down": SkipReason.NAME}),
        (
            {"min_features": 33},
            dict.fromkeys(["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"], SkipReason.SMALL),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:quantize_.. left all")
def test_options(config: Any, kept: dict[str, SkipReason]) -> None:
    model = Stack()
    report = quantize_(model, config, progress=False)
    assert {path: reason for path, reason in reasons(report).items() if reason} == kept
    assert all(isinstance(model.get_submodule(path), nn.Linear) for path in kept)
    assert all(isinstance(model.get_submodule(site.path), Int8Linear) for site in report.rewritten)


def test_a_pattern_that_matches_nothing_is_reported() -> None:
    assert quantize_(Stack(), {"skip_modules": ["layer.0", "up"]}, progress=False).unused_patterns == ("layer.0",)


def test_an_unknown_option_is_refused_before_anything_happens() -> None:
    model = Stack()
    with pytest.raises(ConfigError, match="did you mean 'threshold'"):
        quantize_(model, {"treshold": 6.0})
    assert not int8_parts(model)


def test_nothing_in_int8_is_a_warning() -> None:
    with pytest.warns(Int8Warning, match="left all 4 linears in float. layers.0.up: its module path matches"):
        quantize_(Stack(), {"skip_modules": ["layers"]})


class Odd(nn.Module):
    """Linears that cannot be replaced, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(32, 32)
        self.own_forward = OwnForward(32, 32)
        self.attention = nn.MultiheadAttention(32, 4)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.hooked = nn.Linear(32, 32)
        self.hooked.register_full_backward_hook(lambda *args: None)
        self.double = nn.Linear(32, 32, dtype=torch.float64)
        self.bilinear = nn.Bilinear(32, 32, 32)
        self.recurrent = nn.GRU(32, 32)
        self.experts = nn.Parameter(torch.randn(4, 32, 32))
        self.pointwise = nn.Conv1d(32, 32, 1)
        self.convolution = nn.Conv1d(32, 32, 3)
        self.position = nn.Parameter(torch.randn(1, 16, 32))


def test_what_cannot_be_replaced_is_named() -> None:
    model = Odd()
    found = reasons(quantize_(model, progress=False))
    assert found == {
        "plain": None,
        "own_forward": SkipReason.MODULE,
        "attention.in_proj_weight": SkipReason.MODULE,
        "attention.out_proj": SkipReason.MODULE,
        "hooked": SkipReason.HOOKED,
        "double": SkipReason.DTYPE,
        "bilinear.weight": SkipReason.FORM,
        "recurrent.weight_ih_l0": SkipReason.FORM,
        "recurrent.weight_hh_l0": SkipReason.FORM,
        "experts": SkipReason.MODULE,
        "pointwise.weight": SkipReason.MODULE,
    }
    assert int8_parts(model) == ["plain"]
    x = torch.randn(5, 2, 32)
    assert model.attention(x, x, x)[0].shape == x.shape


@pytest.mark.filterwarnings("ignore:quantize_.. left all")
def test_the_model_itself_cannot_be_replaced() -> None:
    model = nn.Linear(32, 32)
    (site,) = quantize_(model).sites
    assert (site.reason, site.detail) == (SkipReason.MODULE, "it is the model itself; quantize a module that holds it")
    assert isinstance(model, nn.Linear)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights(value: float) -> None:
    model = Stack()
    with torch.no_grad():
        model.layers[1].up.weight[3, 4] = value
    with pytest.raises(BadWeightError, match=r"layers\.1\.up: its weight \[64, 32\] has 1 NaN or Inf"):
        quantize_(model, progress=False)


# Shared weights


@torch.no_grad()
@pytest.mark.parametrize("lm_head", ["int8_weight", "int8"])
def test_a_tie_is_kept(lm_head: str) -> None:
    model, ids = LanguageModel(), torch.tensor([[1, 5, 95]])
    expected = model(ids)
    quantize_(model, {"lm_head": lm_head}, progress=False)
    assert model.embed.qweight is model.lm_head.qweight
    assert model.embed.scale is model.lm_head.scale
    # An embedding table is read by rows, so it is not rotated.
    assert model.embed.d is model.lm_head.d is None
    assert model.lm_head.threshold == 6.0
    assert model.lm_head.weight_only == (lm_head == "int8_weight")
    assert relative_error(model(ids), expected) < INT8_ERROR
    for copied in (copy.deepcopy(model), model.to(torch.bfloat16).float(), model.to("cpu")):
        assert copied.embed.qweight.data_ptr() == copied.lm_head.qweight.data_ptr()
    assert torch.equal(torch.compile(model, backend="int8", fullgraph=True)(ids), model(ids))
    dequantize_(model)
    assert model.embed.weight is model.lm_head.weight
    assert relative_error(model(ids), expected) < INT8_ERROR


def test_the_head_stays_in_float() -> None:
    for tied, reason in ((True, SkipReason.TIED), (False, SkipReason.LM_HEAD)):
        model = LanguageModel(tied=tied)
        assert reasons(quantize_(model, progress=False))["lm_head"] is reason
        assert type(model.embed) is nn.Embedding


def test_an_untied_head_leaves_the_embedding_alone() -> None:
    model = LanguageModel(tied=False)
    quantize_(model, {"lm_head": "int8"}, progress=False)
    assert isinstance(model.lm_head, Int8Linear)
    assert model.lm_head.rotation == 32
    assert type(model.embed) is nn.Embedding


def test_a_head_that_is_tied_to_more_than_an_embedding_stays() -> None:
    model = LanguageModel(embedding=ScaledEmbedding)
    report = quantize_(model, {"lm_head": "int8"}, progress=False)
    (site,) = [site for site in report.skipped if site.path == "lm_head"]
    assert (site.reason, site.detail) == (SkipReason.MODULE, "it is shared with Linear, ScaledEmbedding")


@torch.no_grad()
def test_shared_modules_and_shared_weights() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), torch.randn(5, 32)
    model.append(model[0])
    model[1].weight = model[0].weight
    expected = model(x)
    report = quantize_(model, progress=False)
    assert len(report.rewritten) == 2
    assert model[2] is model[0]
    assert model[1].qweight is model[0].qweight
    assert model[1].d is model[0].d
    assert report.totals()["bytes_after"] == 32 * 32 + 4 * 32 + 4 * 32
    assert memory_footprint(model) == 32 * 32 + 4 * 32 + 4 * 32 + 2 * 4 * 32
    assert relative_error(model(x), expected) < INT8_ERROR
    dequantize_(model)
    assert model[2] is model[0]
    assert model[1].weight is model[0].weight


# Memory


def test_each_float_weight_goes_before_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(3)
    alive = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, nn.Linear)]
    seen = []
    quantize = convert.quantize_checked

    def counting(*args: Any) -> Any:
        seen.append(sum(ref() is not None for ref in alive))
        return quantize(*args)

    monkeypatch.setattr(convert, "quantize_checked", counting)
    quantize_(model, progress=False)
    assert seen == [6, 5, 4, 3, 2, 1]
    assert not any(ref() for ref in alive)


def test_memory_footprint() -> None:
    assert memory_footprint(nn.Linear(32, 64)) == 4 * (32 * 64 + 64)
    assert memory_footprint(LanguageModel()) == memory_footprint(LanguageModel().block) + 4 * 96 * 32
    assert memory_footprint(nn.Linear(32, 64, device="meta")) == 4 * (32 * 64 + 64)
    # A slice counts with its own size, not with that of the whole tensor.
    model, data = nn.Module(), torch.zeros(100)
    model.register_buffer("a", data[:10])
    model.register_buffer("b", data[10:30])
    model.register_buffer("again", data[:10])
    assert memory_footprint(model) == 4 * 30
    model.register_buffer("all", data)
    assert memory_footprint(model) == 4 * 100


@torch.no_grad()
def test_memory_footprint_of_a_compiled_model() -> None:
    model = Stack()
    before = memory_footprint(model)
    biases = 4 * sum(p.numel() for name, p in model.named_parameters() if "bias" in name)
    torch.compile(model, backend="int8", options={"free_weights": True})(torch.randn(5, 32))
    # Where a kernel packs the weight, K is padded to 64.
    assert biases + 4 * 32 * 64 <= memory_footprint(model) <= biases + 4 * 64 * 64 + 4 * 192
    assert memory_footprint(model) < 0.6 * before


def test_a_skeleton() -> None:
    """On the meta device nothing is quantized; the result has the shapes of the int8 model."""
    with torch.device("meta"):
        model = LanguageModel()
    quantize_(model, {"lm_head": "int8_weight"}, progress=False)
    real = LanguageModel()
    quantize_(real, {"lm_head": "int8_weight"}, progress=False)
    assert {name: (t.shape, t.dtype) for name, t in model.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in real.state_dict().items()
    }
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    model.load_state_dict(real.state_dict(), assign=True)
    ids = torch.tensor([[1, 5, 95]])
    assert torch.equal(model(ids), real(ids))


# Descriptions


def described() -> dict[str, dict[str, Any]]:
    model = LanguageModel()
    quantize_(model, {"lm_head": "int8_weight", "threshold": 9.0}, progress=False)
    return describe(model)


def test_a_description_makes_the_modules_again() -> None:
    said, model = described(), LanguageModel().to("meta")
    assert said["block.layers.0.up"] == {
        "source": "linear",
        "dtype": "float32",
        "rotation": 32,
        "threshold": 9.0,
        "outliers": "row",
        "weight_only": False,
    }
    assert said["embed"]["rotation"] == said["lm_head"]["rotation"] == 1
    put_described(model, said, "")
    assert describe(model) == said
    up = model.block.layers[0].up
    assert (up.d.shape, up.d.dtype, up.d.is_meta) == ((32,), torch.float32, True)
    assert model.lm_head.d is None


@pytest.mark.parametrize("rotation", [{}, {"rotation": 0}, {"rotation": 1}])
def test_a_description_of_what_is_not_rotated(rotation: dict[str, int]) -> None:
    """An older version wrote such descriptions."""
    said, model = described(), LanguageModel()
    for options in said.values():
        del options["rotation"]
        options |= rotation
    put_described(model, said, "")
    assert model.block.layers[0].up.d is None
    assert {options["rotation"] for options in describe(model).values()} == {1}


@pytest.mark.parametrize(
    ("path", "rotation", "allowed"),
    [("block.layers.0.up", 64, "1 or 32"), ("block.layers.0.up", "32", "1 or 32"), ("embed", 32, "1")],
)
def test_a_rotation_that_cannot_be_is_refused(path: str, rotation: Any, allowed: str) -> None:
    said = described()
    said[path]["rotation"] = rotation
    message = rf"{path} has the rotation {rotation!r} in the checkpoint; what it can have is {allowed}\. Look"
    with pytest.raises(CheckpointError, match=message):
        put_described(LanguageModel(), said, "Look")


# The way back


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dequantize(dtype: torch.dtype | None) -> None:
    model, x = Stack().eval(), torch.randn(5, 32)
    names = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    expected = model(x)
    quantize_(model, progress=False)
    weight = model.layers[0].up.dequantize()
    dequantize_(model, dtype)
    assert {name: t.shape for name, t in model.state_dict().items()} == {
        name: shape for name, (shape, _) in names.items()
    }
    up = model.layers[0].up
    assert type(up) is nn.Linear
    assert not up.training
    assert torch.equal(up.weight, weight.to(dtype or torch.float32))
    if dtype is None:
        assert {name: (t.shape, t.dtype) for name, t in model.state_dict().items()} == names
        assert relative_error(model(x), expected) < INT8_ERROR


def test_dequantize_follows_a_cast() -> None:
    model = Stack()
    quantize_(model, progress=False)
    dequantize_(model.to(torch.bfloat16))
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16}


def test_dequantize_of_a_float_model_changes_nothing() -> None:
    model = Stack()
    modules = dict(model.named_modules())
    dequantize_(model)
    assert dict(model.named_modules()) == modules


# Modules of transformers


@torch.no_grad()
@pytest.mark.parametrize("square", [True, False])
def test_conv1d(square: bool) -> None:
    """Conv1D's weight is [K, N]; a square weight transposed by mistake would raise no error."""
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model, x = nn.Sequential(Conv1D(32 if square else 64, 32)), torch.randn(5, 32)
    weight, expected = model[0].weight.clone(), model(x)
    assert [target.shape for target in plan(model, Int8Config())] == [(32 if square else 64, 32)]
    quantize_(model, progress=False)
    assert relative_error(model(x), expected) < INT8_ERROR
    dequantize_(model)
    assert type(model[0]) is Conv1D
    assert relative_error(model[0].weight, weight) < INT8_ERROR


def test_experts_become_int8_together() -> None:
    pytest.importorskip("transformers")
    from tests.helpers.architectures import CASES

    case = CASES["mixtral"]
    model = case.build().eval()
    report = quantize_(model, {"skip_modules": ["down_proj"]}, progress=False)
    kept = {site.path.rpartition(".")[2]: site.why() for site in report.skipped if "experts" in site.path}
    assert kept.keys() == {"gate_up_proj", "down_proj"}
    assert kept["gate_up_proj"].endswith("(model.layers.0.mlp.experts.down_proj: pattern 'down_proj')")
    with torch.no_grad():
        model(**case.inputs)


@torch.no_grad()
def test_experts_keep_their_models_config() -> None:
    pytest.importorskip("transformers")
    from tests.helpers.architectures import CASES

    case = CASES["mixtral"]
    model = case.build().eval()
    expected = model(**case.inputs).logits
    implementation = model.config._experts_implementation
    kept = copy.deepcopy(model)
    quantize_(model, progress=False)
    experts = model.model.layers[0].mlp.experts
    # All experts read the same rows in the first product; in the second, each reads its own results.
    assert experts.gate_up_proj.d.shape == experts.gate_up_proj.qweight.shape[2:]
    assert experts.down_proj.d.shape == experts.down_proj.qweight.shape[::2]
    with torch.device("meta"):
        skeleton = case.build()
    quantize_(skeleton, progress=False)
    assert {name: (t.shape, t.dtype) for name, t in skeleton.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in model.state_dict().items()
    }
    report = quantize_(kept, {"outliers": "column"}, progress=False)
    assert {site.reason for site in report.sites if ".experts." in site.path} == {SkipReason.COLUMN_BATCHED}
    assert relative_error(kept(**case.inputs).logits, expected) < INT8_ERROR
    assert isinstance(experts.gate_up_proj, Int8Experts)
    assert isinstance(experts.down_proj, Int8Experts)
    assert experts.config._experts_implementation == "int8"
    assert model.config._experts_implementation == implementation
    assert relative_error(model(**case.inputs).logits, expected) < INT8_ERROR
    # A row does not depend on the other rows of its expert.
    alone = {**case.inputs, "input_ids": case.inputs["input_ids"][1:]}
    torch.testing.assert_close(model(**alone).logits[0], model(**case.inputs).logits[1])
    dequantize_(model)
    assert experts.config._experts_implementation == implementation
    assert isinstance(experts.gate_up_proj, nn.Parameter)
    assert relative_error(model(**case.inputs).logits, expected) < INT8_ERROR


def test_linears_without_weights_yet_have_a_row() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(64), nn.LazyConv1d(64, 1))
    report = quantize_(model, progress=False)
    assert [(site.path, site.reason) for site in report.sites] == [("0", None), ("1", SkipReason.UNINITIALIZED)]
    assert "float: 1: it has no weight before its first call" in str(report)
    assert int8compile.memory_footprint(model) == memory_of(model[0])


def memory_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def test_the_report_has_no_empty_columns() -> None:
    header = str(quantize_(nn.Sequential(nn.Linear(64, 64)))).splitlines()[0]
    assert "runs in" in header
    assert "outliers" not in header
    assert "source" not in header


class Head(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.embed = name, nn.Embedding(64, 32)
        self.add_module(name, nn.Linear(32, 64, bias=False))
        self.get_submodule(name).weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.name)(x + self.embed(torch.arange(3)))


ALIKE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "by name": (lambda: nn.Sequential(nn.Linear(32, 32)), {"skip_modules": ["0"]}),
    "head": (lambda: nn.Sequential(collections.OrderedDict(lm_head=nn.Linear(32, 32))), {}),
    "tied head": (lambda: Head("lm_head"), {}),
    "tied": (lambda: Head("other"), {}),
    "small": (lambda: nn.Sequential(nn.Linear(32, 8)), {}),
    "allowed to be small": (lambda: nn.Sequential(nn.Linear(32, 8)), {"min_features": 8}),
    "int8": (lambda: nn.Sequential(nn.Linear(32, 32)), {}),
}


@pytest.mark.filterwarnings("ignore::int8compile.Int8Warning")
@pytest.mark.parametrize("name", ALIKE)
def test_compile_and_quantize_judge_a_linear_alike(name: str) -> None:
    make, options = ALIKE[name]
    model = make().requires_grad_(False)
    (by_graph,) = int8compile.explain(model, torch.randn(3, 32), config=options).sites
    by_module = quantize_(model, options, progress=False).sites[0]
    for field in ("path", "reason", "detail", "runs_in", "rotation"):
        assert getattr(by_graph, field) == getattr(by_module, field)


def test_settings_of_some_modules() -> None:
    model = Stack()
    report = quantize_(model, {"modules": {"down": {"threshold": 3}, "layers.1.up": {"outliers": "column"}, "no": {}}})
    made = {path: module for path, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert {path: (module.outliers, module.threshold, module.rotation) for path, module in made.items()} == {
        "layers.0.up": ("row", 12.0, 32),
        "layers.0.down": ("row", 3.0, 64),
        "layers.1.up": ("column", 6.0, 1),
        "layers.1.down": ("row", 3.0, 64),
    }
    assert report.unused_patterns == ("no",)
    assert "pattern 'no' matched nothing" in str(report)
