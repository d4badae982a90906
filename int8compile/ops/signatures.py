"""Make C and C++ signatures of the operators from their schemas.

The kernels are compiled with `header`. It declares the C++ functions that compute the operators, so a definition with
other parameters does not compile. It also lists the operators to register for the CPU, and the C functions of exported
packages. AOTInductor declares the same C functions, by `c_function`, where it calls them.
"""

from __future__ import annotations

import torch

# They define the operators.
from int8compile.ops import linears, quantized  # noqa: F401

# By the type in a schema: the type in a C function for AOTInductor, and in the C++ function that computes the operator.
_TYPES = {
    "Tensor": ("AtenTensorHandle", "const Tensor&"),
    "Optional[Tensor]": ("AtenTensorHandle*", "const Maybe&"),
    "float": ("double", "double"),
    "int": ("int64_t", "int64_t"),
    "ScalarType": ("int32_t", "int32_t"),
}


def _overloads(names: str) -> tuple[torch._ops.OpOverload, ...]:
    return tuple(getattr(torch.ops.int8compile, name).default for name in names.split())


# The operators that C++ implements for the dispatch key CPU.
REGISTERED = _overloads(
    "pack_weight quantize_weight linear linear_no_grad batched_linear weight_only_linear weight_only_linear_no_grad "
    "packed_linear packed_linear_no_grad packed_linear_pair_no_grad packed_linear_triple_no_grad packed_batched_linear "
    "packed_weight_only_linear packed_weight_only_linear_no_grad"
)
# The operators that an exported package has as C functions, by its device.
PACKAGED = {
    "cpu": _overloads(
        "linear_no_grad weight_only_linear_no_grad grouped_linear packed_linear_no_grad packed_linear_pair_no_grad "
        "packed_linear_triple_no_grad packed_batched_linear packed_weight_only_linear_no_grad"
    ),
    "cuda": _overloads(
        "quantize_rows norm_quantize_rows quantized_linear grouped_linear batched_linear weight_only_linear"
    ),
}


def c_parameters(op: torch._ops.OpOverload) -> str:
    """Return the parameters of the C function that computes an operator in exported packages, with its results."""
    return ", ".join(f"{kind} {name}" for name, kind in _c_parameters(op).items())


def c_function(device: str, op: torch._ops.OpOverload) -> str:
    """Return the declaration of the C function that computes an operator in exported packages."""
    return f"AOTITorchError aoti_torch_{device}_{op._opname}({c_parameters(op)})"


def header() -> str:
    """Return the C++ header of all signatures. operators.h includes it."""
    lines = ["// Written by int8compile/ops/signatures.py when the kernels are compiled.", "#pragma once"]
    for device, packaged in PACKAGED.items():
        registered = REGISTERED if device == "cpu" else ()
        declared = dict.fromkeys(_cpp_function(op) for op in (*registered, *packaged))
        lines += [f"namespace int8compile::{device} {{", *(f"{each};" for each in declared), "}"]
        lines.append(f"#define INT8COMPILE_{device.upper()}_FUNCTIONS(FUNCTION) \\")
        for op in packaged:
            names = ", ".join(_c_parameters(op))
            lines.append(f"  FUNCTION({op._opname}, {_compute(op)}, ({c_parameters(op)}), ({names})) \\")
        lines.append("")
    registrations = (f"OPERATOR({op._opname}, {_compute(op)})" for op in REGISTERED)
    return "\n".join([*lines, f"#define INT8COMPILE_CPU_OPERATORS(OPERATOR) {' '.join(registrations)}", ""])


def _c_parameters(op: torch._ops.OpOverload) -> dict[str, str]:
    """Return the C types of an operator's arguments and results, by their names."""
    results = op._schema.returns
    names = [each.name or f"y{i if len(results) > 1 else ''}" for i, each in enumerate(results)]
    arguments = {each.name: _TYPES[str(each.real_type)][0] for each in op._schema.arguments}
    return arguments | dict.fromkeys(names, "AtenTensorHandle*")


def _cpp_function(op: torch._ops.OpOverload) -> str:
    count = len(op._schema.returns)
    result = "Tensor" if count == 1 else f"std::tuple<{', '.join(['Tensor'] * count)}>"
    arguments = (f"{_TYPES[str(each.real_type)][1]} {each.name}" for each in op._schema.arguments)
    return f"{result} {_compute(op)}({', '.join(arguments)})"


def _compute(op: torch._ops.OpOverload) -> str:
    """Return the name of the C++ function, which is the same for an operator with and without gradients."""
    return op._opname.removesuffix("_no_grad")
