"""Damaged checkpoints, and checkpoints of other models, are refused with the reason."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from int8compile import CheckpointError
from int8compile.stored import checkpoint
from tests.helpers.checkpoint_saver import version
from tests.helpers.checkpoints import edit, load, quantized, rename, save, shard, truncate
from tests.helpers.models import Stack


def edit_shard(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Return a function that changes the tensors of the shard with `layers.0.up.qweight`, and its size in the index."""

    def damage(folder: Path) -> None:
        file = shard(folder)
        tensors = safetensors.torch.load_file(file)
        change(tensors)
        safetensors.torch.save_file(tensors, file)
        edit(lambda index: index["shards"].update({file.name: file.stat().st_size}))(folder)

    return damage


def flip_a_bit(folder: Path) -> None:
    file = shard(folder)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def damage_header(folder: Path) -> None:
    file = shard(folder)
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"!" + data[9:])


def retype(folder: Path) -> None:
    """Replace an int8 weight by a float weight in both files, with its right checksum."""
    tensor = torch.randn(64, 32)
    edit_shard(lambda tensors: tensors.update({"layers.0.up.qweight": tensor}))(folder)
    sha256 = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    edit(lambda index: index["tensors"]["layers.0.up.qweight"].update(dtype="float32", sha256=sha256))(folder)


def only_float(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    safetensors.torch.save_file(Stack().state_dict(), folder / "model.safetensors")


def smaller() -> nn.Module:
    model = Stack()
    model.layers[0].up = nn.Linear(32, 48).requires_grad_(False)
    return model


def without_bias() -> nn.Module:
    model = Stack()
    model.layers[1].down = nn.Linear(64, 32, bias=False).requires_grad_(False)
    return model


def other_module() -> nn.Module:
    model = Stack()
    model.layers[1].down = nn.Embedding(64, 32).requires_grad_(False)
    return model


def hooked() -> nn.Module:
    model = Stack()
    model.layers[1].down.register_forward_hook(lambda *_: None)
    return model


def from_a_parameter() -> nn.Module:
    model = Stack()
    model.register_buffer("total", model.layers[0].up.weight.sum(), persistent=False)
    return model


def extra_buffer(model: nn.Module) -> nn.Module:
    model.register_buffer("more", torch.zeros(2))
    return model


UP = r"layers\.0\.up"

SHARD = r"int8compile-0000\d-of-0000\d\.safetensors"


def nothing(folder: Path) -> None: ...


@pytest.mark.parametrize(
    ("damage", "factory", "message"),
    [
        # The shards.
        pytest.param(flip_a_bit, Stack, rf"{UP}\.\w+ in .*{SHARD} is damaged: the SHA-256", id="flipped bit"),
        pytest.param(
            lambda folder: truncate(shard(folder), 10),
            Stack,
            rf"{SHARD} has \d+ bytes, int8compile\.json says \d+: it is cut off.*{UP}\.qweight",
            id="truncated shard",
        ),
        pytest.param(damage_header, Stack, rf"{SHARD} is damaged .*{UP}\.qweight", id="damaged header"),
        pytest.param(
            lambda folder: shard(folder).unlink(),
            Stack,
            rf"{SHARD} is missing; it holds .*{UP}\.qweight",
            id="no shard",
        ),
        pytest.param(
            lambda folder: shutil.copy(shard(folder), folder / "int8compile-00009-of-00009.safetensors"),
            Stack,
            r"does not name: int8compile-00009-of-00009\.safetensors",
            id="extra shard",
        ),
        pytest.param(
            edit_shard(lambda tensors: tensors.pop("layers.0.up.qweight")),
            Stack,
            rf"{SHARD} lacks {UP}\.qweight",
            id="missing tensor",
        ),
        pytest.param(
            edit_shard(lambda tensors: tensors.update(more=torch.ones(3))),
            Stack,
            f"{SHARD} holds more",
            id="extra tensor",
        ),
        pytest.param(
            edit_shard(lambda tensors: tensors.update({"layers.0.up.qweight": torch.zeros(64, 32)})),
            Stack,
            rf"{UP}\.qweight is torch\.float32 \[64, 32\] in .*{SHARD}, int8compile\.json says torch\.int8 \[64, 32\]",
            id="wrong dtype in the shard",
        ),
        pytest.param(
            edit_shard(
                lambda tensors: tensors.update(
                    {"layers.0.up.qweight": tensors["layers.0.up.qweight"].t()[:8].contiguous()}
                )
            ),
            Stack,
            rf"{UP}\.qweight is torch\.int8 \[8, 64\] in .*{SHARD}, int8compile\.json says torch\.int8 \[64, 32\]",
            id="wrong shape in the shard",
        ),
        # The description.
        pytest.param(
            lambda folder: truncate(folder / checkpoint.INDEX, 10),
            Stack,
            r"int8compile\.json is not JSON",
            id="cut JSON",
        ),
        pytest.param(
            lambda folder: (folder / checkpoint.INDEX).write_text("[" * 200_000), Stack, "is not JSON", id="deep JSON"
        ),
        pytest.param(
            lambda folder: (folder / checkpoint.INDEX).write_text("[1]"), Stack, "'format' is not", id="JSON of a list"
        ),
        pytest.param(
            edit(lambda index: index.update(format="gguf")), Stack, "'format' is not 'int8compile'", id="format"
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].update(threshold=9.0), sign=False),
            Stack,
            r"int8compile\.json was changed after it was written",
            id="edited JSON",
        ),
        pytest.param(
            edit(lambda index: index.update(format_version=3)),
            Stack,
            r"format_version is 3, this version reads 1 and 2: it was made by a newer version",
            id="newer version",
        ),
        pytest.param(
            edit(lambda index: index.update(format_version="1")),
            Stack,
            "format_version is '1', this version reads 1 and 2: no version has written this",
            id="version of another type",
        ),
        pytest.param(edit(lambda index: index.pop("tensors")), Stack, "'tensors' is None; it must be", id="no tensors"),
        pytest.param(
            edit(lambda index: index["tensors"]["layers.0.up.bias"].update(shape="64")),
            Stack,
            "'shape' is '64'; it must be of type list",
            id="shape of another type",
        ),
        pytest.param(
            edit(lambda index: index["tensors"]["layers.0.up.bias"].update(shape=[-64])),
            Stack,
            rf"{UP}\.bias has shape \[-64\]",
            id="negative shape",
        ),
        pytest.param(
            edit(lambda index: index["tensors"]["layers.0.up.bias"].update(dtype="object")),
            Stack,
            rf"{UP}\.bias has dtype 'object'; allowed are float32",
            id="unknown dtype",
        ),
        pytest.param(
            edit(lambda index: index["shards"].update({"../../x.safetensors": 3})),
            Stack,
            r"names the shard '\.\./\.\./x\.safetensors'; shards are files in the same folder",
            id="path escape",
        ),
        pytest.param(
            edit(lambda index: index["tensors"]["layers.0.up.bias"].update(shard="/etc/passwd")),
            Stack,
            rf"{UP}\.bias is in shard '/etc/passwd', which is not among its shards",
            id="path escape of a tensor",
        ),
        pytest.param(
            edit(lambda index: index["aliases"].update(a="b")),
            Stack,
            "a is a second name of 'b'",
            id="alias of nothing",
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].update(threshold=-1)),
            Stack,
            rf"{UP} has an option that is not allowed: threshold=-1",
            id="bad threshold",
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].update(weight_only="yes")),
            Stack,
            rf"{UP}: the checkpoint was saved with .*'weight_only': 'yes'",
            id="bad weight_only",
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].update(source="os.system")),
            Stack,
            rf"{UP}: source='os\.system'",
            id="unknown source",
        ),
        # float and int8.
        pytest.param(
            rename("layers.0.up.qweight", "layers.0.up.weight"),
            Stack,
            rf"{UP}\.weight is torch\.int8, but {UP} is int8 and takes {UP}\.qweight and {UP}\.scale",
            id="float for int8",
        ),
        pytest.param(
            retype,
            Stack,
            rf"{UP}\.qweight is torch\.float32 in the checkpoint, the model takes torch\.int8",
            id="retyped",
        ),
        pytest.param(
            edit(lambda index: index["modules"].pop("layers.0.up")),
            Stack,
            rf"{UP}\.qweight is torch\.int8, but {UP} is not among the int8 modules .*takes {UP}\.weight",
            id="int8 for float",
        ),
        # Rotations.
        pytest.param(
            rename("layers.0.up.d", "layers.0.up.e"), Stack, rf"the checkpoint lacks {UP}\.d, which", id="no rotation"
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].pop("rotation")),
            Stack,
            rf"the checkpoint has {UP}\.d, which the model does not have",
            id="a rotation of a weight that is not rotated",
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].update(rotation=16)),
            Stack,
            rf"{UP} has the rotation 16 in the checkpoint; what it can have is 1 or 32",
            id="another rotation",
        ),
        pytest.param(
            edit(lambda index: index["modules"]["layers.0.up"].update(outliers="column")),
            Stack,
            rf"{UP} has the rotation 32 in the checkpoint; what it can have is 1\.",
            id="columns of a rotated weight",
        ),
        pytest.param(
            only_float, Stack, r"model\.safetensors is not an int8 checkpoint\. Load the float model", id="float"
        ),
        # The model.
        pytest.param(
            rename("layers.0.up.bias", "layers.0.up.bios"),
            Stack,
            rf"the checkpoint lacks {UP}\.bias, which the model has",
            id="missing in the checkpoint",
        ),
        pytest.param(
            nothing,
            lambda: extra_buffer(Stack()),
            "the checkpoint lacks more, which the model has",
            id="extra in the model",
        ),
        pytest.param(
            nothing,
            lambda: Stack(1),
            r"layers\.1\.up is an int8 linear in the checkpoint, in the model nothing",
            id="depth",
        ),
        pytest.param(nothing, lambda: Stack(9), r"lacks layers\.2\.up.* and 25 more \(28 in all\)", id="greater depth"),
        pytest.param(
            nothing,
            without_bias,
            r"has layers\.1\.down\.bias, which the model does not have",
            id="missing in the model",
        ),
        pytest.param(
            nothing,
            smaller,
            rf"{UP}\.\w+ has shape \[64(, 32)?\] in the checkpoint, \[48(, 32)?\] in the model",
            id="shape",
        ),
        pytest.param(
            nothing,
            other_module,
            r"layers\.1\.down is an int8 linear in the checkpoint, in the model Embedding",
            id="kind",
        ),
        pytest.param(nothing, hooked, r"layers\.1\.down is int8 .* cannot be in the model: .*hooks", id="hooks"),
        pytest.param(nothing, from_a_parameter, "total has no data: it is not in the checkpoint", id="meta buffer"),
        pytest.param(nothing, lambda: quantized(Stack), rf"returned a model with int8 modules: {UP}", id="int8 model"),
        pytest.param(nothing, dict, "model_factory returned dict", id="no model"),
        # The folder.
        pytest.param(shutil.rmtree, Stack, "model does not exist. Name the folder", id="no folder"),
        pytest.param(
            lambda folder: (shutil.rmtree(folder), folder.touch()), Stack, "model is a file. Name the folder", id="file"
        ),
        pytest.param(
            lambda folder: (shutil.rmtree(folder), folder.mkdir()),
            Stack,
            r"is not an int8 checkpoint\. Name",
            id="empty",
        ),
        pytest.param(
            lambda folder: (folder / checkpoint.INDEX).unlink(),
            Stack,
            r"has shards but no int8compile\.json",
            id="no JSON",
        ),
    ],
)
def test_bad_checkpoints(
    damage: Callable[[Path], object], factory: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    save(version(0), folder, max_shard_bytes=2**12)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder, factory)
    # The message says what to do.
    advice = r"again|Load|Name|rename|update|Have model_factory|Return|Compute|must return|no version"
    assert re.search(advice, str(caught.value))


def test_a_buffer_of_another_kind_is_refused(tmp_path: Path) -> None:
    def factory() -> nn.Module:
        model = Stack()
        model.register_buffer("steps", torch.zeros(2, dtype=dtype))
        return model

    dtype = torch.int64
    save(quantized(factory), tmp_path / "model")
    dtype = torch.int32
    with pytest.raises(CheckpointError, match=r"steps is torch\.int64 in the checkpoint, the model takes torch\.int32"):
        load(tmp_path / "model", factory)
