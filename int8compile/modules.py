"""Modules that hold their weight in int8: what `quantize_` puts in the place of linears, embeddings and experts.

Each has the buffers `qweight` (int8) and `scale` (float32) and no parameter called `weight`, so that no loader takes
integers for floats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code
from torch.compiler import is_compiling

from int8compile import cpu, ops, triton_kernels
from int8compile.errors import CheckpointError, InputError, Int8WeightError
from int8compile.module_weight import Held, Int8Weight

# What a module was made from, and what `dequantize` makes of it again.
Source = Literal["linear", "conv1d", "embedding", "experts"]

BUFFERS = ("qweight", "scale")
# What `policy` is made of.
_POLICY = ("threshold", "outliers", "weight_only")


@functools.cache
def _load_kernels() -> None:
    """The operators run through PyTorch until the kernels are loaded; both loaders warn where there are none."""
    cpu.load()
    if torch.cuda.is_available():
        triton_kernels.load()


class Int8Module(nn.Module):
    """What the modules have in common.

    Attributes:
        qweight: [..., N, K] int8.
        scale: [..., N] float32; `qweight * scale` is the weight.
        dtype: What the weight is dequantized to; `.to(dtype)` of the module changes it, `scale` stays float32.
        source: What kind of module it was made from.
        path: Where it was put in the model that it is of, for messages.
    """

    path = ""
    # What stands beside a table of embeddings is computed in float.
    policy = "weight_only"
    qweight: Tensor
    scale: Tensor

    def __init__(self, qweight: Tensor, scale: Tensor, dtype: torch.dtype, source: Source) -> None:
        super().__init__()
        _load_kernels()
        self.register_buffer("qweight", qweight)
        self.register_buffer("scale", scale)
        self.dtype = dtype
        self.source = source

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _load_kernels()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _POLICY:
            # For `module_weight`: a number would be a symbol to Dynamo, of which passes cannot ask the value.
            given = [getattr(self, each, None) for each in _POLICY]
            weight_only = given[2] or given[0] is None
            self.__dict__["policy"] = "weight_only" if weight_only else f"{given[1]} {given[0]!r}"

    def _check_input(self, x: Tensor) -> None:
        # The operators check it, too, but do not know what module they are called by.
        k = self.qweight.shape[-1]
        plain = x.layout == torch.strided and not x.is_nested
        if not plain or x.dtype not in ops.SUPPORTED_DTYPES or not x.dim() or x.shape[-1] != k:
            found = f"{x.dtype} {list(x.shape)}" if plain else f"a {'nested' if x.is_nested else x.layout} tensor"
            raise InputError(
                f"{self.path or type(self).__name__}: its input is {found}; give a dense tensor [..., {k}] of "
                f"{', '.join(map(str, ops.SUPPORTED_DTYPES))}"
            )

    def dequantize(self) -> Tensor:
        """The weight in float, a copy.

        Shapes:
            [..., N, K] of `dtype`.
        """
        return ops.dequantize_weight(self.qweight, self.scale, self.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight for code that reads it instead of calling the module; as the float module has it.

        Matmuls with it run in int8 and multiplying it in place by a number scales the weight; other writes raise
        `Int8WeightError`, and any other use dequantizes it, with one warning. To a backend of torch.compile that is not
        ours it is a float tensor made anew: it computes in float, and writes are lost.
        """
        if not is_compiling():
            return self._read()  # type: ignore[no-any-return]
        # Not computed where all matmuls with it become int8.
        weight = self._held().in_float()
        return weight.mT if self.is_transposed else weight

    @weight.setter
    def weight(self, value: Any) -> None:
        # `module.weight *= 2` assigns what it has changed in place.
        if not (isinstance(value, Int8Weight) and value.held.scale is self.scale and value.is_entire):
            raise self._not_replaceable()

    def _not_replaceable(self) -> Int8WeightError:
        return Int8WeightError(
            f"{self.path or type(self).__name__}.weight cannot be replaced, it is int8. Load float weights before "
            "quantize_(model), or call int8compile.dequantize_(model) first. What multiplies it by a number writes "
            "weight.mul_(number)"
        )

    def _held(self) -> Held:
        return Held(self.qweight, self.scale, self.dtype, self.policy, self.path)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _read(self) -> Tensor:
        like = torch.empty_strided(self.qweight.shape, self.qweight.stride(), dtype=self.dtype, device="meta")
        weight = Int8Weight.make(self._held(), like)
        return weight.mT if self.is_transposed else weight

    @property
    def is_transposed(self) -> bool:
        """True if the float weight is [..., K, N]."""
        return self.source == "conv1d" or bool(getattr(self, "transposed", False))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module, but for "weight", which is int8."""
        if name == "weight":
            raise self._not_replaceable()
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Module:
        held = {name: self._buffers.pop(name) for name in BUFFERS if name in self._buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in held.items():
            assert tensor is not None
            moved = fn(tensor)
            if moved.dtype != tensor.dtype:
                # Only where they are may change: a scale in 16 bits would change every result.
                moved = tensor.to(moved.device)
            # In place, as nn.Module does with parameters, and so with ties; that is not possible with the meta device.
            if torch._has_compatible_shallow_copy_type(tensor, moved):
                tensor.data = moved
                moved = tensor
            self._buffers[name] = moved
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if prefix + "SCB" in state_dict:
            state_dict = _from_bitsandbytes(state_dict, prefix)
        # PyTorch would convert: floats to int8 without a scale, and scales to whatever is there.
        given = {name: state_dict[prefix + name] for name in BUFFERS if prefix + name in state_dict}
        for name, tensor in given.items():
            if tensor.dtype != (expected := getattr(self, name).dtype):
                error_msgs.append(f"{prefix}{name} is {tensor.dtype}; it must be {expected}")
        if "scale" in given and (why := bad_scales(given["scale"])):
            error_msgs.append(f"{prefix}scale {why}")
        if prefix + "weight" in state_dict and not state_dict[prefix + "weight"].numel():
            # Hugging Face folders have an empty one, see `Int8CompileQuantizer.get_state_dict_and_metadata`.
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
        if "qweight" not in given and prefix + "weight" in state_dict:
            error_msgs.append(
                f"{prefix}weight is {state_dict[prefix + 'weight'].dtype}, but this layer is int8 and takes "
                f"{prefix}qweight and {prefix}scale. Load float weights before quantize_(model)"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


# Called by code that Dynamo has given up on, the property would be compiled by itself, and return the float weight.
skip_code(Int8Module.weight.fget.__code__)  # type: ignore[attr-defined]


def bad_scales(scale: Tensor) -> str:
    """Describe what is wrong with scales, which must be finite and not negative; "" for nothing, and without data."""
    if scale.is_meta:
        return ""
    bad = scale.numel() - int((scale.isfinite() & (scale >= 0)).sum())
    return f"holds {bad} NaN, Inf or negative of {scale.numel()} entries: the file is damaged" if bad else ""


def _from_bitsandbytes(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A state dict in which the tensors of one layer that bitsandbytes saved have our names."""
    path = prefix.removesuffix(".")
    if f"{prefix}weight_format" in state_dict:
        check_layout(path, state_dict[f"{prefix}weight_format"])
    qweight, scale = bitsandbytes_weight(path, state_dict.get(f"{prefix}weight"), state_dict[f"{prefix}SCB"])
    theirs = {f"{prefix}{name}" for name in ("weight", "SCB", "weight_format")}
    rest = {key: value for key, value in state_dict.items() if key not in theirs}
    return {**rest, f"{prefix}qweight": qweight, f"{prefix}scale": scale}


def bitsandbytes_weight(path: str, weight: Tensor | None, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 weight and its scales of tensors as bitsandbytes saves them (`Linear8bitLt._save_to_state_dict`).

    Args:
        path: The module's, for messages.
        weight: [N, K] int8.
        absmax: `SCB`, [N]: the largest element of each row, 127 times the scale.

    Raises:
        CheckpointError: They are of another dtype or shape.
    """
    if weight is None or weight.dtype != torch.int8 or absmax.shape != weight.shape[:1]:
        raise CheckpointError(
            f"{path}.weight and {path}.SCB are no 8 bit layer of bitsandbytes, which has int8 [N, K] and float32 [N]"
        )
    return weight, absmax.to(torch.float32) / ops.QMAX


def check_layout(path: str, layout: Tensor) -> None:
    """Checks bitsandbytes' `weight_format`: 0 stands for rows.

    Raises:
        CheckpointError: It is a layout for Turing or Ampere, which older versions wrote.
    """
    if int(layout) != 0:
        raise CheckpointError(
            f"{path}.weight_format is {int(layout)}, a layout of older versions of bitsandbytes. Save the model with "
            "bitsandbytes 0.45 or newer, which writes rows"
        )


class Int8Linear(Int8Module):
    """A linear layer in int8, its outliers in float: `int8compile::linear`.

    Args:
        qweight: [N, K] int8.
        scale: [N] float32.
        bias: [N] of a float dtype, or None.
        threshold: See `Int8Config`.
        outliers: See `Int8Config`.
        weight_only: Whether activations stay in float: `int8compile::weight_only_linear`.
        dtype: What `dequantize` gives.
        source: "linear", or "conv1d" for transformers' Conv1D.
    """

    def __init__(
        self,
        qweight: Tensor,
        scale: Tensor,
        bias: nn.Parameter | None = None,
        *,
        threshold: float = 6.0,
        outliers: str = "row",
        weight_only: bool = False,
        dtype: torch.dtype = torch.float32,
        source: Source = "linear",
    ) -> None:
        super().__init__(qweight, scale, dtype, source)
        self.out_features, self.in_features = qweight.shape
        self.register_parameter("bias", bias)
        self.threshold = threshold
        self.outliers = outliers
        self.weight_only = weight_only

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`.

        Shapes:
            x: [..., K] float32, float16 or bfloat16; result: [..., N] of the same dtype. Of a jagged nested tensor
            [B, j, K] every row; the result has the same rows.

        Raises:
            InputError: x has another dtype or another K.
        """
        # What an operator refuses while it is traced, Dynamo would wrap.
        if is_compiling() and (result := self._of_jagged(x)) is not None:
            return result
        try:
            if self.weight_only:
                result = ops.weight_only_linear.default(x, self.qweight, self.scale, self.bias)
            else:
                result = ops.linear.default(x, self.qweight, self.scale, self.bias, self.threshold, self.outliers)
        except (RuntimeError, InputError):
            if (result := self._of_jagged(x)) is None:
                raise
        return result

    def _of_jagged(self, x: Tensor) -> Tensor | None:
        """Return the result of a jagged nested tensor, None for any other; raise `InputError` if x does not fit."""
        if x.is_nested and x.layout == torch.jagged:
            # Its rows lie one behind the other, and none depends on another.
            nested: Any = x
            rows = self.forward(nested.values())
            return torch.nested.nested_tensor_from_jagged(rows, nested.offsets(), nested.lengths())
        self._check_input(x)
        return None

    def extra_repr(self) -> str:
        """The format, for `print(model)`."""
        policy = "weight only" if self.weight_only else f"outliers={self.outliers!r}, threshold={self.threshold:g}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"int8, {policy}"
        )


class Int8Embedding(Int8Module):
    """An embedding whose table is the int8 weight of the output projection that it is tied to.

    Args:
        qweight: [V, D] int8.
        scale: [V] float32.
        padding_idx: As in nn.Embedding.
        dtype: What the vectors are made of.
    """

    def __init__(
        self, qweight: Tensor, scale: Tensor, *, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(qweight, scale, dtype, "embedding")
        self.num_embeddings, self.embedding_dim = qweight.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """The vectors of some tokens.

        Shapes:
            ids: [...] integers; result: [..., D] of `dtype`.
        """
        return (F.embedding(ids, self.qweight) * F.embedding(ids, self.scale.unsqueeze(-1))).to(self.dtype)

    def extra_repr(self) -> str:
        """The format, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, int8"


class Int8Experts(Int8Module):
    """The weights of a mixture's experts, which stand in one tensor.

    Args:
        qweight: [E, N, K] int8.
        scale: [E, N] float32.
        threshold: See `Int8Config`.
        outliers: See `Int8Config`.
        transposed: Whether the float weight was [E, K, N].
        dtype: What `dequantize` gives.
    """

    def __init__(
        self,
        qweight: Tensor,
        scale: Tensor,
        *,
        threshold: float = 6.0,
        outliers: str = "row",
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(qweight, scale, dtype, "experts")
        self.threshold = threshold
        self.outliers = outliers
        self.transposed = transposed

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Each row by its expert's weight, `int8compile::grouped_linear`.

        Shapes:
            x: [S, K], the rows of the first expert, then those of the second, and so on; ends: [E] int32, where each
            expert's rows end; result: [S, N], zeros behind the last end.

        Raises:
            InputError: x has another dtype or another K, or `ends` do not ascend.
        """
        self._check_input(x)
        result: Tensor = ops.grouped_linear.default(x, self.qweight, self.scale, ends, self.threshold, self.outliers)
        return result

    def extra_repr(self) -> str:
        """The format, for `print(model)`."""
        experts, n, k = self.qweight.shape
        return f"{experts} experts, in_features={k}, out_features={n}, int8, outliers={self.outliers!r}"
