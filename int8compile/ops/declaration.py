"""What an operator is declared by: its schema, checks, fake and the C function of exported packages follow from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from int8compile.errors import InputError
from int8compile.ops import packing, reference

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Types of a schema, as C functions of AOTInductor's packages have them.
_C_TYPES = {
    "Tensor": "AtenTensorHandle",
    "Optional[Tensor]": "AtenTensorHandle*",
    "float": "double",
    "int": "int64_t",
    "bool": "int32_t",
    "ScalarType": "int32_t",
}


@dataclasses.dataclass(frozen=True)
class Declaration:
    """A linear operator.

    Attributes:
        name: The operator's, without "int8compile::".
        compute: Its definition, over the arguments of the schema, of a weight that is not packed.
        packed: Whether its weight is as `packing.pack_weight` makes it.
        batch_dims: 1 where there is a weight for each of a batch of x.
        results: How many weights lie one behind the other, with a result for each.
        grouped: Whether rows of x have one of several weights, by `ends`.
        rotates: Whether x can be rotated.
        quantizes: Whether x is quantized, with a threshold.
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
        """The names of the arguments that say how many outputs the first results have."""
        return tuple(f"n{i}" for i in range(self.results - 1))

    @property
    def parameters(self) -> dict[str, str]:
        """The arguments in their order, with their types in the schema."""
        return {
            "x": "Tensor",
            self.weight: "Tensor",
            "scale": "Tensor",
            **({"d": "Tensor?"} if self.rotates else {}),
            **({"ends": "Tensor"} if self.grouped else {"bias": "Tensor?"}),
            **dict.fromkeys(self.sizes, "int"),
            **({"threshold": "float"} if self.quantizes else {}),
        }

    @property
    def schema(self) -> str:
        """The schema, as `torch.library` takes it."""
        result = "Tensor" if self.results == 1 else f"({', '.join(['Tensor'] * self.results)})"
        arguments = ", ".join(f"{kind} {name}" for name, kind in self.parameters.items())
        return f"{self.name}({arguments}) -> {result}"

    def given(self, args: Sequence[Any]) -> dict[str, Any]:
        """Return a call's arguments by their names."""
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
        """Check a call. Fakes and implementations both do: a check in a fake alone is not seen in eager mode.

        Raises:
            InputError: Names the argument, what it was and what is allowed.
        """
        name = f"int8compile::{self.name}"
        x: Tensor = given["x"]
        weight: Tensor = given[self.weight]
        scale: Tensor = given["scale"]
        if x.dtype not in SUPPORTED_DTYPES:
            allowed = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
            raise InputError(f"{name}: x is {x.dtype}; allowed are {allowed}. Convert it, e.g. x.to(torch.float32)")
        several = 1 if self.grouped else self.batch_dims
        dims = several + (4 if self.packed else 2)
        if weight.dtype != (torch.uint8 if self.packed else torch.int8) or weight.dim() != dims:
            raise InputError(
                f"{name}: {self.weight} is {weight.dtype} {list(weight.shape)}; give "
                f"{'uint8' if self.packed else 'int8'} of {dims} dimensions, as int8compile.ops."
                f"{'pack_weight' if self.packed else 'quantize_weight'} makes"
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
        """Return the calls of one weight each. Each weight has panels of its own: ceil(N / 16) of them."""
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
            raise InputError(f"int8compile::{self.name}: outputs {outputs} do not add up to scale's {scale.shape[0]}")
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
    """Check what rotates K inputs of one weight, or of a batch of them.

    Raises:
        InputError: It is not float32 [K] or [batch, K].
    """
    if d is None or (d.dtype == torch.float32 and list(d.shape) in ([k], [*batch, k])):
        return
    allowed = f"[{k}]" + (f" or {[*batch, k]}" if batch else "")
    raise InputError(
        f"{name}: d is {d.dtype} {list(d.shape)}; give float32 {allowed}, that of quantize_weight, or None for a "
        "weight that is not rotated"
    )


def check_threshold(name: str, threshold: float, *, absolute: bool = False) -> None:
    """Check a threshold of outliers, absolute or in mean magnitudes of a row.

    Raises:
        InputError: It is not finite, negative, or between 0 and 1 mean magnitudes.
    """
    if math.isfinite(threshold) and (threshold >= (0 if absolute else 1) or threshold == 0):
        return
    if absolute:
        raise InputError(f"{name}: threshold is {threshold}; give a finite number >= 0, 0 for no outliers")
    raise InputError(
        f"{name}: threshold is {threshold}; give a finite number >= 1, in mean magnitudes of a row, or 0 for no "
        "outliers"
    )


def c_parameters(op: torch._ops.OpOverload) -> str:
    """Return the parameters of the C function that computes an operator in exported packages, with its results."""
    arguments = [f"{_C_TYPES[str(each.real_type)]} {each.name}" for each in op._schema.arguments]
    count = len(op._schema.returns)
    results = [f"AtenTensorHandle* y{i if count > 1 else ''}" for i in range(count)]
    return ", ".join([*arguments, *results])
