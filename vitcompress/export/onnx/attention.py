"""Attention whose internals carry no quantizers, as one fused operator.

A runtime's fused attention takes query, key and value as ``[B, N, H D]``, the layout in which
the projections leave them. What a model does in between (reshape, permute, unbind, transpose)
is spelled in many ways, so it is not matched: positions are sent through it, and compared with
the arrangement that fused attention applies itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.edit import constant_node, is_quantizer
from vitcompress.graph.metadata import (
    TensorInfo,
    info,
    int_argument,
    module_path,
    node_argument,
)
from vitcompress.graph.ops import is_op
from vitcompress.graph.patterns import Attention, attentions

__all__ = ["FusedAttention", "fusable_attentions", "place_attention"]

#: Images at which positions are sent through a chain of moves.
_PROBE = 2


@dataclass(frozen=True)
class Operand:
    """A query, key or value as columns of a projection.

    Attributes:
        base: The projection's result, ``[B, N, K]``, or ``[N, B, K]`` if ``tokens_first``.
        start: First of its columns.
        width: How many: heads times head dimension.
        tokens_first: Which axis comes first.
    """

    base: fx.Node
    start: int
    width: int
    tokens_first: bool


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
        bias: Stored tensor that is added to the scores, ``[.., N, M]``.
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
    bias: fx.Node | None
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
        except _NotFusableError as reason:
            reasons[f"{module_path(core.softmax).path}:{core.softmax.name}"] = str(reason)
    return found, reasons


def place_attention(captured: CapturedGraph, fused: FusedAttention, target: str) -> None:
    """Put a call of the module ``target`` in the place of a core; the caller recompiles.

    The module takes query, key and value, ``[B, N, H D]``, and the bias if there is one.
    """
    graph = captured.graph
    operands = (fused.query, fused.key, fused.value)
    arguments = [_columns(graph, fused.result, operand) for operand in operands]
    if fused.bias is not None:
        table = captured.parameter(str(fused.bias.target))
        table = table.reshape(*[1] * (4 - table.dim()), *table.shape)
        arguments.append(constant_node(captured, fused.result, "attention_bias", table))
    with graph.inserting_before(fused.result):
        node = graph.call_module(target, tuple(arguments))
        value = node
        if fused.by_heads:
            shape = [-1, fused.tokens, fused.heads, info(fused.result).shape[3]]
            value = graph.call_function(ops.reshape, (node, shape))
            value = graph.call_function(ops.permute, (value, [0, 2, 1, 3]))
    node.meta = {"module": module_path(fused.result)}
    value.meta = dict(fused.result.meta)
    fused.result.replace_all_uses_with(value, delete_user_cb=lambda user: user is not value)


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
    query, key = (node_argument(core.scores, index) for index in (0, 1))
    value = node_argument(core.output, 1)
    if any(is_quantizer(node) for node in (query, key, value, core.output.args[0])):
        raise _NotFusableError("its operands are quantized")
    if core.output.args[0] is not core.softmax:
        raise _NotFusableError("its probabilities are changed before they are used")
    shapes = [info(node).shape for node in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes):
        raise _NotFusableError("its operands have other than four axes")
    _, heads, tokens, dim = shapes[0]
    keys, value_dim = shapes[1][3], shapes[2][3]
    for extent in (heads, tokens, dim, keys, value_dim):
        if not isinstance(extent, int):
            raise _NotFusableError("an extent depends on the batch")
    if int_argument(core.softmax, 1) not in (-1, 3):
        raise _NotFusableError("its softmax is over another axis")
    assert isinstance(heads, int)
    assert isinstance(tokens, int)
    scale, bias = _score_path(captured, core)
    factor, query = _unscaled(query)
    result = _result(core.output)
    return FusedAttention(
        query=_operand(query, heads, tokens, dim, transposed=False),
        key=_operand(key, heads, keys, dim, transposed=True),
        value=_operand(value, heads, keys, value_dim, transposed=False),
        heads=heads,
        tokens=tokens,
        scale=scale * factor,
        bias=bias,
        result=result,
        by_heads=result is core.output,
    )


def _score_path(captured: CapturedGraph, core: Attention) -> tuple[float, fx.Node | None]:
    """Return the factor and the bias between the scores and the softmax."""
    scale, bias = 1.0, None
    node = core.scores
    assert node is not None
    while node is not core.softmax:
        if len(node.users) != 1:
            raise _NotFusableError("its scores have another reader")
        previous, node = node, next(iter(node.users))
        if node is core.softmax:
            break
        other = node.args[1] if node.args[0] is previous else node.args[0]
        if is_op(node, ops.MUL, ops.DIV) and bias is None and isinstance(other, (int, float)):
            scale = scale * other if is_op(node, ops.MUL) else scale / other
        elif is_op(node, ops.ADD) and bias is None and _is_table(captured, other):
            bias = other
        else:
            raise _NotFusableError(f"its scores pass through {node.name}")
    assert bias is None or isinstance(bias, fx.Node)
    return scale, bias


def _is_table(captured: CapturedGraph, node: Any) -> bool:
    """Return whether a bias is stored and the same for every image and window."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return False
    shape = captured.parameter(str(node.target)).shape
    return 2 <= len(shape) <= 4 and (len(shape) < 4 or shape[0] == 1) and 1 not in shape[-2:]


def _unscaled(query: fx.Node) -> tuple[float, fx.Node]:
    """Return a number that the query was multiplied with, and what was multiplied."""
    if is_op(query, ops.MUL) and isinstance(query.args[1], (int, float)):
        return float(query.args[1]), node_argument(query, 0)
    return 1.0, query


def _operand(
    value: fx.Node, heads: Any, tokens: Any, dim: Any, *, transposed: bool
) -> Operand:
    """Return where ``[B, H, N, D]`` (key: ``[B, H, D, N]``) lies in a projection."""
    chain = _moves_behind(value)
    base = node_argument(chain[0], 0) if chain else value
    shape = _probe_shape(info(base))
    if shape is None or len(shape) != 3:
        raise _NotFusableError(f"{base.name} is no projection of tokens")
    positions = torch.arange(math.prod(shape)).reshape(shape)
    found = _sent_through(chain, base, positions)
    start = int(found.flatten()[0])
    for tokens_first in (False, True):
        rows = positions.transpose(0, 1) if tokens_first else positions
        columns = rows[..., start : start + heads * dim]
        if columns.shape[1:] != (tokens, heads * dim):
            continue
        expected = columns.reshape(*columns.shape[:2], heads, dim).transpose(1, 2)
        if torch.equal(found, expected.transpose(2, 3) if transposed else expected):
            return Operand(base, start, heads * dim, tokens_first)
    raise _NotFusableError(f"{value.name} is arranged in another way")


def _result(output: fx.Node) -> fx.Node:
    """Return the node that holds a core's result as ``[B, N, H E]``, or the core's own."""
    shape = _probe_shape(info(output))
    if shape is None:
        raise _NotFusableError("an extent depends on the batch in another way")
    positions = torch.arange(math.prod(shape)).reshape(shape)
    expected = positions.transpose(1, 2).flatten(2)
    chain: list[fx.Node] = []
    node = output
    while len(node.users) == 1:
        node = next(iter(node.users))
        if not is_op(node, ops.REARRANGE) or is_op(node, ops.UNBIND):
            break
        chain.append(node)
        found = _sent_through(chain, output, positions)
        if found.shape == expected.shape and torch.equal(found, expected):
            return node
    return output


# Positions


def _moves_behind(value: fx.Node) -> list[fx.Node]:
    """Return the operations that only move values, in order, up to ``value``."""
    chain: list[fx.Node] = []
    while is_op(value, ops.REARRANGE):
        chain.append(value)
        value = node_argument(value, 0)
    return chain[::-1]


def _sent_through(chain: Sequence[fx.Node], base: fx.Node, positions: Tensor) -> Tensor:
    """Return what a chain of moves makes of a tensor in the place of ``base``."""
    values: dict[fx.Node, Any] = {base: positions}
    for node in chain:
        arguments, keywords = fx.map_arg(
            (node.args, node.kwargs), lambda n: values[n] if n in values else _extent(n)
        )
        values[node] = node.target(*arguments, **keywords)  # type: ignore[operator]
    found = values[chain[-1]] if chain else positions
    assert isinstance(found, Tensor)
    return found


def _extent(node: fx.Node) -> int:
    """Return the value of a node that computes an extent, at the probing batch."""
    if is_op(node, ops.SYM_SIZE):
        shape = _probe_shape(info(node_argument(node, 0)))
        if shape is not None:
            return shape[int_argument(node, 1)]
    elif node.op == "call_function" and "info" not in node.meta:
        arguments = fx.map_arg(node.args, _extent)
        found: int = node.target(*arguments)  # type: ignore[operator]
        return found
    raise _NotFusableError(f"{node.name} is no extent")


def _probe_shape(entry: TensorInfo) -> tuple[int, ...] | None:
    """Return the extents at the probing batch; ``None`` where one is not a multiple of it."""
    extents = []
    for extent in entry.shape:
        if isinstance(extent, int):
            extents.append(extent)
            continue
        factor, times, symbol = extent.rpartition("*")
        if symbol != "B" or (times and not factor.isdigit()):
            return None
        extents.append(_PROBE * int(factor or 1))
    return tuple(extents)
