"""Chains of operations that only move values: what they do is found by sending positions.

Reshape, permute, unbind, select and their kin are spelled in many ways. A tensor that holds
its own positions, sent through a chain, tells exactly what the chain does, in any spelling.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vitcompress.graph import ops
from vitcompress.graph.captured import CapturedGraph
from vitcompress.graph.metadata import TensorInfo, info, int_argument, node_argument
from vitcompress.graph.ops import is_op

__all__ = [
    "PROBE",
    "UnknownMoveError",
    "moves_behind",
    "positions_of",
    "probe_shape",
    "sent_through",
    "simplify_moves",
]

#: Images at which positions are sent through a chain of moves.
PROBE = 2


class UnknownMoveError(Exception):
    """A chain depends on something else than extents."""


def moves_behind(value: fx.Node) -> list[fx.Node]:
    """Return the operations that only move values, in order, up to ``value``."""
    chain: list[fx.Node] = []
    while _is_move(value):
        chain.append(value)
        value = node_argument(value, 0)
    return chain[::-1]


def positions_of(node: fx.Node) -> Tensor:
    """Return positions in the shape of a node's value, at the probing batch, float64.

    Whole numbers are exact in it, and some moves exist for floats alone.

    Raises:
        UnknownMoveError: An extent depends on the batch in another way than as a multiple.
    """
    shape = probe_shape(info(node))
    if shape is None:
        raise UnknownMoveError("an extent depends on the batch in another way")
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


def sent_through(
    chain: Sequence[fx.Node],
    base: fx.Node,
    positions: Tensor,
    stored: Callable[[str], Tensor] | None = None,
) -> Tensor:
    """Return what a chain of operations makes of a tensor in the place of ``base``.

    Args:
        chain: In order; each reads the one before.
        base: What the first reads.
        positions: Its value.
        stored: Gives tensors by name; without it, a chain that reads one is unknown.

    Raises:
        UnknownMoveError: An argument of the chain depends on images, or on stored tensors
            that are not given.
    """
    values: dict[fx.Node, Any] = {base: positions}

    def value_of(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        if stored is None or not _is_constant(node):
            return _extent(node)
        return stored(str(node.target)) if node.op == "get_attr" else called(node)

    def called(node: fx.Node) -> Any:
        arguments, keywords = fx.map_arg((node.args, node.kwargs), value_of)
        return node.target(*arguments, **keywords)  # type: ignore[operator]

    for node in chain:
        values[node] = called(node)
    found = values[chain[-1]] if chain else positions
    assert isinstance(found, Tensor)
    return found


def simplify_moves(captured: CapturedGraph) -> int:
    """Replace chains that leave values in row-major order by one reshape, or by nothing.

    Args:
        captured: Graph to edit; the caller recompiles it.

    Returns:
        How many chains were replaced.
    """
    count = 0
    for node in list(captured.graph.nodes):
        if not _ends_chain(node):
            continue
        chain = moves_behind(node)
        base = node_argument(chain[0], 0)
        old, new = info(base).shape, info(node).shape
        try:
            positions = positions_of(base)
            in_order = torch.equal(
                sent_through(chain, base, positions).flatten(), positions.flatten()
            )
        except UnknownMoveError:
            continue
        unknown = [extent for extent in new if not isinstance(extent, int)]
        if not in_order or len(unknown) > 1 or (old != new and len(chain) == 1):
            continue
        value = base
        if old != new:
            extents = [extent if isinstance(extent, int) else -1 for extent in new]
            with captured.graph.inserting_before(node):
                value = captured.graph.call_function(ops.reshape, (base, extents))
            value.meta = dict(node.meta)
        node.replace_all_uses_with(value)
        count += 1
    return count


def probe_shape(entry: TensorInfo, batch: int = PROBE) -> tuple[int, ...] | None:
    """Return the extents at a batch; ``None`` where one is not a multiple of it."""
    extents = []
    for extent in entry.shape:
        if isinstance(extent, int):
            extents.append(extent)
            continue
        factor, times, symbol = extent.rpartition("*")
        if symbol != "B" or (times and not factor.isdigit()):
            return None
        extents.append(batch * int(factor or 1))
    return tuple(extents)


def _is_move(node: fx.Node) -> bool:
    """Return whether a node moves values; one of several results is moved by a split alone."""
    if is_op(node, ops.GETITEM):
        return is_op(node.args[0], ops.UNBIND)
    return is_op(node, ops.REARRANGE)


def _ends_chain(node: fx.Node) -> bool:
    """Return whether a move yields one tensor that something else than a move reads."""
    if not _is_move(node) or "info" not in node.meta:
        return False
    return any(not is_op(user, ops.REARRANGE) for user in node.users)


def _is_constant(node: fx.Node) -> bool:
    """Return whether a tensor is made of stored ones and extents alone."""
    pending, seen = [node], {node}
    while pending:
        value = pending.pop()
        if is_op(value, ops.SYM_SIZE):
            continue
        if value.op not in ("get_attr", "call_function"):
            return False
        pending += [source for source in value.all_input_nodes if source not in seen]
        seen.update(value.all_input_nodes)
    return "info" in node.meta


def _extent(node: fx.Node) -> int:
    """Return the value of a node that computes an extent, at the probing batch."""
    if is_op(node, ops.SYM_SIZE):
        shape = probe_shape(info(node_argument(node, 0)))
        if shape is not None:
            return shape[int_argument(node, 1)]
    elif node.op == "call_function" and "info" not in node.meta:
        arguments = fx.map_arg(node.args, _extent)
        found: int = node.target(*arguments)  # type: ignore[operator]
        return found
    raise UnknownMoveError(f"it depends on {node.name}")
