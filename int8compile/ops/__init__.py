"""The operators: the schema, fake, reference and autograd of each. Read `reference.py` first: it is the definition."""

from int8compile.ops.declaration import SUPPORTED_DTYPES
from int8compile.ops.linears import (
    batched_linear,
    column_linear,
    grouped_linear,
    linear,
    linear_no_grad,
    module_weight,
    pack_weight,
    packed_batched_linear,
    packed_linear,
    packed_linear_no_grad,
    packed_linear_pair_no_grad,
    packed_linear_triple_no_grad,
    packed_weight_only_linear,
    packed_weight_only_linear_no_grad,
    quantize_weight,
    weight_only_linear,
    weight_only_linear_no_grad,
)
from int8compile.ops.packing import packed_shape, unpack_weight
from int8compile.ops.quantized import norm_quantize_rows, quantize_rows, quantized_linear
from int8compile.ops.reference import (
    MAX_K,
    QMAX,
    dequantize_weight,
    input_scales,
    rotation_of,
    rotation_size,
)
from int8compile.ops.signatures import c_parameters

__all__ = [
    "MAX_K",
    "QMAX",
    "SUPPORTED_DTYPES",
    "batched_linear",
    "c_parameters",
    "column_linear",
    "dequantize_weight",
    "grouped_linear",
    "input_scales",
    "linear",
    "linear_no_grad",
    "module_weight",
    "norm_quantize_rows",
    "pack_weight",
    "packed_batched_linear",
    "packed_linear",
    "packed_linear_no_grad",
    "packed_linear_pair_no_grad",
    "packed_linear_triple_no_grad",
    "packed_shape",
    "packed_weight_only_linear",
    "packed_weight_only_linear_no_grad",
    "quantize_rows",
    "quantize_weight",
    "quantized_linear",
    "rotation_of",
    "rotation_size",
    "unpack_weight",
    "weight_only_linear",
    "weight_only_linear_no_grad",
]
