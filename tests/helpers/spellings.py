"""Every spelling of a matmul with a static weight, and every reason to leave one in float."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from int8compile import SkipReason
from int8compile.passes.binding import WeightSlot
from int8compile.weights import STORE, quantize_checked


class Weights(nn.Module):
    """Parameters in the layouts that the spellings need; `call` uses them."""

    def __init__(self, call: Callable[[Weights, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.nk = nn.Parameter(torch.randn(48, 32))
        self.kn = nn.Parameter(torch.randn(32, 48))
        self.bias = nn.Parameter(torch.randn(48))
        self.experts = nn.Parameter(torch.randn(2, 32, 48))
        self.expert_bias = nn.Parameter(torch.randn(2, 1, 48))
        self.heads = nn.Parameter(torch.randn(32, 3, 16))
        self.channels = nn.Parameter(torch.randn(48, 5, 1, 1))
        self.qkv = nn.Parameter(torch.randn(96, 32))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


# (name, kind in the report, call). x is [2, 5, 32].
SPELLINGS: list[tuple[str, str, Callable[[Weights, Tensor], Tensor]]] = [
    ("F.linear", "linear", lambda m, x: F.linear(x, m.nk)),
    ("F.linear with bias", "linear", lambda m, x: F.linear(x, m.nk, m.bias)),
    ("F.linear of a 1-D input", "linear", lambda m, x: F.linear(x[0, 0], m.nk, m.bias)),
    ("F.linear of a slice of a weight", "linear", lambda m, x: F.linear(x, m.qkv[32:80], m.bias)),
    ("F.linear of a chunk of a weight", "linear", lambda m, x: F.linear(x, m.qkv.chunk(3)[1])),
    ("F.linear of a cast weight", "linear", lambda m, x: F.linear(x.bfloat16(), m.nk.to(torch.bfloat16)).float()),
    ("addmm", "addmm", lambda m, x: torch.addmm(m.bias, x[0], m.kn)),
    ("addmm with beta and alpha", "addmm", lambda m, x: torch.addmm(m.bias, x[0], m.kn, beta=0.5, alpha=2.0)),
    ("addmm with beta 0", "addmm", lambda m, x: torch.addmm(m.bias, x[0], m.kn, beta=0)),
    ("addmm of a matrix", "addmm", lambda m, x: torch.addmm(x[0, :, :1], x[0], m.kn)),
    ("Tensor.addmm", "addmm", lambda m, x: m.bias.addmm(x[0], m.kn)),
    ("addmm with the weight first", "addmm", lambda m, x: torch.addmm(x[0, :, 0], m.nk, x[0].t())),
    ("addmv", "addmv", lambda m, x: torch.addmv(m.bias, m.nk, x[0, 0])),
    ("mm", "mm", lambda m, x: torch.mm(x[0], m.kn)),
    ("mm by keyword", "mm", lambda m, x: torch.mm(input=x[0], mat2=m.kn)),
    ("Tensor.mm", "mm", lambda m, x: x[0].mm(m.kn)),
    ("mv", "mv", lambda m, x: m.nk.mv(x[0, 0])),
    ("inner", "inner", lambda m, x: torch.inner(x, m.nk)),
    ("matmul", "matmul", lambda m, x: torch.matmul(x, m.kn)),
    ("matmul of t()", "matmul", lambda m, x: torch.matmul(x, m.nk.t())),
    ("matmul of a 1-D input", "matmul", lambda m, x: torch.matmul(x[0, 0], m.kn)),
    ("linalg.matmul", "matmul", lambda m, x: torch.linalg.matmul(x, m.kn)),
    ("@", "matmul", lambda m, x: x @ m.kn),
    ("@ of .T", "matmul", lambda m, x: x @ m.nk.T),
    ("@ of .mT", "matmul", lambda m, x: x @ m.nk.mT),
    ("@ of transpose", "matmul", lambda m, x: x @ m.nk.transpose(0, 1).contiguous()),
    ("imatmul", "matmul", lambda m, x: operator.imatmul(x, m.kn)),
    ("@ with the weight first", "matmul", lambda m, x: m.nk @ x.mT),
    ("Tensor.matmul", "matmul", lambda m, x: x.matmul(m.kn)),
    ("bmm over experts", "bmm", lambda m, x: torch.bmm(x, m.experts)),
    ("Tensor.bmm", "bmm", lambda m, x: x.bmm(m.experts)),
    ("matmul over experts", "matmul", lambda m, x: x @ m.experts),
    ("matmul over experts, 4-D", "matmul", lambda m, x: x.expand(3, 2, 5, 32) @ m.experts),
    ("baddbmm", "baddbmm", lambda m, x: torch.baddbmm(m.expert_bias, x, m.experts)),
    ("baddbmm of a full addend", "baddbmm", lambda m, x: torch.baddbmm(x[:, :, :1], x, m.experts, beta=2, alpha=0.5)),
    ("einsum", "einsum", lambda m, x: torch.einsum("bsk,kn->bsn", x, m.kn)),
    ("einsum, implicit result", "einsum", lambda m, x: torch.einsum("abk,kn", x, m.kn)),
    ("einsum with an ellipsis", "einsum", lambda m, x: torch.einsum("...k,nk->...n", x, m.nk)),
    ("einsum with a permuted result", "einsum", lambda m, x: torch.einsum("bsk,nk->nbs", x, m.nk)),
    ("einsum into heads", "einsum", lambda m, x: torch.einsum("bsk,khd->bhsd", x, m.heads)),
    ("einsum out of heads", "einsum", lambda m, x: torch.einsum("bhd,khd->bk", x[:, :3, :16], m.heads)),
    ("einsum over experts", "einsum", lambda m, x: torch.einsum("esk,ekn->sen", x, m.experts)),
    ("einsum over experts, one row", "einsum", lambda m, x: torch.einsum("ek,ekn->en", x[:, 0], m.experts)),
    ("einsum over experts, more rows", "einsum", lambda m, x: torch.einsum("esjk,ekn->jesn", x[:, :, None], m.experts)),
    ("einsum with the weight first", "einsum", lambda m, x: torch.einsum("nk,bsk->bsn", m.nk, x)),
    ("tensordot", "tensordot", lambda m, x: torch.tensordot(x, m.kn, 1)),
    ("tensordot with axes", "tensordot", lambda m, x: torch.tensordot(x, m.nk, ([2], [1]))),
    ("1x1 conv2d", "convolution", lambda m, x: F.conv2d(x.unflatten(2, (4, 8)), m.channels, m.bias)),
    ("1x1 conv2d with stride", "convolution", lambda m, x: F.conv2d(x.unflatten(2, (4, 8)), m.channels, stride=(2, 3))),
    ("1x1 conv2d, unbatched", "convolution", lambda m, x: F.conv2d(x[0].unflatten(1, (4, 8)), m.channels, m.bias)),
    ("1x1 conv1d", "convolution", lambda m, x: F.conv1d(x, m.channels.squeeze(3), m.bias, padding="same")),
    ("1x1 conv3d", "convolution", lambda m, x: F.conv3d(x.reshape(2, 5, 4, 4, 2), m.channels[..., None], m.bias)),
]


def quantized(slot: WeightSlot, given: Mapping[Node, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the weight in a slot that holds one weight, given the parameters by node."""
    (member,) = slot.members
    d, group = None, slot.group
    if group is not None:
        members, among = ([(given[each.source], each.view) for each in part] for part in (group.members, group.among))
        d = STORE.share(members, among, each=group.each)
    return *quantize_checked(given[member.source], member.view, member.path, d), d


REASONS: list[tuple[SkipReason, Callable[[Weights, Tensor], Tensor], dict]] = [
    (SkipReason.NAME, lambda m, x: F.linear(x, m.nk), {"skip_modules": ["n?"]}),
    (SkipReason.NOT_STATIC, lambda m, x: F.linear(x, x[0]), {}),
    (SkipReason.NOT_STATIC, lambda m, x: x @ m.experts[(x[:, 0, 0] > 0).long()], {}),
    (SkipReason.COMPUTED, lambda m, x: F.linear(x, m.nk * 2), {}),
    (SkipReason.COMPUTED, lambda m, x: x @ (m.kn + 1), {}),
    (SkipReason.SMALL, lambda m, x: F.linear(x, m.nk), {"min_features": 33}),
    (SkipReason.SMALL, lambda m, x: F.linear(x, m.nk[:3]), {}),
    (SkipReason.DTYPE, lambda m, x: F.linear(x.double(), m.nk.double()), {}),
    (SkipReason.FORM, lambda m, x: F.conv2d(x.unflatten(2, (4, 8)), m.channels, padding=1), {}),
    (SkipReason.FORM, lambda m, x: F.conv2d(x.repeat(1, 48, 1)[..., None], m.channels, groups=48), {}),
    (SkipReason.FORM, lambda m, x: torch.einsum("bsk,bkn->n", x, m.experts), {}),
    (SkipReason.FORM, lambda m, x: x[:1] @ m.experts, {}),
    (SkipReason.FORM, lambda m, x: F.bilinear(x, x, m.experts[:, :, :32]), {}),
    (SkipReason.FORM, lambda m, x: torch.addbmm(m.bias, x, m.experts), {}),
    (SkipReason.FORM, lambda m, x: m.bias.addbmm(x, m.experts), {}),
    (SkipReason.FORM, lambda m, x: torch.ops.aten.addbmm(m.bias, x, m.experts), {}),
    (SkipReason.FORM, lambda m, x: x.new_zeros(5, 48).addbmm_(x, m.experts), {}),
    (SkipReason.FORM, lambda m, x: x.new_zeros(5, 48).addmm_(x[0], m.kn), {}),
    (SkipReason.FORM, lambda m, x: x.new_zeros(48).addmv_(m.nk, x[0, 0]), {}),
    (SkipReason.FORM, lambda m, x: torch.addmv_(x.new_zeros(48), m.nk, x[0, 0]), {}),
    (SkipReason.FORM, lambda m, x: x.new_zeros(2, 5, 48).baddbmm_(x, m.experts), {}),
    (SkipReason.FORM, lambda m, x: torch.mm(x[0], m.kn, out=x.new_zeros(5, 48)), {}),
    (SkipReason.CHANGED, lambda m, x: F.linear(x, m.nk.mul_(2)), {}),
    (SkipReason.CHANGED, lambda m, x: (m.nk.add_(1), F.linear(x, m.nk))[1], {}),
]
