"""Open calls that hide linears, so that the other passes see them.

Dynamo keeps `F.multi_head_attention_forward` (all of `nn.MultiheadAttention`) as one call, and in inference
`nn.TransformerEncoderLayer` is one operator. Both are traced into ATen operators, which replace them. torch.export puts
code under autocast or another grad mode into a graph of its own. That graph replaces its call, between two nodes that
switch the mode, as Dynamo writes it.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from int8compile.passes.regions import Region
from int8compile.passes.static import attribute, meta_tensor

log = logging.getLogger(__name__)


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """Compute `torch._transformer_encoder_layer_fwd` of a dense `src` [B, L, E]."""
    keep = None
    if mask is not None:
        # Type 0 masks positions, [L, L]; 1 masks padding, [B, L]; 2 both, [B, heads, L, L]. True, or -inf, is masked.
        keep = (mask[:, None, None] if mask_type == 1 else mask) == 0

    def attention(x: Tensor) -> Tensor:
        parts = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, heads, embed_dim // heads))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=keep)
        return F.linear(mixed.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attention(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attention(src))
    return norm_2(x + feed_forward(x))


# Each composite call, and the function that is traced for it.
COMPOSITES: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: F.multi_head_attention_forward,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
}


def open_composites(module: GraphModule) -> None:
    """Replace each composite call of a Dynamo graph by the operators it is made of."""
    for target in COMPOSITES:
        for node in module.graph.find_nodes(op="call_function", target=target):
            _open(module, node)


def _open(module: GraphModule, node: Node) -> None:
    # Each distinct node becomes one input: the composite tests whether query, key and value are the same tensor.
    inputs = list(dict.fromkeys(node.all_input_nodes))
    values = [meta_tensor(arg) for arg in inputs]
    if any(value is None or value.is_nested for value in values):
        return

    def call(*tensors: Any) -> Any:
        given = dict(zip(inputs, tensors, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        return COMPOSITES[node.target](*args, **kwargs)

    try:
        # In the mode of the inputs, so that tensors which the composite creates (a row of zeros) are fake too.
        with next((value.fake_mode for value in values if isinstance(value, FakeTensor)), contextlib.nullcontext()):
            traced = make_fx(call, pre_dispatch=True)(*values)
    except Exception as error:
        # The composite is left unopened, and the report lists its linears as out of reach.
        log.warning("%s cannot be opened: %s: %s", node.target.__name__, type(error).__name__, error)  # type: ignore[union-attr]
        return
    if any(traced.graph.find_nodes(op="get_attr")):
        return
    own = traced.graph.find_nodes(op="placeholder")
    replaced: dict[Node, Any] = dict(zip(own, inputs, strict=True))
    with module.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op not in ("placeholder", "output"):
                copied = module.graph.node_copy(inner, lambda arg: replaced[arg])
                copied.meta = {
                    "example_value": inner.meta.get("val"),
                    **{key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta},
                }
                replaced[inner] = copied
    (results,) = traced.graph.output_node().args
    if isinstance(results, Node):
        node.replace_all_uses_with(replaced[results])
    for user in list(node.users):
        # Attention returns (output, attention weights): its users are getitems.
        result = cast(tuple[Node | None, ...], results)[cast(int, user.args[1])]
        if result is not None:
            user.replace_all_uses_with(replaced[result])
            module.graph.erase_node(user)
    if not node.users:
        module.graph.erase_node(node)


def open_regions(module: GraphModule) -> None:
    """Put the operators of autocast and grad mode regions into the graph of an exported module."""
    region = Region()
    node = next(iter(module.graph.nodes))
    while node.op != "output":
        following = node.next
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            # The region may contain further regions.
            following = _open_region(module, node, region.grad_mode) or following
        region.pass_by(node)
        node = following


def _open_region(module: GraphModule, call: Node, grad_mode: bool) -> Node | None:
    """Replace a region by its operators; return the first of them, None where the call is no region."""
    position = _REGIONS.get(call.target.__name__)  # type: ignore[union-attr]
    if position is None or call.kwargs or any(user.target is not operator.getitem for user in call.users):
        return None
    settings, body, inputs = call.args[:position], call.args[position], call.args[position + 1 :]
    assert isinstance(body, Node)
    nested = attribute(module, body)
    (results,) = nested.graph.output_node().args
    replaced: dict[Node, Any] = dict(zip(nested.graph.find_nodes(op="placeholder"), inputs, strict=True))
    autocast = call.target.__name__ == "wrap_with_autocast"  # type: ignore[union-attr]
    switch: Any = torch.amp.autocast_mode._enter_autocast if autocast else torch._C._set_grad_enabled
    graph = module.graph
    with graph.inserting_before(call):
        first = graph.call_function(switch, settings)
        for inner in nested.graph.nodes:
            if inner.op not in ("placeholder", "output"):
                copied = replaced[inner] = graph.node_copy(inner, lambda arg: replaced[arg])
                if inner.op == "get_attr":
                    copied.target = f"{body.target}.{inner.target}"
        if autocast:
            graph.call_function(torch.amp.autocast_mode._exit_autocast, (first,))
        else:
            graph.call_function(switch, (grad_mode,))
    for user in list(call.users):
        user.replace_all_uses_with(replaced[results[cast(int, user.args[1])]])
        graph.erase_node(user)
    graph.erase_node(call)
    if not body.users:
        graph.erase_node(body)
    return first


# The operators of regions, with the position of the region's graph among their arguments. The settings precede it.
_REGIONS = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}
