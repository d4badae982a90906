"""The operators: schema, fake, reference and autograd of each. Read `reference.py` first: it is the definition."""

from int8compile.ops.linear import OUTLIER_POLICIES, SUPPORTED_DTYPES, batched_linear, linear
from int8compile.ops.reference import MAX_K, dequantize_weight, quantize_weight

__all__ = [
    "MAX_K",
    "OUTLIER_POLICIES",
    "SUPPORTED_DTYPES",
    "batched_linear",
    "dequantize_weight",
    "linear",
    "quantize_weight",
]
