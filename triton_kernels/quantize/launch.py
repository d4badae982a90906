"""Calls of the kernels that quantize activations."""

from __future__ import annotations

import ctypes
import struct

import torch
import triton
from torch import Tensor

from int8compile.ops.digits import Activations, lists_of
from int8compile.triton_kernels.launch import Launch, Programs
from int8compile.triton_kernels.policy import Policy
from int8compile.triton_kernels.quantize.kernel import gather_digits, list_columns, quantize_rows

# Columns of a row that are looked at together, in registers.
MAX_BK = 16384
FLOAT32_MAX = torch.finfo(torch.float32).max


def launches(x: Tensor, into: Activations, policy: Policy) -> list[Launch]:
    """The kernels that quantize x, in order.

    Shapes:
        x: [M, K], its rows contiguous.
    """
    k = x.shape[1]
    if not (policy.lists and policy.split):
        return [_quantize_rows(x, into, policy, into.info)]
    # Marks of columns, which only these kernels see.
    lists = 1 if policy.by_column else lists_of(x.shape[0])
    flags = torch.zeros(lists, -(-k // 32), dtype=torch.int32, device=x.device)
    return [
        _quantize_rows(x, into, policy, flags),
        _list_columns(x, into, policy, flags),
        _gather_digits(x, into, policy),
    ]


def _quantize_rows(x: Tensor, into: Activations, policy: Policy, flags: Tensor) -> Launch:
    m, k = x.shape
    bk = min(max(triton.next_power_of_2(k), 32), MAX_BK)
    square = policy.threshold * policy.threshold
    low, high = limits(k, square)
    return Launch(
        quantize_rows,
        m,
        (Programs(rows=1),),
        {
            "x_ptr": x,
            "planes_ptr": into.planes,
            "info_ptr": into.info,
            "flags_ptr": flags,
            "stride_m": x.stride(0),
            "M": m,
            "K": k,
            "square_of_threshold": struct.unpack("<q", struct.pack("<d", square))[0],
            "low": low,
            "high": high,
            "threshold": ctypes.c_float(policy.threshold).value,  # Inf where float32 cannot hold it
        },
        {
            "SPLIT": policy.split,
            "BY_COLUMN": policy.by_column,
            "LISTS": policy.lists and policy.split,
            "LIST_ROWS": policy.list_rows,
            "DIGITS": policy.digits,
            "CHUNKS": -(-k // bk),
            "BK": bk,
        },
        num_warps=min(max(bk // 1024, 1), 16),
    )


def limits(k: int, square: float) -> tuple[float, float]:
    """Bounds of the float32 decision: which squares, relative to the row's sum, certainly are outliers'.

    A sum of K float32 products, in any order and with any contraction, is off by less than a factor of 1 +- (K + 1) u,
    u = 2**-24, and so is each square by 1 +- 2 u; twice that covers the comparison itself. The definition rounds
    squares to 2**-35, below 2**-33 of the sum, which holds at least 1/4.
    """
    error = (k + 16) * 2.0**-23
    low, high = square * (1 - error) / k - 2.0**-32, square * (1 + error) / k + 2.0**-32
    return min(max(low, 0.0), FLOAT32_MAX), min(high, FLOAT32_MAX)


def _list_columns(x: Tensor, into: Activations, policy: Policy, flags: Tensor) -> Launch:
    m, k = x.shape
    words = -(-k // 32)
    together = min(triton.next_power_of_2(words), 128)
    return Launch(
        list_columns,
        m,
        (Programs(rows=policy.list_rows),),
        {"flags_ptr": flags, "info_ptr": into.info, "M": m, "K": k},
        {"WORDS": together},
        num_warps=min(max(together // 16, 1), 8),
    )


def _gather_digits(x: Tensor, into: Activations, policy: Policy) -> Launch:
    m, k = x.shape
    bm = 16
    return Launch(
        gather_digits,
        m,
        (Programs(rows=bm),),
        {
            "x_ptr": x,
            "planes_ptr": into.planes,
            "info_ptr": into.info,
            "stride_m": x.stride(0),
            "M": m,
            "K": k,
        },
        {
            "BY_COLUMN": policy.by_column,
            "LIST_ROWS": policy.list_rows,
            "DIGITS": policy.digits,
            "BM": bm,
            "BF": 64,
        },
    )
