"""Declare operators: one dataclass gives an operator's schema, fake and the checks of its Python implementations.

`Declaration` is for linears that take float x; their arguments follow from their kind. `Call` is for all others,
`QuantizedLinear` included: a subclass is a frozen dataclass whose fields are the operator's arguments. The C++ kernels
check again, in `operators.cpp`. `signatures.py` makes C and C++ signatures from the registered schemas.

`d`, float32 [K] or [K] for each weight, holds the factors of the rotation: x is multiplied by d, then mixed by a
Hadamard matrix (`reference.py`). It is None where the weight is not rotated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from int8compile.errors import InputError
from int8compile.ops import packing, reference

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The same, for messages.
DTYPES = ", ".join(map(str, SUPPORTED_DTYPES))

# Schema types by the annotations of a `Call`'s fields.
_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "int": "int",
    "torch.dtype": "ScalarType",
    "str": "str",
}


def schema_of(name: str, parameters: Mapping[str, str], results: Sequence[str] = ("",)) -> str:
    """Return an operator's schema, as `torch.library` takes it.

    Args:
        name: The operator's name, without "int8compile::".
        parameters: The types of its arguments by their names.
        results: The names of its results, all tensors; "" for one without a name.
    """
    arguments = ", ".join(f"{kind} {parameter}" for parameter, kind in parameters.items())
    tensors = ", ".join(f"Tensor {result}".rstrip() for result in results)
    return f"{name}({arguments}) -> " + (tensors if len(results) == 1 else f"({tensors})")


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call of an operator, checked. A subclass's fields are the arguments, in their order."""

    name: ClassVar[str]
    results: ClassVar[tuple[str, ...]] = ("",)

    def __post_init__(self) -> None:
        """Check the call."""
        self.check()

    @classmethod
    def schema(cls) -> str:
        """Return the schema, as `torch.library` takes it."""
        parameters = {each.name: _SCHEMA_TYPES[str(each.type)] for each in dataclasses.fields(cls)}
        return schema_of(cls.name, parameters, cls.results)

    @classmethod
    def implementation(cls, *args: Any) -> Any:
        """Check a call and compute it in PyTorch."""
        return cls(*args).compute()

    @classmethod
    def fake(cls, *args: Any) -> Any:
        """Check a call and return results of the right shape."""
        return cls(*args).empty()

    def check(self) -> None:
        """Check the call.

        Raises:
            InputError: Names the argument, its value and what is allowed.
        """

    def compute(self) -> Any:
        """Return the results, by PyTorch's operators."""

    def empty(self) -> Any:
        """Return uninitialized results."""


@dataclasses.dataclass(frozen=True)
class Declaration:
    """A linear operator that takes float x.

    Attributes:
        name: The operator's name, without "int8compile::".
        compute: Computes the result after the checks: the definition, or in `triton_kernels/operators.py` the GPU path.
            It takes the schema's arguments without `sizes`, and a weight that is not packed.
        packed: Whether the weight has the layout of `packing.pack_weight`.
        batch_dims: 1 where x is a batch and has a weight for each of its matrices, else 0.
        results: The number of weights that are concatenated along N, with one result each. More than 1 needs `packed`
            and not `grouped`.
        grouped: Whether rows of x use one of several weights, by `ends`.
        rotates: Whether the operator takes d. Only `column_linear` does not, and its threshold is an absolute |x|.
        quantizes: Whether the operator takes a threshold of outliers. Weight-only linears do not: their x becomes fixed
            point.
    """

    name: str
    compute: Callable[..., Tensor]
    packed: bool = False
    batch_dims: int = 0
    results: int = 1
    grouped: bool = False
    rotates: bool = True
    quantizes: bool = True

    @property
    def weight(self) -> str:
        """The name of the weight's argument."""
        return "packed" if self.packed else "qweight"

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of the arguments for the numbers of outputs of all results but the last."""
        return tuple(f"n{i}" for i in range(self.results - 1))

    @property
    def parameters(self) -> dict[str, str]:
        """The types of the arguments in the schema, by their names and in their order."""
        return {
            "x": "Tensor",
            self.weight: "Tensor",
            "scale": "Tensor",
            **({"d": "Tensor?"} if self.rotates else {}),
            **({"ends": "Tensor"} if self.grouped else {"bias": "Tensor?"}),
            **dict.fromkeys(self.sizes, "int"),
            **({"threshold": "float"} if self.quantizes else {}),
        }

    def schema(self) -> str:
        """Return the schema, as `torch.library` takes it."""
        return schema_of(self.name, self.parameters, ("",) * self.results)

    def given(self, args: Sequence[Any]) -> dict[str, Any]:
        """Return the arguments of a call by their names."""
        return dict(zip(self.parameters, args, strict=True))

    def implementation(self, *args: Any) -> Any:
        """Check a call and compute it in PyTorch."""
        if self.results > 1:
            return tuple(self._run(part) for part in self._parts(self.given(args)))
        return self._run(self.given(args))

    def fake(self, *args: Any) -> Any:
        """Check a call and return results of the right shape."""
        if self.results > 1:
            return tuple(self._empty(part) for part in self._parts(self.given(args)))
        return self._empty(self.given(args))

    def _run(self, given: dict[str, Any]) -> Tensor:
        self.check(given)
        if self.packed:
            given[self.weight] = packing.unpack_weight(given["packed"], given["scale"].shape[-1], given["x"].shape[-1])
        return self.compute(*given.values())

    def _empty(self, given: Mapping[str, Any]) -> Tensor:
        self.check(given)
        x: Tensor = given["x"]
        return x.new_empty(*x.shape[:-1], given["scale"].shape[-1])

    def check(self, given: Mapping[str, Any]) -> None:
        """Check a call. Fakes and implementations both do: eager mode does not run a fake.

        Raises:
            InputError: Names the argument, its value and what is allowed.
        """
        name = f"int8compile::{self.name}"
        x: Tensor = given["x"]
        weight: Tensor = given[self.weight]
        scale: Tensor = given["scale"]
        if x.dtype not in SUPPORTED_DTYPES:
            raise InputError(f"{name}: x is {x.dtype}; allowed are {DTYPES}. Convert it, e.g. x.to(torch.float32)")
        several = 1 if self.grouped else self.batch_dims
        dims = several + (4 if self.packed else 2)
        if weight.dtype != (torch.uint8 if self.packed else torch.int8) or weight.dim() != dims:
            raise InputError(
                f"{name}: {self.weight} is {weight.dtype} {list(weight.shape)}; give "
                f"{'uint8' if self.packed else 'int8'} of {dims} dimensions, from int8compile.ops."
                f"{'pack_weight' if self.packed else 'quantize_weight'}"
            )
        rows = [*weight.shape[:several], scale.shape[-1] if self.packed and scale.dim() else weight.shape[several]]
        if scale.dtype != torch.float32 or list(scale.shape) != rows:
            raise InputError(
                f"{name}: scale is {scale.dtype} {list(scale.shape)}; give float32 "
                f"{'[..., N]' if self.packed else rows}, one for each output of the weight"
            )
        if self.grouped:
            fits = x.dim() == 2
        else:
            fits = x.dim() == 3 and x.shape[0] == weight.shape[0] if several else x.dim() >= 1
        if fits and self.packed:
            fits = tuple(weight.shape[several:]) == packing.packed_shape(scale.shape[-1], x.shape[-1])
        elif fits:
            fits = x.shape[-1] == weight.shape[-1]
        if not fits:
            shape = (
                "[S, K] for [E, N, K]"
                if self.grouped
                else "[B, M, K] for [B, N, K]"
                if several
                else "[..., K] for [N, K]"
            )
            outputs = f" of {scale.shape[-1]} outputs" if self.packed else ""
            raise InputError(
                f"{name}: x is {list(x.shape)} and {self.weight} {list(weight.shape)}{outputs}; x must be {shape}"
            )
        k = x.shape[-1]
        if k > reference.MAX_K:
            raise InputError(
                f"{name}: K is {k}; at most {reference.MAX_K} is exact in int32. Split the layer or skip it"
            )
        check_d(name, given.get("d"), k, weight.shape[:several])
        bias: Tensor | None = given.get("bias")
        if bias is not None and (bias.shape != scale.shape or not bias.is_floating_point()):
            raise InputError(
                f"{name}: bias is {bias.dtype} {list(bias.shape)}; give {list(scale.shape)} of a float dtype, or None"
            )
        if self.grouped and given["ends"].shape != weight.shape[:1]:
            raise InputError(
                f"{name}: ends is {list(given['ends'].shape)}; give [{weight.shape[0]}], one for each weight of qweight"
            )
        if self.quantizes:
            check_threshold(name, given["threshold"], absolute=not self.rotates)

    def _parts(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        """Split a call into calls with one weight each. Each weight has its own ceil(N / 16) panels."""
        packed, scale, bias = given["packed"], given["scale"], given["bias"]
        if scale.dim() != 1 or (bias is not None and bias.shape != scale.shape):
            shape = None if bias is None else f"{bias.dtype} {list(bias.shape)}"
            raise InputError(
                f"int8compile::{self.name}: scale is {scale.dtype} {list(scale.shape)} and bias is {shape}; give "
                "float32 [N] of all outputs together, and [N] of a float dtype or None"
            )
        first = [given.pop(size) for size in self.sizes]
        outputs = [*first, scale.shape[0] - sum(first)]
        if min(outputs) < 0:
            raise InputError(
                f"int8compile::{self.name}: outputs {outputs}: {', '.join(self.sizes)} are negative or exceed N, "
                f"which is {scale.shape[0]} by scale"
            )
        panels = [packing.packed_shape(n, 1)[0] for n in outputs]
        if packed.dim() == 0 or packed.shape[0] != sum(panels):
            raise InputError(
                f"int8compile::{self.name}: packed is {list(packed.shape)}; outputs {outputs} have {sum(panels)} panels"
            )
        biases = [None] * self.results if bias is None else bias.split(outputs)
        return [
            {**given, "packed": each, "scale": its_scale, "bias": its_bias}
            for each, its_scale, its_bias in zip(packed.split(panels), scale.split(outputs), biases, strict=True)
        ]


def check_d(name: str, d: Tensor | None, k: int, batch: Sequence[int]) -> None:
    """Check the d that rotates the K inputs of one weight, or of a batch of weights.

    Raises:
        InputError: d is not float32 [K] or [batch, K].
    """
    if d is None or (d.dtype == torch.float32 and list(d.shape) in ([k], [*batch, k])):
        return
    allowed = f"[{k}]" + (f" or {[*batch, k]}" if batch else "")
    raise InputError(
        f"{name}: d is {d.dtype} {list(d.shape)}; give float32 {allowed}, the d of quantize_weight, or None for a "
        "weight that is not rotated"
    )


def check_threshold(name: str, threshold: float, *, absolute: bool = False) -> None:
    """Check a threshold of outliers, absolute or in mean magnitudes of a row.

    Raises:
        InputError: The threshold is not finite, is negative, or lies between 0 and 1 mean magnitudes.
    """
    if math.isfinite(threshold) and (threshold >= (0 if absolute else 1) or threshold == 0):
        return
    if absolute:
        raise InputError(f"{name}: threshold is {threshold}; give a finite number >= 0, 0 for no outliers")
    raise InputError(
        f"{name}: threshold is {threshold}; give a finite number >= 1, in mean magnitudes of a row, or 0 for no "
        "outliers"
    )
