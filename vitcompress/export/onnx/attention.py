"""Attention whose internals carry no quantizers, as one fused operator.

A runtime's fused attention takes query, key and value as ``[B, N, H D]``, the layout in which
the projections leave them. What a model does in between (reshape, permute, unbind, transpose)
is spelled in many ways, so it is not matched: positions are sent through it, and compared with
the arrangement that fused attention applies itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.edit import constant_node, is_quantizer
from vitcompress.graph.metadata import info, int_argument, module_path
from vitcompress.graph.moves import PROBE, UnknownMoveError, positions_of, sent_through
from vitcompress.graph.ops import is_op
from vitcompress.graph.patterns import Attention, attentions
from vitcompress.graph.projections import NotProjectedError, Operand, projected_operands

__all__ = ["FusedAttention", "fusable_attentions", "place_attention"]

#: Magnitude at which scores are tried as well: bounds on them show only there.
LARGE_SCORES = 1e6


@dataclass(frozen=True)
class FusedAttention:
    """One attention core that a fused operator can compute.

    Attributes:
        query: Where it comes from; key and value alike.
        key: See ``query``.
        value: See ``query``.
        heads: Number of heads.
        tokens: Rows of the query.
        scale: Factor of the scores.
        bias: What is added to the scores, ``[W, H, N, M]``, or nothing. Windows repeat: the
            first axis of query, key and value holds ``W`` windows of each image.
        result: Node whose value, ``[B, N, H E]``, the operator yields.
        by_heads: Whether that node is the core's own, ``[B, H, N, E]``: no node behind it
            holds the result as the operator yields it.
    """

    query: Operand
    key: Operand
    value: Operand
    heads: int
    tokens: int
    scale: float
    bias: Tensor | None
    result: fx.Node
    by_heads: bool


class _NotFusableError(Exception):
    """Why an attention core stays as it is."""


def fusable_attentions(
    captured: CapturedGraph,
) -> tuple[list[FusedAttention], dict[str, str]]:
    """Return the cores that can be fused, and of the others module path to reason."""
    found, reasons = [], {}
    for core in attentions(captured):
        try:
            found.append(_fusable(captured, core))
        except (_NotFusableError, NotProjectedError, UnknownMoveError) as reason:
            reasons[f"{module_path(core.softmax).path}:{core.softmax.name}"] = str(reason)
    return found, reasons


def place_attention(captured: CapturedGraph, fused: FusedAttention, target: str) -> None:
    """Put a call of the module ``target`` in the place of a core; the caller recompiles.

    The module takes query, key and value, ``[B, N, H D]``, and the bias if there is one. Where
    windows have biases of their own, they count as heads: ``[B, W H, N, D]``.
    """
    graph, before = captured.graph, fused.result
    arguments = [_columns(graph, before, o) for o in (fused.query, fused.key, fused.value)]
    windows = 1 if fused.bias is None else len(fused.bias)
    if windows > 1:
        arguments = [
            _by_heads(graph, before, value, operand, fused.heads, windows)
            for value, operand in zip(
                arguments, (fused.query, fused.key, fused.value), strict=True
            )
        ]
    if fused.bias is not None:
        arguments.append(_bias_node(captured, before, fused.bias))
    with graph.inserting_before(before):
        node = graph.call_module(target, tuple(arguments))
        value = node
        if windows > 1:
            width = fused.value.width // fused.heads
            value = graph.call_function(
                ops.reshape, (value, [-1, fused.heads, fused.tokens, width])
            )
            if not fused.by_heads:
                value = graph.call_function(ops.permute, (value, [0, 2, 1, 3]))
                value = graph.call_function(
                    ops.reshape, (value, [-1, fused.tokens, fused.value.width])
                )
        elif fused.by_heads:
            shape = [-1, fused.tokens, fused.heads, info(fused.result).shape[3]]
            value = graph.call_function(ops.reshape, (node, shape))
            value = graph.call_function(ops.permute, (value, [0, 2, 1, 3]))
    node.meta = {"module": module_path(before)}
    value.meta = dict(before.meta)
    before.replace_all_uses_with(value, delete_user_cb=lambda user: user is not value)


def _by_heads(
    graph: fx.Graph,
    before: fx.Node,
    value: fx.Node,
    operand: Operand,
    heads: int,
    windows: int,
) -> fx.Node:
    """Return ``[B, W H, N, D]`` of ``[B W, N, H D]``."""
    tokens, width = info(operand.base).shape[int(not operand.tokens_first)], operand.width
    with graph.inserting_before(before):
        parted = graph.call_function(ops.reshape, (value, [-1, tokens, heads, width // heads]))
        moved = graph.call_function(ops.permute, (parted, [0, 2, 1, 3]))
        extents = [-1, windows * heads, tokens, width // heads]
        return graph.call_function(ops.reshape, (moved, extents))


def _bias_node(captured: CapturedGraph, before: fx.Node, bias: Tensor) -> fx.Node:
    """Return a bias ``[1, W H, N, M]``; stored by heads and by windows where it is a sum."""
    windows, heads, *extents = bias.shape
    if windows == 1:
        return constant_node(captured, before, "attention_bias", bias)
    of_windows = bias[:, :1]
    of_heads = bias[:1] - bias[:1, :1]
    if not torch.allclose(of_windows + of_heads, bias, rtol=0, atol=1e-5):
        whole = bias.reshape(1, windows * heads, *extents)
        return constant_node(captured, before, "attention_bias", whole)
    parts = [
        constant_node(captured, before, f"attention_bias_of_{name}", value)
        for name, value in (("windows", of_windows), ("heads", of_heads))
    ]
    with captured.graph.inserting_before(before):
        total = captured.graph.call_function(ops.add, tuple(parts))
        shape = [1, windows * heads, *extents]
        return captured.graph.call_function(ops.reshape, (total, shape))


def _columns(graph: fx.Graph, before: fx.Node, operand: Operand) -> fx.Node:
    value, end = operand.base, operand.start + operand.width
    with graph.inserting_before(before):
        if operand.width != info(operand.base).shape[-1]:
            value = graph.call_function(ops.slice_, (value, 2, operand.start, end))
        if operand.tokens_first:
            value = graph.call_function(ops.permute, (value, [1, 0, 2]))
    return value


# What can be fused


def _fusable(captured: CapturedGraph, core: Attention) -> FusedAttention:
    if core.scores is None or core.score_mixers or core.probs_mixers or core.probs_index:
        raise _NotFusableError("it is no softmax of scores times values")
    operands = (*core.scores.args[:2], *core.output.args[:2])
    if any(is_quantizer(node) for node in operands):
        raise _NotFusableError("its operands are quantized")
    if core.output.args[0] is not core.softmax:
        raise _NotFusableError("its probabilities are changed before they are used")
    if int_argument(core.softmax, 1) not in (-1, 3):
        raise _NotFusableError("its softmax is over another axis")
    projected = projected_operands(core)
    scale, bias = _score_path(captured, core)
    result = _result(core.output)
    return FusedAttention(
        query=projected.query,
        key=projected.key,
        value=projected.value,
        heads=projected.heads,
        tokens=projected.tokens,
        scale=scale * projected.factor,
        bias=bias,
        result=result,
        by_heads=result is core.output,
    )


def _score_path(captured: CapturedGraph, core: Attention) -> tuple[float, Tensor | None]:
    """Return the factor and the bias ``[W, H, N, M]`` between the scores and the softmax.

    Found by sending scores along the path, whatever it is spelled like: where it multiplies by
    a number and adds stored tensors, it does so for these scores and for any.
    """
    assert core.scores is not None
    path: list[fx.Node] = []
    node = core.scores
    while node is not core.softmax:
        if len(node.users) != 1:
            raise _NotFusableError("its scores have another reader")
        node = next(iter(node.users))
        if node is not core.softmax and not is_op(node, ops.SCORE_PATH):
            raise _NotFusableError(f"its scores pass through {node.name}")
        path.append(node)
    path.pop()
    shape = positions_of(core.scores).shape
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(shape, generator=generator)
    trials = (small, LARGE_SCORES * small)
    none, one, *found = (
        sent_through(path, core.scores, scores, captured.parameter)
        for scores in (torch.zeros(shape), torch.ones(shape), *trials)
    )
    if none.shape != shape:
        raise _NotFusableError("its scores are arranged in another way")
    scale = float((one - none).flatten()[0])
    for scores, result in zip(trials, found, strict=True):
        if not torch.allclose(result, scores * scale + none, rtol=1e-4, atol=1e-4):
            raise _NotFusableError("its scores are changed by more than a factor and a bias")
    images = none.reshape(PROBE, -1, *shape[1:])
    if not torch.equal(images[0], images[1]):
        raise _NotFusableError("its bias differs between images")
    bias = images[0]
    if torch.equal(bias, bias[:1].expand_as(bias)):
        bias = bias[:1]
    return scale, bias.clone() if bool(bias.any()) else None


def _result(output: fx.Node) -> fx.Node:
    """Return the node that holds a core's result as ``[B, N, H E]``, or the core's own."""
    positions = positions_of(output)
    expected = positions.transpose(1, 2).flatten(2)
    chain: list[fx.Node] = []
    node = output
    while len(node.users) == 1:
        node = next(iter(node.users))
        if not is_op(node, ops.REARRANGE) or is_op(node, ops.UNBIND):
            break
        chain.append(node)
        found = sent_through(chain, output, positions)
        if found.shape == expected.shape and torch.equal(found, expected):
            return node
    return output
