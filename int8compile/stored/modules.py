"""Modules with an int8 weight, which `quantize_` puts in the place of linears, embeddings and experts.

Each has the buffers `qweight` (int8), `scale` (float32) and, where its weight is rotated, `d` (float32). None has a
parameter called `weight`, so that no loader takes integers for floats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code
from torch.compiler import is_compiling

from int8compile import cpu, ops, triton_kernels
from int8compile.config import Int8Config, OutlierPolicy, default_threshold
from int8compile.errors import ConfigError, InputError, Int8WeightError
from int8compile.stored import bitsandbytes
from int8compile.stored.module_weight import Held, Int8Weight

# The kind of float module that an int8 module was made from.
Source = Literal["linear", "conv1d", "embedding", "experts"]

# `d` is None where the weight is not rotated; state dicts and files then have no `d`.
BUFFERS = ("qweight", "scale", "d")
# The attributes that `policy` is made of.
_POLICY = ("threshold", "outliers", "weight_only")


@functools.cache
def _load_kernels() -> None:
    """Load the kernels, once; the operators run through PyTorch before. Both loaders warn where there are none."""
    cpu.load()
    if torch.cuda.is_available():
        triton_kernels.load()


class Int8Module(nn.Module):
    """The base class of int8 modules.

    Attributes:
        qweight: [..., N, K] int8.
        scale: [..., N] float32; `qweight * scale` is the weight, rotated where there is a d.
        d: [K] float32, or [E, K] for experts that each read an input of their own: the factors of the rotation. None
            for a weight that is not rotated. Linears that read the same x share one tensor.
        dtype: The dtype of the dequantized weight. `.to(dtype)` of the module changes it; `scale` and `d` stay float32.
        source: The kind of module it was made from.
        path: Its path in the model, for messages.
    """

    path = ""
    # Of an embedding table; other modules compute their policy from the attributes.
    policy = "weight_only"
    qweight: Tensor
    scale: Tensor
    d: Tensor | None
    threshold: Any
    outliers: OutlierPolicy

    def __init__(self, qweight: Tensor, scale: Tensor, d: Tensor | None, dtype: torch.dtype, source: Source) -> None:
        super().__init__()
        _load_kernels()
        self.register_buffer("qweight", qweight)
        self.register_buffer("scale", scale)
        self.register_buffer("d", d)
        self.dtype = dtype
        self.source = source

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _load_kernels()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a threshold of None becomes the default.

        Raises:
            ConfigError: `threshold` or `outliers` is not allowed.
        """
        if name not in _POLICY:
            super().__setattr__(name, value)
            return
        given: dict[str, Any] = {each: getattr(self, each, None) for each in _POLICY} | {name: value}
        config, rotated = Int8Config(threshold=given["threshold"], outliers=given["outliers"]), self.d is not None
        if config.outliers == "column" and (rotated or self.qweight.dim() > 2):
            raise ConfigError(
                f"{self.path or type(self).__name__}: outliers='column' is for matrices that are not rotated; quantize "
                "the float model with outliers='column'"
            )
        threshold: Any = config.threshold_of(rotated=rotated)
        super().__setattr__(name, threshold if name == "threshold" else value)
        # A string, for `module_weight`: Dynamo would make a number a symbol, whose value passes cannot read.
        self.__dict__["policy"] = "weight_only" if given["weight_only"] else f"{config.outliers} {threshold!r}"

    def _check_input(self, x: Tensor) -> None:
        # The operators check the input too, but do not know the path of their module.
        k = self.qweight.shape[-1]
        plain = x.layout == torch.strided and not x.is_nested
        if not plain or x.dtype not in ops.SUPPORTED_DTYPES or not x.dim() or x.shape[-1] != k:
            found = f"{x.dtype} {list(x.shape)}" if plain else f"a {'nested' if x.is_nested else x.layout} tensor"
            raise InputError(
                f"{self.path or type(self).__name__}: its input is {found}; give a dense tensor [..., {k}] of "
                f"{', '.join(map(str, ops.SUPPORTED_DTYPES))}"
            )

    def dequantize(self) -> Tensor:
        """Return the weight in float, a copy.

        Shapes:
            [..., N, K] of `dtype`.
        """
        return ops.dequantize_weight(self.qweight, self.scale, self.d, self.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight, shaped as in the float module, for code that reads it instead of calling the module.

        Matmuls with it run in int8, and multiplying it in place by a number scales the weight. Other writes raise
        `Int8WeightError`, and any other use dequantizes the weight, with one warning. Under other backends of
        torch.compile it is a new float tensor: it computes in float, and writes are lost.
        """
        if not is_compiling():
            return self._read()  # type: ignore[no-any-return]
        # Dead code, and so not computed, where all matmuls with it become int8.
        weight = self._held().in_float()
        return weight.mT if self.is_transposed else weight

    @weight.setter
    def weight(self, value: Any) -> None:
        # `module.weight *= 2` changes the weight in place, and then assigns it.
        if not (isinstance(value, Int8Weight) and value.held.scale is self.scale and value.is_entire):
            raise self._not_replaceable()

    @property
    def rotation(self) -> int:
        """The number of inputs that are rotated together; 1 where the weight is not rotated."""
        return 1 if self.d is None else ops.rotation_size(self.d.shape[-1])

    def _numerics(self) -> str:
        """Return how activations are quantized and rotated, for `print(model)`."""
        weight_only = self.policy == "weight_only"
        policy = "weight only" if weight_only else f"outliers={self.outliers!r}, threshold={self.threshold:g}"
        return policy if self.d is None else f"{policy}, rotation={self.rotation}"

    def _not_replaceable(self) -> Int8WeightError:
        return Int8WeightError(
            f"{self.path or type(self).__name__}.weight cannot be replaced, it is int8. Load float weights before "
            "quantize_(model), or call int8compile.dequantize_(model) first. To multiply it by a "
            "number, write weight.mul_(number)"
        )

    def _held(self) -> Held:
        return Held(self.qweight, self.scale, self.d, self.dtype, self.policy, self.path)

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
        """Register a parameter; raise `Int8WeightError` for "weight", which is int8."""
        if name == "weight":
            raise self._not_replaceable()
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Module:
        held = {name: self._buffers.pop(name) for name in BUFFERS if self._buffers.get(name) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in held.items():
            assert tensor is not None
            moved = fn(tensor)
            if moved.dtype != tensor.dtype:
                # Only the device may change: a scale in 16 bits would change every result.
                moved = tensor.to(moved.device)
            # In place, as nn.Module does with parameters, which keeps ties; not possible from or to the meta device.
            if torch._has_compatible_shallow_copy_type(tensor, moved):
                tensor.data = moved
                moved = tensor
            self._buffers[name] = moved
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars and self.d is not None:
            # A copy: siblings share one tensor, and a safetensors file holds no tensor under several names.
            destination[prefix + "d"] = self.d.detach().clone()

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
            state_dict = bitsandbytes.renamed(state_dict, prefix)
        errors = len(error_msgs)
        # PyTorch would convert floats to int8 without a scale, and scales to the dtype in the module.
        given = {name: state_dict[prefix + name] for name in BUFFERS if prefix + name in state_dict}
        error_msgs += [f"{prefix}{problem}" for problem in self._problems(given, state_dict, prefix)]
        if prefix + "weight" in state_dict and not state_dict[prefix + "weight"].numel():
            # Hugging Face folders have an empty weight, see `Int8CompileQuantizer.get_state_dict_and_metadata`.
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + "weight"}
        if "qweight" not in given and prefix + "weight" in state_dict:
            error_msgs.append(
                f"{prefix}weight is {state_dict[prefix + 'weight'].dtype}, but this layer is int8 and takes "
                f"{prefix}qweight and {prefix}scale. Load float weights before quantize_(model)"
            )
            return
        # Without d, which PyTorch would report as missing or write into; siblings that share it may get different ones.
        d = self._buffers.pop("d", None)
        try:
            super()._load_from_state_dict(
                {key: value for key, value in state_dict.items() if key != prefix + "d"},
                *(prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs),
            )
        finally:
            self._buffers["d"] = d
        if "qweight" in given and len(error_msgs) == errors:
            self._take_rotation(given.get("d"), assign=local_metadata.get("assign_to_params_buffers", False))

    def _problems(self, given: Mapping[str, Tensor], state_dict: Mapping[str, Any], prefix: str) -> Iterator[str]:
        """Yield what is wrong with the tensors of a state dict.

        Args:
            given: The tensors of this module by name.
            state_dict: The whole state dict.
            prefix: The prefix of the module's names, for messages.
        """
        for name, tensor in given.items():
            if tensor.dtype != (expected := torch.int8 if name == "qweight" else torch.float32):
                yield f"{name} is {tensor.dtype}; it must be {expected}"
        if "scale" in given and (why := bad_scales(given["scale"])):
            yield f"scale {why}"
        if "d" in given and (why := self._misfit(given["d"])):
            yield f"d {why}"
        if "d" in given and "qweight" not in given:
            yield f"d is there without the {prefix}qweight that was rotated with it"
        # A state dict without any d is of a version that rotated nothing, or of bitsandbytes.
        if self.d is not None and "qweight" in given and "d" not in given and _has_rotations(state_dict):
            yield f"d is missing, which {prefix}qweight was rotated with"

    def _misfit(self, d: Tensor) -> str:
        """Return why a d does not fit this module's weight; "" if it fits."""
        *batch, _, k = self.qweight.shape
        if self.source == "embedding":
            return "is there, but a table of embeddings is never rotated"
        if self.outliers == "column" or ops.rotation_size(k) == 1:
            return f"is there, but a weight of {k} inputs with outliers={self.outliers!r} is never rotated"
        if list(d.shape) not in ([k], [*batch, k]):
            return f"has the shape {list(d.shape)}; it must be {[k]}" + (f" or {[*batch, k]}" if batch else "")
        return bad_rotation(d)

    def _take_rotation(self, d: Tensor | None, *, assign: bool) -> None:
        """Take the d of a loaded weight. A threshold that is the default becomes the default of the new rotation."""
        before = self.d
        if (d is None) != (before is None) and self.threshold == default_threshold(rotated=before is not None):
            self.threshold = default_threshold(rotated=d is not None)
        if d is None:
            self.d = None
        elif before is None or before.is_meta or before.device != d.device or not torch.equal(before, d):
            self.d = d if assign else d.detach().to(self.qweight.device, copy=True)


# Otherwise Dynamo would compile the property by itself in code that it runs eagerly, and return the float weight.
skip_code(Int8Module.weight.fget.__code__)  # type: ignore[attr-defined]


def bad_scales(scale: Tensor) -> str:
    """Return what is wrong with scales, which must be finite and not negative; "" if nothing is, or without data."""
    if scale.is_meta:
        return ""
    bad = scale.numel() - int((scale.isfinite() & (scale >= 0)).sum())
    return f"holds {bad} NaN, Inf or negative of {scale.numel()} entries: the file is damaged" if bad else ""


def bad_rotation(d: Tensor) -> str:
    """Return what is wrong with a d, which must be finite and not 0; "" if nothing is, or without data."""
    if d.is_meta:
        return ""
    bad = d.numel() - int((d.isfinite() & (d != 0)).sum())
    return f"holds {bad} NaN, Inf or 0 of {d.numel()} entries: the file is damaged" if bad else ""


def _has_rotations(state_dict: Mapping[str, Any]) -> bool:
    """Return whether any weight of a state dict is rotated."""
    return any(key.endswith(".d") and f"{key[:-1]}qweight" in state_dict for key in state_dict)


def share_rotations(model: nn.Module) -> None:
    """Have int8 modules of one parent with equal d share one tensor.

    Loading gives each module a tensor of its own. A compiled graph rotates and quantizes x once for modules that share
    their d.
    """
    for parent in model.modules():
        found: list[Tensor] = []
        for module in parent.children():
            d = module._buffers.get("d") if isinstance(module, Int8Module) else None
            if d is None or d.is_meta:
                continue
            same = next((each for each in found if each.device == d.device and torch.equal(each, d)), None)
            if same is None:
                found.append(d)
            else:
                module.d = same


class Int8Linear(Int8Module):
    """A linear layer in int8: `int8compile::linear`, or `column_linear` for LLM.int8() as published.

    Args:
        qweight: [N, K] int8.
        scale: [N] float32.
        bias: [N] of a float dtype, or None.
        d: [K] float32, the factors of the rotation; None where the weight is not rotated.
        threshold: See `Int8Config`.
        outliers: See `Int8Config`.
        weight_only: Whether activations are not quantized: `int8compile::weight_only_linear`.
        dtype: The dtype of the dequantized weight.
        source: "linear", or "conv1d" for transformers' Conv1D.

    Raises:
        ConfigError: The threshold is not allowed, or `outliers` is "column" and the weight rotated.
    """

    def __init__(
        self,
        qweight: Tensor,
        scale: Tensor,
        bias: nn.Parameter | None = None,
        *,
        d: Tensor | None = None,
        threshold: float | None = None,
        outliers: OutlierPolicy = "row",
        weight_only: bool = False,
        dtype: torch.dtype = torch.float32,
        source: Source = "linear",
    ) -> None:
        super().__init__(qweight, scale, d, dtype, source)
        self.out_features, self.in_features = qweight.shape
        self.register_parameter("bias", bias)
        self.outliers = outliers
        self.threshold = threshold
        self.weight_only = weight_only

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`.

        Shapes:
            x: [..., K] float32, float16 or bfloat16; result: [..., N] of the same dtype. A jagged nested tensor
            [B, j, K] gives [B, j, N] with the same rows.

        Raises:
            InputError: x has another dtype or another K.
        """
        # Before the operator runs: Dynamo would wrap an error that the operator raises while it is traced.
        if is_compiling() and (result := self._of_jagged(x)) is not None:
            return result
        held = self._buffers
        if "qweight" in held:  # Faster than attributes, each of which is a call.
            qweight, scale, d = held["qweight"], held["scale"], held["d"]
        else:  # Parameters in an offloaded model: transformers offloads nothing else.
            qweight, scale, d = self.qweight, self.scale, self.d
        try:
            if self.weight_only:
                result = ops.weight_only_linear.default(x, qweight, scale, d, self.bias)
            elif self.outliers == "row":
                result = ops.linear.default(x, qweight, scale, d, self.bias, self.threshold)
            else:
                result = ops.column_linear.default(x, qweight, scale, self.bias, self.threshold)
        except (RuntimeError, InputError):
            if (result := self._of_jagged(x)) is None:
                raise
        return result

    def _of_jagged(self, x: Tensor) -> Tensor | None:
        """Return the result of a jagged nested tensor, None for a dense one; raise `InputError` if x does not fit."""
        if x.is_nested and x.layout == torch.jagged:
            # Its rows are contiguous, and results do not depend on other rows.
            nested: Any = x
            rows = self.forward(nested.values())
            return torch.nested.nested_tensor_from_jagged(rows, nested.offsets(), nested.lengths())
        self._check_input(x)
        return None

    def extra_repr(self) -> str:
        """Return the sizes and options, for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"int8, {self._numerics()}"
        )


class Int8Embedding(Int8Module):
    """An embedding with the int8 weight of the output projection that it is tied to; never rotated.

    Args:
        qweight: [V, D] int8.
        scale: [V] float32.
        padding_idx: As in nn.Embedding.
        dtype: The dtype of the vectors.
    """

    def __init__(
        self, qweight: Tensor, scale: Tensor, *, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(qweight, scale, None, dtype, "embedding")
        self.num_embeddings, self.embedding_dim = qweight.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors of tokens.

        Shapes:
            ids: [...] integers; result: [..., D] of `dtype`.
        """
        return (F.embedding(ids, self.qweight) * F.embedding(ids, self.scale.unsqueeze(-1))).to(self.dtype)

    def extra_repr(self) -> str:
        """Return the sizes and options, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, int8"


class Int8Experts(Int8Module):
    """The weights of all experts of a mixture, in one tensor.

    Outliers are by row: LLM.int8(), with columns, is defined for single matrices.

    Args:
        qweight: [E, N, K] int8.
        scale: [E, N] float32.
        d: [K] float32 for all experts, or [E, K] for each: the factors of the rotation; None where there is none.
        threshold: See `Int8Config`.
        transposed: Whether the float weight was [E, K, N].
        dtype: The dtype of the dequantized weight.

    Raises:
        ConfigError: The threshold is not allowed.
    """

    outliers: OutlierPolicy = "row"

    def __init__(
        self,
        qweight: Tensor,
        scale: Tensor,
        *,
        d: Tensor | None = None,
        threshold: float | None = None,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(qweight, scale, d, dtype, "experts")
        self.threshold = threshold
        self.transposed = transposed

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return the product of each row and its expert's weight, by `int8compile::grouped_linear`.

        Shapes:
            x: [S, K], the rows of the first expert, then those of the second, and so on; ends: [E] int32, where the
            rows of each expert end; result: [S, N], with zeros after the last end.

        Raises:
            InputError: x has another dtype or another K, or `ends` do not ascend.
        """
        self._check_input(x)
        result: Tensor = ops.grouped_linear.default(x, self.qweight, self.scale, self.d, ends, self.threshold)
        return result

    def extra_repr(self) -> str:
        """Return the sizes and options, for `print(model)`."""
        experts, n, k = self.qweight.shape
        return f"{experts} experts, in_features={k}, out_features={n}, int8, {self._numerics()}"
