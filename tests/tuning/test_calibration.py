"""calibrate(): its statistics are those of the linears' inputs, and all int8 conversions use them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import int8compile
from int8compile import Calibration, CheckpointError, ConfigError, FreedWeightError, InputError, Int8Warning, ModelError
from int8compile.ops import input_scales, reference, rotation_of
from int8compile.passes import WeightView
from int8compile.tuning.calibration import token_batches
from int8compile.tuning.statistics import FEW
from int8compile.weights import STORE, rotation_of_view
from tests.helpers.configs import SMALL
from tests.helpers.models import Stack, relative_error


def statistics(x: Tensor) -> Tensor:
    """Return a by NUMERICS.md, row by row."""
    rows = [row.double() for row in x.reshape(-1, x.shape[-1])]
    rows = [row for row in rows if row.isfinite().all() and row.any()]
    return torch.stack([row.square() / row.square().mean() for row in rows]).mean(dim=0).sqrt()


def d_from(weights: list[Tensor], x: Tensor) -> Tensor:
    return rotation_of(input_scales([weight.detach() for weight in weights], statistics(x)))


def whole(weight: Tensor) -> WeightView:
    return WeightView(tuple(weight.shape), weight.stride(), 0, tuple(weight.shape))


def rotation(weight: Tensor, view: WeightView | None = None) -> Tensor | None:
    """Return a parameter's d if a calibration has set it."""
    found = rotation_of_view(weight, view or whole(weight))
    return found.d if found is not None and found.calibrated else None


def inputs(rows: int = 64, k: int = 32) -> Tensor:
    """Return activations whose columns have very different sizes."""
    return torch.randn(rows, k) * torch.logspace(-1, 1, k)


class Attention(nn.Module):
    """q reads one x, k and v another; gate and up read one x in different spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.gate = nn.Parameter(torch.randn(32, 64))
        self.up = nn.Linear(32, 64, bias=False)
        self.o_proj = nn.Linear(64, 32)
        self.unused = nn.Linear(32, 32)
        self.odd = nn.Linear(24, 32)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.q(x) + self.k(other) * self.v(other)
        z = torch.einsum("mk,kn->mn", y, self.gate).relu() * self.up(y)
        return self.o_proj(z) + self.odd(y[:, :24])


def test_groups_and_statistics() -> None:
    model, x, other = Attention(), inputs(), inputs().flip(1)
    calibration = int8compile.calibrate(model, [(x, other)], progress=False)
    y = (model.q(x) + model.k(other) * model.v(other)).detach()
    z = ((y @ model.gate).relu() * model.up(y)).detach()
    names = [[weight.name for weight in group.weights] for group in calibration.groups]
    # A bare parameter is a group of its own.
    assert names == [["q.weight"], ["k.weight", "v.weight"], ["gate"], ["up.weight"], ["o_proj.weight"]]
    for group, read in zip(calibration.groups, (x, other, y, y, z), strict=True):
        assert group.rows == 64
        torch.testing.assert_close(group.activations, statistics(read), rtol=1e-4, atol=0)
        weights = [weight.view.of(model.get_parameter(weight.name)) for weight in group.weights]
        torch.testing.assert_close(group.d, d_from(weights, read), rtol=1e-4, atol=0)
        assert all(rotation(model.get_parameter(each.name), each.view) is group.d for each in group.weights)
    assert calibration.missing == {
        "unused.weight": "it was not used, or its use stays in float (see int8compile.explain)",
        "odd.weight": "its inputs are not rotated, their number is not a multiple of 16",
    }
    table = str(calibration)
    assert "k, v " in table
    assert "6 linears calibrated, in 5 groups" in table
    assert "- not calibrated: odd.weight: its inputs are not rotated" in table


def test_gradients_flow_through_what_was_calibrated_in_inference_mode() -> None:
    model, x = Stack(1).layers[0].requires_grad_(False), inputs().requires_grad_()
    with torch.inference_mode():
        calibration = int8compile.calibrate(model, [inputs()], progress=False)
    assert not any(group.d.is_inference() for group in calibration.groups)
    with torch.enable_grad():
        torch.compile(model, backend="int8", fullgraph=True)(x).sum().backward()
        expected = torch.autograd.grad(model(x).sum(), x)[0]
    assert relative_error(x.grad, expected) < 0.02


def test_no_weight_is_kept_alive() -> None:
    """Dynamo keeps its backends as long as the process lives."""
    model = Stack(1)
    memory = [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
    int8compile.calibrate(model, [inputs()], progress=False)
    int8compile.quantize_(model, progress=False)
    gc.collect()
    assert sum(each() is not None for each in memory) == sum(1 for _ in model.parameters())


def test_rows_that_cannot_be_used_are_left_out() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32)), inputs()
    expected = statistics(x[10:])
    x[:4] = 0
    x[4:7, 3] = torch.nan
    x[7:10, 5] = torch.inf
    (group,) = int8compile.calibrate(model, [x], progress=False).groups
    assert group.rows == 54
    torch.testing.assert_close(group.activations, expected)


def test_a_group_without_a_usable_row_is_not_calibrated() -> None:
    model = Stack(1)
    with pytest.warns(Int8Warning, match="calibrate.. has calibrated nothing: no linear is calibrated"):
        calibration = int8compile.calibrate(model.layers[0].up, [torch.zeros(8, 32)], progress=False)
    assert calibration.groups == ()
    assert calibration.missing == {"weight": "no row of its input was usable (all zero, NaN or Inf)"}
    assert str(calibration).startswith("no linear is calibrated")
    assert rotation(model.layers[0].up.weight) is None


def test_it_stops_when_every_linear_has_seen_enough() -> None:
    given = []

    def batches() -> Iterator[Tensor]:
        while True:
            given.append(inputs(20))
            yield given[-1]

    calibration = int8compile.calibrate(Stack(1), batches(), tokens=50, progress=False)
    assert len(given) == 3
    # 20 rows, 20 rows, and every second row of the last batch.
    assert [group.rows for group in calibration.groups] == [50, 50]
    read = torch.cat([given[0], given[1], given[2][::2]])
    torch.testing.assert_close(calibration.groups[0].activations, statistics(read))


def test_a_module_that_is_called_twice_has_the_rows_of_both() -> None:
    linear, x = nn.Linear(32, 32), inputs()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x))

    (group,) = int8compile.calibrate(Twice(), [x], progress=False).groups
    assert group.rows == 128
    torch.testing.assert_close(group.activations, statistics(torch.cat([x, linear(x).detach()])), rtol=1e-4, atol=0)


class Breaking(nn.Module):
    """A graph break in each of several modules with the same code, which share their graphs."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x).relu()
            torch._dynamo.graph_break()
            return self.down(y)

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(self.Part() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def test_graph_breaks_and_graphs_that_several_modules_share() -> None:
    model, x = Breaking(), inputs()
    calibration = int8compile.calibrate(model, [x], progress=False)
    assert len(calibration.groups) == 6
    for part in model.parts:
        y = part.up(x).relu().detach()
        for linear, read in ((part.up, x), (part.down, y)):
            found = rotation(linear.weight)
            assert found is not None
            torch.testing.assert_close(found, d_from([linear.weight], read), rtol=1e-4, atol=0)
        x = part.down(y).detach()


def test_sizes_may_differ_from_batch_to_batch() -> None:
    model = Stack(1)
    batches = [inputs(rows).view(1, rows, 32) for rows in (3, 7, 5, 9, 2, 6, 8, 4, 11, 10, 12)]
    calibration = int8compile.calibrate(model, batches, progress=False)
    assert [group.rows for group in calibration.groups] == [77, 77]
    torch.testing.assert_close(calibration.groups[0].activations, statistics(torch.cat(batches, dim=1)))


@pytest.mark.parametrize("kind", [tuple, list, dict, Tensor])
def test_batches_of_every_kind(kind: type) -> None:
    model, x = Stack(1), inputs()
    batch = {"x": x} if kind is dict else x if kind is Tensor else kind([x])
    (up, _) = int8compile.calibrate(model, [batch], progress=False).groups
    torch.testing.assert_close(up.activations, statistics(x))
    if kind in (dict, Tensor):  # A single batch that is not in a list.
        int8compile.calibrate(model, batch, progress=False)


def test_the_model_and_the_random_numbers_stay() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear, self.drop = nn.BatchNorm1d(32), nn.Linear(32, 32), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.linear(self.norm(x)))

    model, x = Noisy().train(), inputs()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    quantized = STORE.quantized
    int8compile.calibrate(model, [x], progress=False)
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert STORE.quantized == quantized
    assert torch.is_grad_enabled()


def test_what_is_compiled_quantized_and_saved_uses_it(tmp_path) -> None:
    model, x = Stack(), inputs(200)
    plain = torch.compile(copy.deepcopy(model), backend="int8")(x)
    compiled = torch.compile(model, backend="int8")
    assert torch.equal(compiled(x), plain)
    int8compile.calibrate(model, [x], progress=False)
    expected = model.layers[0].up
    d = rotation(expected.weight)
    qweight, scale = reference.quantize_weight(expected.weight, d)
    inner = reference.linear(x, qweight, scale, d, expected.bias, 12.0)
    # Code compiled before the calibration follows it, too.
    y = compiled(x)
    assert relative_error(y, model(x)) < relative_error(plain, model(x))
    int8compile.quantize_(model, progress=False)
    assert torch.equal(model.layers[0].up.d, d)
    assert torch.equal(model.layers[0].up(x), inner)
    assert torch.equal(model(x), y)
    int8compile.save(model, tmp_path / "int8", progress=False)
    assert torch.equal(int8compile.load(tmp_path / "int8", Stack, progress=False)(x), y)


def test_saved_and_applied_elsewhere(tmp_path) -> None:
    model, x = Attention(), (inputs(), inputs())
    calibration = int8compile.calibrate(model, [x], progress=False)
    calibration.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(tmp_path / "calibration.safetensors")
    assert str(loaded) == str(calibration)
    assert loaded.missing == calibration.missing
    for dtype in (torch.float32, torch.bfloat16):
        other = Attention().to(dtype)
        other.load_state_dict(model.state_dict())
        loaded.apply(other)
        for name, parameter in other.named_parameters():
            if "weight" in name and name not in calibration.missing:
                assert torch.equal(rotation(parameter), rotation(model.get_parameter(name)))
        assert rotation(other.k.weight) is rotation(other.v.weight)


def test_other_models_are_refused_by_name(tmp_path) -> None:
    model = Stack()
    calibration = int8compile.calibrate(model, [inputs()], progress=False)
    other = copy.deepcopy(model)
    other.layers[0].up.weight.data[3] *= 3
    with pytest.raises(CheckpointError, match=r"layers\.0\.up\.weight has other values\. Calibrate this model again"):
        calibration.apply(other)
    other.layers[0].up = nn.Linear(48, 64)
    with pytest.raises(CheckpointError, match=r"layers\.0\.up\.weight is \[64, 48\], not \[64, 32\]"):
        calibration.apply(other)
    small = copy.deepcopy(model)
    del small.layers[1]
    with pytest.raises(CheckpointError, match=r"layers\.1\.up\.weight is not in the model"):
        calibration.apply(small)
    assert all(rotation(parameter) is None for parameter in other.parameters() if parameter.dim() == 2)
    int8compile.quantize_(model, progress=False)
    for refused in (lambda: calibration.apply(model), lambda: int8compile.calibrate(model, [inputs()])):
        with pytest.raises(ModelError, match=r"layers\.0\.up, layers\.0\.down, .*: int8 already\. Calibrate the float"):
            refused()


def test_a_weight_that_lies_otherwise_in_memory_is_refused() -> None:
    """Copies of tensors with gaps have no gaps."""
    model = nn.Sequential(nn.Linear(32, 16))
    model[0].weight = nn.Parameter(torch.randn(16, 64)[:, ::2])
    calibration = int8compile.calibrate(model, [inputs()], progress=False)
    calibration.apply(model)
    with pytest.raises(CheckpointError, match=r"0\.weight lies otherwise in memory\. Calibrate"):
        calibration.apply(copy.deepcopy(model))


def test_d_of_weights_that_stream_in() -> None:
    model, batch = Attention(), (inputs(), inputs())
    calibration = int8compile.calibrate(model, [batch], progress=False)
    k = calibration.d_of(["k.weight"], [model.k.weight])
    assert k is rotation(model.k.weight)
    assert calibration.d_of(["v.weight", "k.weight"], [model.v.weight.half(), model.k.weight]) is k
    assert calibration.d_of(["q.weight"], [model.q.weight]) is not k
    assert calibration.d_of(["unused.weight"], [model.unused.weight]) is None
    assert calibration.d_of(["unused.weight", "v.weight"], [model.unused.weight, model.v.weight]) is k
    with pytest.raises(CheckpointError, match=r"q\.weight is \[32, 16\], not \[32, 32\]"):
        calibration.d_of(["q.weight"], [model.q.weight[:, :16]])
    with pytest.raises(CheckpointError, match=r"q\.weight has other values"):
        calibration.d_of(["q.weight"], [model.k.weight])


def test_a_folder_that_is_missing(tmp_path) -> None:
    with pytest.raises(int8compile.CheckpointError, match=r"cannot be written: .* Name a file in a folder that exists"):
        int8compile.Calibration(()).save(tmp_path / "missing" / "calibration.safetensors")


def test_files_that_are_no_calibration(tmp_path) -> None:
    path = tmp_path / "calibration.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read as a calibration"):
        Calibration.load(path)
    path.write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read as a calibration"):
        Calibration.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="is not a calibration, or is of a later version"):
        Calibration.load(path)
    int8compile.calibrate(Stack(1), [inputs()], progress=False).save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"layers.0.up", b"layers.0.us")):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged: its SHA-256 does not match"):
            Calibration.load(path)


def test_what_cannot_be_calibrated() -> None:
    model, x = Stack(1), inputs()
    with pytest.raises(InputError, match="a batch is int; give a tensor, a tuple of arguments or a dictionary"):
        int8compile.calibrate(model, [3], progress=False)
    with pytest.raises(InputError, match="batches is int; give a list of inputs"):
        int8compile.calibrate(model, 3, progress=False)
    with pytest.raises(InputError, match="batches is empty, or was iterated over before"):
        int8compile.calibrate(model, iter(()), progress=False)
    with pytest.warns(Int8Warning, match="has calibrated nothing: the model multiplies by no weight"):
        assert str(int8compile.calibrate(nn.ReLU(), [x], progress=False)) == "no linear is calibrated"
    with pytest.raises(InputError, match="Stack is not a language model for which tokens can be made up; give batches"):
        int8compile.calibrate(model)
    with pytest.raises(InputError, match="tokens=0: give a whole number of at least 1"):
        int8compile.calibrate(model, [x], tokens=0)
    with pytest.raises(ModelError, match=r"layers\.0\.up\.weight, .*: on the meta device, without data"):
        int8compile.calibrate(Stack(1).to("meta"), [x])
    torch.compile(model, backend="int8", options={"free_weights": True})(x)
    with pytest.raises(FreedWeightError, match=r"layers\.0\.up\.weight .* Calibrate it before compiling"):
        int8compile.calibrate(model, [x])


@pytest.mark.parametrize("part", ["model", "in place", "layers", "layers in place"])
def test_a_compiled_model_is_calibrated_as_what_it_was_made_from(part: str) -> None:
    model, x = Stack(1), inputs()
    compiled: nn.Module = model
    if part == "model":
        compiled = torch.compile(model, backend="int8")
    elif part == "layers":
        model.layers[0] = torch.compile(model.layers[0], backend="int8")
    else:
        (model if part == "in place" else model.layers[0]).compile(backend="int8")
    before = compiled(x)
    (up, down) = int8compile.calibrate(compiled, [x], progress=False).groups
    assert [weight.name for group in (up, down) for weight in group.weights] == [
        "layers.0.up.weight",
        "layers.0.down.weight",
    ]
    assert rotation(model.layers[0].up.weight) is up.d
    torch.testing.assert_close(up.activations, statistics(x))
    assert not torch.equal(compiled(x), before)


def test_batched_weights_whose_matrices_read_rows_of_their_own() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = (
                nn.Parameter(torch.randn(3, 32, 48)),
                nn.Parameter(torch.randn(3, 48, 32)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(torch.bmm(x, self.gate_up_proj).relu(), self.down_proj)

    model, x = Experts(), torch.stack([inputs(), inputs().flip(1), torch.zeros(64, 32)])
    gate, down = int8compile.calibrate(model, [x], progress=False).groups
    torch.testing.assert_close(gate.activations, statistics(x))
    assert gate.d.shape == (32,)
    inner = torch.bmm(x, model.gate_up_proj).relu().detach()
    weights = model.down_proj.detach().mT
    assert down.rows == 128
    expected = [d_from([weights[i]], inner[i]) for i in range(2)] + [rotation_of(input_scales([weights[2]]))]
    torch.testing.assert_close(down.d, torch.stack(expected), rtol=1e-4, atol=0)
    compiled = torch.compile(model, backend="int8")
    with torch.no_grad():
        assert relative_error(compiled(x), model(x)) < 0.02
    assert rotation(model.down_proj, down.weights[0].view) is down.d


def test_progress_is_shown(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    int8compile.calibrate(Stack(1), [inputs()])
    assert "Calibrating" in capsys.readouterr().err
    int8compile.calibrate(Stack(1), [inputs()], progress=False)
    assert "Calibrating" not in capsys.readouterr().err


transformers = pytest.importorskip("transformers")


def test_language_models_are_given_random_tokens() -> None:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=128)
    model = transformers.LlamaForCausalLM(config).eval()
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    first = int8compile.calibrate(model, progress=False)
    assert [list(ids.shape) for ids in seen] == [[1, 128]] * 4
    torch.manual_seed(7)
    second = int8compile.calibrate(model, progress=False)
    assert torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:]))
    assert int(torch.cat(seen).max()) == 127
    for one, other in zip(first.groups, second.groups, strict=True):
        assert one.rows == 512
        assert torch.equal(one.d, other.d)
    # q, k and v; o; gate and up; down, in each layer, and the head.
    assert [len(group.weights) for group in first.groups] == [3, 1, 2, 1] * 2 + [1]
    assert first.missing == {}


def test_a_tied_head_is_not_rotated() -> None:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=128, tie_word_embeddings=True)
    calibration = int8compile.calibrate(transformers.LlamaForCausalLM(config).eval(), progress=False)
    assert sum(len(group.weights) for group in calibration.groups) == 14


def test_both_halves_of_an_encoder_decoder_get_tokens() -> None:
    config = transformers.T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=128)
    model = transformers.T5ForConditionalGeneration(config).eval()
    calibration = int8compile.calibrate(model, progress=False)
    names = [[weight.name.removesuffix(".weight") for weight in group.weights] for group in calibration.groups]
    cross = "decoder.block.0.layer.1.EncDecAttention"
    # q reads the decoder's states, k and v the encoder's.
    assert [f"{cross}.q"] in names
    assert [f"{cross}.k", f"{cross}.v"] in names
    # The head is tied.
    assert sum(map(len, names)) == 16
    int8compile.quantize_(model, progress=False)
    attention = model.get_submodule(cross)
    assert attention.k.d is attention.v.d
    assert attention.k.d is not attention.q.d


@pytest.mark.parametrize("given", ["file", "calibration"])
def test_models_that_are_quantized_while_they_are_loaded(tmp_path, given: str) -> None:
    from int8compile.integrations.transformers import Int8CompileConfig

    def model_of(num_key_value_heads: int) -> nn.Module:
        config = transformers.LlamaConfig(**SMALL, num_key_value_heads=num_key_value_heads, vocab_size=128)
        return transformers.LlamaForCausalLM(config).eval()

    model = model_of(num_key_value_heads=2)
    model.save_pretrained(tmp_path / "float")
    calibration = int8compile.calibrate(model, progress=False)
    calibration.save(tmp_path / "calibration.safetensors")
    of = tmp_path / "calibration.safetensors" if given == "file" else calibration
    options = {"quantization_config": Int8CompileConfig(calibration=of)}
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "float", **options)
    attention = loaded.model.layers[1].self_attn
    assert torch.equal(attention.q_proj.d, rotation(model.model.layers[1].self_attn.q_proj.weight))
    assert attention.q_proj.d is attention.v_proj.d
    loaded.save_pretrained(tmp_path / "int8")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "int8")
    int8compile.quantize_(model, progress=False)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert torch.equal(again(ids).logits, model(ids).logits)
    # Another model of the same shape. transformers logs our error and raises its own.
    model_of(num_key_value_heads=2).save_pretrained(tmp_path / "other")
    with pytest.raises(RuntimeError):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "other", **options)
    # Models with other shapes or names are refused before a weight is read.
    for other, message in (
        (model_of(num_key_value_heads=4), r"k_proj\.weight is \[64, 64\], not \[32, 64\]"),
        (
            model_of(num_key_value_heads=2).model,
            r"it has no layers\.0\.self_attn\.q_proj\.weight, .*Calibrate",
        ),
    ):
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(CheckpointError, match=message):
            type(other).from_pretrained(tmp_path / "other", **options)
    for wrong, message in (
        ({"calibration": 3}, "calibration=3: give what int8compile.calibrate"),
        ({"calibration": of, "rotate": False}, "no effect with rotate=False"),
        ({"calibration": of, "outliers": "column"}, "no effect with outliers='column'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Int8CompileConfig(**wrong)


def test_experts_that_one_product_multiplies_by() -> None:
    """Only quantize_ makes these int8: the product is a custom operator."""
    config = transformers.MixtralConfig(
        **SMALL | {"num_hidden_layers": 1}, num_key_value_heads=2, vocab_size=128, num_local_experts=4
    )
    model = transformers.MixtralForCausalLM(config).eval()
    assert model.config._experts_implementation == "grouped_mm"
    experts, read = model.model.layers[0].mlp.experts, {}
    with torch.no_grad():
        experts.down_proj *= torch.logspace(-1, 1, 96)

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, chosen, _ = args
        read.setdefault("tokens", []).append(hidden)
        for expert in range(4):
            token = torch.where(chosen == expert)[0]
            gate, up = nn.functional.linear(hidden[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
            read.setdefault(expert, []).append(experts.act_fn(gate) * up)

    hook = experts.register_forward_pre_hook(see)
    with torch.no_grad():
        for inputs in token_batches(model, 512):
            model(**inputs)
        hook.remove()
        calibration = int8compile.calibrate(model, progress=False)
    groups = {group.weights[0].name.rpartition(".")[2]: group for group in calibration.groups}
    gate_up, down = groups["gate_up_proj"], groups["down_proj"]
    assert down.rows == 1024
    assert gate_up.activations.shape == (64,)
    assert down.activations.shape == (4, 96)
    for expert in range(4):
        rows = torch.cat(read[expert])
        expected = statistics(rows) if len(rows) >= FEW else torch.zeros(96, dtype=torch.float64)
        torch.testing.assert_close(down.activations[expert], expected, rtol=1e-3, atol=0)
        a = expected if expected.any() else None
        d = rotation_of(input_scales([experts.down_proj[expert].detach()], a))
        torch.testing.assert_close(down.d[expert], d, rtol=1e-3, atol=0)
    int8compile.quantize_(model, progress=False)
    assert torch.equal(experts.down_proj.d, down.d)
    assert torch.equal(experts.gate_up_proj.d, gate_up.d)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_experts_that_are_not_seen_are_named(implementation: str) -> None:
    config = transformers.MixtralConfig(
        **SMALL | {"num_hidden_layers": 1}, num_key_value_heads=2, vocab_size=128, num_local_experts=4
    )
    model = transformers.MixtralForCausalLM(config).eval()
    model.set_experts_implementation(implementation)
    calibration = int8compile.calibrate(model, progress=False)
    assert {name.rpartition(".")[2] for name in calibration.missing} == {"gate_up_proj", "down_proj"}
    assert "gate_up_proj, model.layers.0.mlp.experts.down_proj: it was not used, or its use stays" in str(calibration)


def test_a_model_of_something_else_needs_batches() -> None:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=32, patch_size=8)).eval()
    with pytest.raises(InputError, match="ViTForImageClassification is not a language model"):
        int8compile.calibrate(model)
    calibration = int8compile.calibrate(model, [{"pixel_values": torch.randn(2, 3, 32, 32)}], progress=False)
    # 12 linears, with q, k and v of a layer in one group; the projection of patches is a convolution.
    assert sum(len(group.weights) for group in calibration.groups) >= 12
    assert all(group.rows > 0 for group in calibration.groups)
