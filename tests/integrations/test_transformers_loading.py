"""Loading with int8 weights: weights that arrive in groups, and checkpoints that must be refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from int8compile import CheckpointError, Int8Experts, Int8Linear, quantize_
from int8compile.groups import make_d
from tests.helpers.architectures import CASES, TEXT, VISION

transformers = pytest.importorskip("transformers")

safetensors = pytest.importorskip("safetensors.torch")


from int8compile.integrations import folders  # noqa: E402
from int8compile.integrations import transformers as integration  # noqa: E402
from int8compile.integrations.transformers import Int8CompileConfig  # noqa: E402
from tests.helpers.int8_transformers import assert_same_bits, edit_config, int8_paths, llama, load, saved  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")


# Groups of weights, while they arrive


def drop(folder: str, *names: str) -> None:
    """Remove tensors from a folder's file."""
    file = Path(folder) / "model.safetensors"
    state = safetensors.load_file(file)
    safetensors.save_file({name: state[name] for name in state if name not in names}, file, {"format": "pt"})


def test_about_one_group_waits_at_a_time(float_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are not in the file's order: k, o, q, v; down, gate, up."""
    waiting = []
    add = folders.Arrivals.add

    def counting(self: folders.Arrivals, name: str, weight: Tensor) -> Any:
        result = add(self, name, weight)
        waiting.append({name.rpartition(".")[0].removeprefix("model.layers.") for name in self._weights})
        return result

    monkeypatch.setattr(folders.Arrivals, "add", counting)
    model = load(saved(llama(2), tmp_path / "float"), quantization_config=Int8CompileConfig())
    assert len(waiting) == len(int8_paths(model)) == 14
    assert {"0.self_attn.k_proj", "0.self_attn.q_proj"} in waiting
    assert {"1.mlp.gate_proj"} in waiting
    assert max(map(len, waiting)) == 2
    assert not waiting[-1]


def test_a_group_of_which_the_checkpoint_lacks_a_weight(float_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    """The other weights share the rotation of those present; the missing weight stays random and in float."""
    drop(float_folder, "model.layers.0.self_attn.q_proj.weight")
    model = load(float_folder, quantization_config=Int8CompileConfig())
    attention = model.model.layers[0].self_attn
    assert type(attention.q_proj) is nn.Linear
    assert attention.q_proj.weight.isfinite().all()
    assert "q_proj.weight" in caplog.text
    assert len(int8_paths(model)) == 6
    assert attention.k_proj.d is attention.v_proj.d
    whole = llama().model.layers[0].self_attn
    assert torch.equal(attention.k_proj.d, make_d([whole.k_proj.weight.detach(), whole.v_proj.weight.detach()]))


def test_a_bad_weight_of_a_group(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[3, 4] = torch.nan
    folder = saved(model, tmp_path / "float")
    with pytest.raises(RuntimeError):
        load(folder, quantization_config=Int8CompileConfig())
    assert r"self_attn.k_proj: its weight [32, 64] has 1 NaN or Inf of 2048 entries" in caplog.text


def test_a_weight_that_transformers_leaves_out(float_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing weight is waited for only until the end."""
    drop(float_folder, "model.layers.0.self_attn.v_proj.weight")
    ask = integration.Int8CompileQuantizer.get_quantize_ops

    def announcing_more(self: integration.Int8CompileQuantizer) -> Any:
        self.arrivals.expect("model.layers.0.self_attn.v_proj.weight")
        return ask(self)

    monkeypatch.setattr(integration.Int8CompileQuantizer, "get_quantize_ops", announcing_more)
    model = load(float_folder, quantization_config=Int8CompileConfig())
    attention = model.model.layers[0].self_attn
    assert type(attention.v_proj) is nn.Linear
    assert attention.q_proj.d is attention.k_proj.d is not None
    own = llama()
    quantize_(own, {"skip_modules": ["v_proj"]}, progress=False)
    for name in ("q_proj", "k_proj"):
        assert_same_bits(attention.get_submodule(name), own.model.layers[0].self_attn.get_submodule(name))


@pytest.mark.parametrize("kept", [[], ["gate_proj"], ["up_proj"]])
def test_weights_that_the_checkpoint_has_in_one(kept: list[str], tmp_path: Path) -> None:
    """DINOv2's gate and up projections, also where one of them stays in float."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**VISION, use_swiglu_ffn=True)
    original = transformers.Dinov2Model(config).eval()
    folder = saved(original, tmp_path / "float")
    assert "encoder.layer.0.mlp.weights_in.weight" in safetensors.load_file(Path(folder) / "model.safetensors")
    options = {"quantization_config": Int8CompileConfig(skip_modules=kept)}
    model = transformers.Dinov2Model.from_pretrained(folder, **options)
    assert len(int8_paths(model)) == 7 - len(kept)
    mlp = model.encoder.layer[0].mlp
    assert kept or mlp.gate_proj.d is mlp.up_proj.d is not None
    quantize_(original, {"skip_modules": kept}, progress=False)
    assert_same_bits(model, original)
    again = transformers.Dinov2Model.from_pretrained(saved(model, tmp_path / "int8"))
    assert_same_bits(again, model)


def test_a_head_of_another_size_stays_in_float(tmp_path: Path) -> None:
    """transformers initializes such a head anew, to be trained."""
    config = transformers.ViTConfig(**VISION, num_labels=50)
    kind = transformers.ViTForImageClassification
    folder = saved(kind(config), tmp_path / "float")
    options = {"quantization_config": Int8CompileConfig(), "num_labels": 40}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        kind.from_pretrained(folder, **options)
    model = kind.from_pretrained(folder, ignore_mismatched_sizes=True, **options)
    assert type(model.classifier) is nn.Linear
    assert model.classifier.weight.shape == (40, 64)
    assert model.classifier.weight.isfinite().all()
    assert len(int8_paths(model)) == CASES["vit"].rewritten


class TiedLinears(transformers.PreTrainedModel):
    """Two linears with one weight in different groups; one of them stands beside a third."""

    config_class = transformers.BertConfig
    _tied_weights_keys = {"second.proj.weight": "first.up.weight"}  # noqa: RUF012  as transformers has it

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.first = nn.ModuleDict({"gate": nn.Linear(64, 32), "up": nn.Linear(64, 32)})
        self.second = nn.ModuleDict({"proj": nn.Linear(64, 32), "other": nn.Linear(64, 48)})
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first["gate"](x) * self.first["up"](x)
        return torch.cat([y, self.second["proj"](x), self.second["other"](x)], dim=-1)


def test_tied_linears(tmp_path: Path) -> None:
    """A weight has one rotation, whichever linear reads it."""
    torch.manual_seed(0)
    original = TiedLinears(transformers.BertConfig(**TEXT)).eval()
    original.tie_weights()
    assert original.first["up"].weight is original.second["proj"].weight
    folder = saved(original, tmp_path / "float")
    model = TiedLinears.from_pretrained(folder, quantization_config=Int8CompileConfig())
    quantize_(original, progress=False)
    x = torch.randn(5, 64)
    for each in (model, original, TiedLinears.from_pretrained(saved(model, tmp_path / "int8"))):
        first, second = each.first, each.second
        assert first["up"].qweight is second["proj"].qweight
        assert first["gate"].d is first["up"].d
        assert torch.equal(first["up"].d, second["proj"].d)
        assert torch.equal(each(x), original(x))


def test_float_weights_for_an_int8_model(float_folder: str) -> None:
    folder = edit_config(float_folder, lambda c: c.update(quantization_config=Int8CompileConfig().to_dict()))
    with pytest.raises(
        CheckpointError, match=r"the checkpoint lacks model\.layers\.0\.self_attn\.q_proj\.qweight, .* and 18 more"
    ):
        load(folder)


def test_int8_weights_for_a_float_layer(tmp_path: Path, float_folder: str) -> None:
    folder = saved(load(float_folder, quantization_config=Int8CompileConfig()), tmp_path / "int8")
    edit_config(folder, lambda c: c["quantization_config"]["modules"].pop("model.layers.0.mlp.down_proj"))
    with pytest.raises(
        CheckpointError, match=r"mlp\.down_proj\.qweight of the checkpoint is int8, but by its config\.json"
    ):
        load(folder)


def test_missing_tensors(tmp_path: Path, float_folder: str) -> None:
    folder = saved(load(float_folder, quantization_config=Int8CompileConfig()), tmp_path / "int8")
    path = Path(folder) / "model.safetensors"
    state = safetensors.load_file(path)
    del state["model.layers.0.mlp.up_proj.scale"]
    safetensors.save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks model\.layers\.0\.mlp\.up_proj\.scale"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("qweight", torch.float32, "F32; it must be I8"),
        ("scale", torch.bfloat16, "BF16; it must be F32"),
        ("d", torch.float16, "F16; it must be F32"),
    ],
)
def test_wrong_dtypes(tmp_path: Path, float_folder: str, name: str, dtype: torch.dtype, message: str) -> None:
    """transformers would cast the tensor."""
    folder = saved(load(float_folder, quantization_config=Int8CompileConfig()), tmp_path / "int8")
    path, key = Path(folder) / "model.safetensors", f"model.layers.0.mlp.up_proj.{name}"
    state = safetensors.load_file(path)
    state[key] = state[key].to(dtype)
    safetensors.save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{key} of the checkpoint is {message}"):
        load(folder)


def test_a_rotation_that_the_config_does_not_have(tmp_path: Path, float_folder: str) -> None:
    folder = saved(load(float_folder, quantization_config=Int8CompileConfig()), tmp_path / "int8")
    edit_config(folder, lambda c: c["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"].pop("rotation"))
    with pytest.raises(
        CheckpointError, match=r"up_proj\.d of the checkpoint rotates a weight that by its config\.json"
    ):
        load(folder)


def test_a_rotation_that_is_missing(tmp_path: Path, float_folder: str) -> None:
    folder = saved(load(float_folder, quantization_config=Int8CompileConfig()), tmp_path / "int8")
    drop(folder, "model.layers.0.mlp.up_proj.d")
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks model\.layers\.0\.mlp\.up_proj\.d"):
        load(folder)


# Folders of version 1


def as_version_1(folder: Path) -> None:
    """Rewrite the config of an unrotated model as version 1 wrote it."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    said = config["quantization_config"]
    for options in said["modules"].values():
        del options["rotation"]
        if options["source"] != "embedding":
            options["outliers"] = "row"
    content = json.dumps([said["modules"], said["checksums"]], sort_keys=True)
    said["checksum"] = hashlib.sha256(content.encode()).hexdigest()
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("lm_head", ["native", "int8_weight"])
@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "mixtral"])
@torch.no_grad()
def test_a_folder_of_the_version_before(name: str, lm_head: str, tmp_path: Path) -> None:
    """Its integers are those of current unrotated weights, and run like them."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().eval()
    quantize_(model, {"lm_head": lm_head, "rotate": False}, progress=False)
    saved(model, tmp_path / "old")
    as_version_1(tmp_path / "old")
    assert not any(key.endswith(".d") for key in safetensors.load_file(tmp_path / "old" / "model.safetensors"))
    loaded = type(model).from_pretrained(tmp_path / "old")
    assert_same_bits(loaded, model)
    int8 = [module for module in loaded.modules() if isinstance(module, Int8Linear | Int8Experts)]
    assert {(module.d, module.threshold) for module in int8} == {(None, 6.0)}
    assert torch.equal(loaded(**case.inputs)[0], model(**case.inputs)[0])
    assert_same_bits(type(model).from_pretrained(saved(loaded, tmp_path / "again")), model)


def test_experts_by_columns_of_the_version_before(tmp_path: Path) -> None:
    """Such experts are in float since version 2."""
    model = CASES["mixtral"].build().eval()
    quantize_(model, {"rotate": False}, progress=False)
    folder = saved(model, tmp_path / "old")

    def change(config: dict[str, Any]) -> None:
        for options in config["quantization_config"]["modules"].values():
            options["outliers"] = "column"

    edit_config(folder, change)
    with pytest.raises(
        CheckpointError, match=r"experts\.\w+ is int8 by columns in the checkpoint, which experts cannot be any more"
    ):
        type(model).from_pretrained(folder)
