"""Folders of int8 models of transformers: checksums, file system errors, and files of others."""

from __future__ import annotations

import concurrent.futures
import copy
import errno
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from int8compile import CheckpointError, ConfigError, quantize_
from int8compile.stored.modules import share_rotations
from tests.helpers.architectures import DECODER

transformers = pytest.importorskip("transformers")

safetensors = pytest.importorskip("safetensors.torch")

from safetensors import SafetensorError  # noqa: E402

from int8compile.integrations import transformers as integration  # noqa: E402
from int8compile.integrations.transformers import Int8CompileConfig  # noqa: E402
from tests.helpers.configs import saved_config  # noqa: E402
from tests.helpers.int8_transformers import (  # noqa: E402
    PLACES,
    assert_same_bits,
    edit_config,
    int8_paths,
    llama,
    load,
    logits,
    reloads,
    saved,
)

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")


def int8_folder(tmp_path: Path, float_folder: str, **options: Any) -> Path:
    folder = tmp_path / "int8"
    load(float_folder, quantization_config=Int8CompileConfig()).save_pretrained(folder, **options)
    return folder


def places(file: Path) -> dict[str, tuple[int, int]]:
    """Return the first and last byte of each int8 module's tensors in a safetensors file."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    offsets = {
        name: said["data_offsets"] for name, said in header.items() if name.endswith((".qweight", ".scale", ".d"))
    }
    return {name: (8 + size + low, 8 + size + high) for name, (low, high) in offsets.items()}


@pytest.mark.parametrize("shards", [False, True])
def test_every_flipped_byte_is_refused(shards: bool, tmp_path: Path, float_folder: str) -> None:
    """Flip the first, the last and a random byte of each scale, and a random byte of each int8 tensor and d."""
    folder = int8_folder(tmp_path, float_folder, **({"max_shard_size": "40KB"} if shards else {}))
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == shards
    found = {name: (file, *place) for file in files for name, place in places(file).items()}
    assert len(found) == 21
    random.seed(0)
    for name, (file, low, high) in found.items():
        data = file.read_bytes()
        for at in (
            (low, random.randrange(low, high), high - 1) if name.endswith("scale") else (random.randrange(low, high),)
        ):
            changed = bytearray(data)
            changed[at] ^= 1 << random.randrange(8)
            file.write_bytes(changed)
            with pytest.raises(
                CheckpointError, match=rf"{re.escape(name)} in {file}.*(is damaged|the file is damaged)"
            ):
                load(str(folder))
        file.write_bytes(data)
    assert len(int8_paths(load(str(folder)))) == 7


def test_checksums_are_of_what_is_saved(tmp_path: Path, float_folder: str) -> None:
    """Checksums follow values changed after loading, and are not kept in the loaded config."""
    folder = int8_folder(tmp_path, float_folder)
    model = load(str(folder))
    assert "checksums" not in model.config.quantization_config.to_dict()
    model.model.layers[0].mlp.up_proj.qweight.neg_()
    assert reloads(model, tmp_path / "changed")
    assert "checksums" not in model.config.quantization_config.to_dict()
    said = [saved_config(each) for each in (folder, tmp_path / "changed")]
    first, second = (each["quantization_config"]["checksums"] for each in said)
    assert {name for name in first if first[name] != second[name]} == {"model.layers.0.mlp.up_proj.qweight"}


def test_folders_without_checksums_load(tmp_path: Path, float_folder: str) -> None:
    folder = int8_folder(tmp_path, float_folder)
    edit_config(str(folder), lambda c: c["quantization_config"].pop("checksums"))
    assert len(int8_paths(load(str(folder)))) == 7


def test_checksums_under_another_head(tmp_path: Path, float_folder: str) -> None:
    """With another head, the tensor names gain or lose a part."""
    folder = int8_folder(tmp_path, float_folder)
    load(str(folder)).model.save_pretrained(tmp_path / "base")
    for source, kind in ((folder, transformers.LlamaModel), (tmp_path / "base", transformers.LlamaForCausalLM)):
        assert len(int8_paths(kind.from_pretrained(source))) == 7
        edit_config(
            str(source),
            lambda c: c["quantization_config"]["checksums"].update(
                {name: "0" for name in c["quantization_config"]["checksums"] if "down_proj.qweight" in name}
            ),
        )
        with pytest.raises(CheckpointError, match=r"down_proj\.qweight in .* is damaged or of another checkpoint"):
            kind.from_pretrained(source)


def test_a_state_dict_of_the_files(tmp_path: Path, float_folder: str) -> None:
    """The empty weight, which keeps transformers working, is ignored."""
    folder = int8_folder(tmp_path, float_folder)
    model = llama()
    quantize_(model, progress=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.load_state_dict(safetensors.load_file(folder / "model.safetensors"), strict=True)
    assert torch.equal(logits(model), logits(load(str(folder))))


def test_files_of_safetensors_alone(tmp_path: Path) -> None:
    """safetensors' own functions refuse a tensor under two names, or drop one of the names."""
    model, other = llama(), llama()
    quantize_(model, progress=False)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + torch.rand_like(parameter))
    quantize_(other, progress=False)
    safetensors.save_file(model.state_dict(), tmp_path / "state.safetensors")
    safetensors.save_model(model, tmp_path / "model.safetensors")
    for file in ("state.safetensors", "model.safetensors"):
        again = copy.deepcopy(other)
        safetensors.load_model(again, tmp_path / file)
        share_rotations(again)
        assert_same_bits(again, model)


def test_what_is_offloaded_is_not_checked(tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    model = llama(2)
    quantize_(model, progress=False)
    saved(model, folder)
    edit_config(
        str(folder), lambda c: c["quantization_config"]["checksums"].update({"model.layers.1.mlp.up_proj.qweight": "0"})
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.qweight"):
        load(str(folder))
    options = {"device_map": PLACES, "offload_folder": str(tmp_path / "offload")}
    offloaded = load(str(folder), **options)
    assert offloaded.model.layers[1].mlp.up_proj.qweight.is_meta
    saved(offloaded, tmp_path / "again")
    said = saved_config(tmp_path / "again")["quantization_config"]["checksums"]
    assert len(said) == 21
    assert all(".layers.0." in name for name in said)
    assert torch.equal(logits(load(str(tmp_path / "again"))), logits(model))


def test_a_folder_that_is_replaced_while_it_is_loaded(
    tmp_path: Path, float_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config of one checkpoint with tensors of another is refused."""
    folder = int8_folder(tmp_path, float_folder)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    quantize_(other, progress=False)
    check = integration.quantizer.check_checkpoint

    def replacing(*args: Any) -> Any:
        saved(other, folder)
        return check(*args)

    monkeypatch.setattr(integration.quantizer, "check_checkpoint", replacing)
    with pytest.raises(
        CheckpointError, match=r"is damaged or of another checkpoint: .* The same goes for .* and 17 more"
    ):
        load(str(folder))


# Errors of the file system


def unreadable(file: Path, how: str) -> None:
    data = file.read_bytes()
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how == "a link to nothing":
        file.symlink_to("nothing")
    elif how != "missing":
        file.write_bytes({"empty": b"", "cut off": data[: len(data) // 2], "of zeros": bytes(len(data))}[how])


@pytest.mark.parametrize("how", ["a folder", "a link to nothing", "missing", "empty", "cut off", "of zeros"])
def test_unreadable_shards(how: str, tmp_path: Path, float_folder: str) -> None:
    folder = int8_folder(tmp_path, float_folder, max_shard_size="40KB")
    file = sorted(folder.glob("*.safetensors"))[1]
    unreadable(file, how)
    with pytest.raises(CheckpointError, match=rf"{file} cannot be read .* Copy the checkpoint again"):
        load(str(folder))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("modules", ["model"]),
        ("modules", "all"),
        ("modules", {"model.layers.0.mlp.up_proj": 3}),
        ("checksums", ["0"]),
        ("checksums", {"model.layers.0.mlp.up_proj.scale": 0}),
        ("checkpoint_format", 3),
        ("threshold", "high"),
        ("surplus", 1),
    ],
)
def test_configs_of_wrong_types(option: str, value: object, tmp_path: Path, float_folder: str) -> None:
    folder = int8_folder(tmp_path, float_folder)
    edit_config(str(folder), lambda c: c["quantization_config"].update({option: value}))
    with pytest.raises(ConfigError, match=option):
        load(str(folder))


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a checkpoint"])
@pytest.mark.parametrize("full", ["shards", "config"])
def test_a_full_disk(
    full: str, before: str, tmp_path: Path, float_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed save leaves none of its files; files it has overwritten do not load."""
    folder = tmp_path / "int8"
    if before == "a checkpoint":
        other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
        quantize_(other, progress=False)
        saved(other, folder)
    elif before == "an empty folder":
        folder.mkdir()
    model = load(float_folder, quantization_config=Int8CompileConfig())

    def no_shards(tensors: object, file: str, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def no_config(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "config.json"))

    with monkeypatch.context() as patch:
        if full == "shards":
            patch.setattr(transformers.modeling_utils, "safe_save_file", no_shards)
        else:
            patch.setattr(transformers.LlamaConfig, "save_pretrained", no_config)
        with pytest.raises(CheckpointError, match=rf"{folder} cannot be written: .*No space left on device"):
            model.save_pretrained(folder)
    if before == "nothing":
        assert not folder.exists()
    elif before == "an empty folder":
        assert not list(folder.iterdir())
    elif full == "shards":
        with pytest.raises(CheckpointError, match="is damaged or of another checkpoint"):
            load(str(folder))
    assert reloads(model, tmp_path / "elsewhere")


# Other events in a folder


def test_without_the_integration_nothing_is_initialized_at_random(tmp_path: Path) -> None:
    mixture = transformers.MixtralConfig(**DECODER, num_local_experts=2, num_experts_per_tok=1)
    models = {
        "linears": (llama(), {}),
        "a tied head alone": (llama(tie_word_embeddings=True), {"lm_head": "int8", "skip_modules": ["layers"]}),
        "experts alone": (transformers.MixtralForCausalLM(mixture).eval(), {"skip_modules": ["self_attn", "gate"]}),
    }
    calls = []
    for name, (model, options) in models.items():
        assert quantize_(model, options, progress=False).rewritten
        folder = saved(model, tmp_path / name)
        calls += [(type(each).__name__, folder) for each in (model, model.model)]
        assert torch.equal(logits(type(model).from_pretrained(folder).eval()), logits(model))
    script = f"""
import transformers
for kind, folder in {calls!r}:
    try:
        getattr(transformers, kind).from_pretrained(folder)
        print(kind, "loaded", folder)
    except RuntimeError as error:
        print("mismatch" in str(error).lower())
"""
    without = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=without)
    assert done.stdout.split() == ["True"] * len(calls)


def test_a_failed_save_leaves_what_others_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    quantize_(model, progress=False)

    def fail(*args: Any, **kwargs: Any) -> None:
        (tmp_path / "results.txt").write_text("of another")
        (tmp_path / "checkpoint-2").mkdir()
        (tmp_path / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"results.txt", "checkpoint-2"}
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="cannot be written"):
        model.save_pretrained(tmp_path / "file" / "folder")


def test_a_model_of_another_quantizer_is_not_saved(tmp_path: Path) -> None:
    class Other(transformers.quantizers.base.HfQuantizer):
        is_serializable, is_trainable = True, False

        def __init__(self) -> None:
            pass

    model = llama()
    model.hf_quantizer = other = Other()
    quantize_(model, progress=False)
    assert model.hf_quantizer is other
    assert getattr(model.config, "quantization_config", None) is None
    with pytest.raises(CheckpointError, match=r"is quantized by Other, too"):
        model.save_pretrained(tmp_path)


def test_threads_save_one_model(tmp_path: Path) -> None:
    model = llama()
    quantize_(model, progress=False)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: model.save_pretrained(tmp_path / str(i)), range(4)))
    for i in range(4):
        assert torch.equal(logits(load(str(tmp_path / str(i)))), logits(model))


def test_other_tensors_than_the_models_are_not_saved(tmp_path: Path) -> None:
    model = llama()
    quantize_(model, progress=False)
    model.save_pretrained(tmp_path / "own", state_dict=model.state_dict())
    assert torch.equal(logits(load(str(tmp_path / "own"))), logits(model))
    other = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "equal", state_dict=other)
    assert torch.equal(logits(load(str(tmp_path / "equal"))), logits(model))
    other["model.layers.0.mlp.up_proj.d"].neg_()
    with pytest.raises(CheckpointError, match="with other tensors than the model's"):
        model.save_pretrained(tmp_path / "other", state_dict=other)


def test_options_that_were_edited_are_refused(tmp_path: Path) -> None:
    model = llama()
    quantize_(model, progress=False)
    folder = Path(saved(model, tmp_path / "int8"))
    text = (folder / "config.json").read_text()
    assert '"threshold": 12.0' in text
    (folder / "config.json").write_text(text.replace('"threshold": 12.0', '"threshold": 1.5'))
    with pytest.raises(ConfigError, match=r"config\.json is damaged or was edited"):
        load(str(folder))
