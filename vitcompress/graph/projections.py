"""Query, key and value as columns of the projections that they come from."""

from dataclasses import dataclass

import torch
from torch import fx

from vitcompress.graph import ops
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import info, node_argument
from vitcompress.graph.moves import moves_behind, positions_of, sent_through
from vitcompress.graph.ops import is_op
from vitcompress.graph.patterns import Attention

__all__ = ["NotProjectedError", "Operand", "ProjectedOperands", "projected_operands"]


class NotProjectedError(Exception):
    """Why the operands of an attention core are no columns of projections."""


@dataclass(frozen=True)
class Operand:
    """A query, key or value as columns of a projection.

    Attributes:
        node: The operand as the attention core reads it, by heads.
        base: The projection's result, ``[B, N, K]``, or ``[N, B, K]`` if ``tokens_first``.
        start: First of its columns.
        width: How many: heads times head dimension.
        tokens_first: Which axis comes first.
    """

    node: fx.Node
    base: fx.Node
    start: int
    width: int
    tokens_first: bool


@dataclass(frozen=True)
class ProjectedOperands:
    """The operands of an attention core, quantizers looked through.

    Attributes:
        query: ``[B, H, N, D]``.
        key: ``[B, H, D, M]``.
        value: ``[B, H, M, E]``.
        heads: ``H``.
        tokens: ``N``.
        factor: What the query is multiplied with behind its projection.
    """

    query: Operand
    key: Operand
    value: Operand
    heads: int
    tokens: int
    factor: float


def projected_operands(core: Attention) -> ProjectedOperands:
    """Return where query, key and value of a core lie in projections of tokens.

    Raises:
        NotProjectedError: They are something else.
        UnknownMoveError: What lies between depends on something else than extents.
    """
    if core.scores is None:
        raise NotProjectedError("it has no scores")
    edges = ((core.scores, 0), (core.scores, 1), (core.output, 1 - core.probs_index))
    nodes = [node_argument(node, index) for node, index in edges]
    query, key, value = (node_argument(n, 0) if is_quantizer(n) else n for n in nodes)
    shapes = [info(node).shape for node in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes):
        raise NotProjectedError("its operands have other than four axes")
    extents = (*shapes[0][1:], shapes[1][3], shapes[2][3])
    whole = [extent for extent in extents if isinstance(extent, int)]
    if len(whole) < len(extents):
        raise NotProjectedError("an extent depends on the batch")
    heads, tokens, dim, keys, value_dim = whole
    factor, query = _unscaled(query)
    return ProjectedOperands(
        query=_operand(query, heads, tokens, dim, transposed=False),
        key=_operand(key, heads, keys, dim, transposed=True),
        value=_operand(value, heads, keys, value_dim, transposed=False),
        heads=heads,
        tokens=tokens,
        factor=factor,
    )


def _unscaled(query: fx.Node) -> tuple[float, fx.Node]:
    """Return a number that the query was multiplied with, and what was multiplied."""
    if is_op(query, ops.MUL) and isinstance(query.args[1], (int, float)):
        return float(query.args[1]), node_argument(query, 0)
    return 1.0, query


def _operand(
    value: fx.Node, heads: int, tokens: int, dim: int, *, transposed: bool
) -> Operand:
    """Return where ``[B, H, N, D]`` (key: ``[B, H, D, N]``) lies in a projection."""
    chain = moves_behind(value)
    base = node_argument(chain[0], 0) if chain else value
    if len(info(base).shape) != 3:
        raise NotProjectedError(f"{base.name} is no projection of tokens")
    positions = positions_of(base)
    found = sent_through(chain, base, positions)
    start = int(found.flatten()[0])
    for tokens_first in (False, True):
        rows = positions.transpose(0, 1) if tokens_first else positions
        columns = rows[..., start : start + heads * dim]
        if columns.shape[1:] != (tokens, heads * dim):
            continue
        expected = columns.reshape(*columns.shape[:2], heads, dim).transpose(1, 2)
        if torch.equal(found, expected.transpose(2, 3) if transposed else expected):
            return Operand(value, base, start, heads * dim, tokens_first)
    raise NotProjectedError(f"{value.name} is arranged in another way")
