"""Rows that nothing reads are not computed.

A classifier that reads the class token needs one row of the last block's output. Operations
on rows behind the last attention, its own output and its queries then run on that row alone;
keys and values still need every token. Exact: the rows that are left are computed as before.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from vitcompress.export.rewrites.copies import call_copy, quantizer_of
from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import (
    TensorInfo,
    info,
    int_argument,
    list_argument,
    node_argument,
)
from vitcompress.graph.moves import probe_shape
from vitcompress.graph.ops import is_op
from vitcompress.quantizers import PerChannel, PerTensor

__all__ = ["keep_needed_rows"]

#: Operations on each element alone, operands broadcast.
ELEMENTWISE = (ops.ADD, ops.SUB, ops.MUL, ops.DIV, ops.ACTIVATION, ops.GATE)
#: Reshapes that state all extents of their result.
STATED = (ops.VIEW, {ops.reshape})
#: Largest share of the rows that is worth the slices; all but the class token is not.
MOST_ROWS = 0.5
#: A batch that no extent of a network is a multiple of: tells extents of batches from others.
LARGE_BATCH = 1_000_003


@dataclass(frozen=True)
class Rows:
    """A range along one axis of a value.

    Attributes:
        axis: Counted from the front.
        start: First index.
        stop: One past the last.
    """

    axis: int
    start: int
    stop: int


#: Arguments of a node, and the rows of each that it reads.
Demands = list[tuple[int, Rows]]


def keep_needed_rows(captured: CapturedGraph) -> int:
    """Let every operation compute only the rows that something reads.

    Args:
        captured: Graph to edit; the caller recompiles it.

    Returns:
        How many linears compute fewer rows.
    """
    demands: dict[fx.Node, Demands] = {}
    narrowed: dict[fx.Node, Rows] = {}
    for node in reversed(captured.graph.nodes):
        rows = _needed(node, demands)
        if rows is not None:
            demands[node] = list(_demands(captured, node, rows))
            if demands[node]:
                narrowed[node] = rows
    linears = sum(is_op(node, ops.LINEAR) for node in narrowed)
    if not linears:
        return 0
    picks = {
        user: picked
        for node in narrowed
        for user in node.users
        if (picked := _picked(node, user)) is not None
    }
    slices: dict[tuple[fx.Node, Rows], fx.Node] = {}
    for node in list(captured.graph.nodes):
        if node in narrowed:
            for index, rows in demands[node]:
                operand = node_argument(node, index)
                if narrowed.get(operand) == rows:
                    continue
                if (operand, rows) not in slices:
                    slices[operand, rows] = _sliced(captured, node, operand, rows, narrowed)
                node.update_arg(index, slices[operand, rows])
            _narrow(node, narrowed[node])
        elif node in picks:
            _shift(node, picks[node], narrowed)
    return linears


# What is needed


def _needed(node: fx.Node, demands: dict[fx.Node, Demands]) -> Rows | None:
    """Return the few rows that the users of a value read; ``None`` for all of it."""
    if "info" not in node.meta or node.op == "placeholder":
        return None
    found: list[Rows] = []
    for user in node.users:
        if is_op(user, ops.SYM_SIZE) and user.args[1] == 0:
            continue  # the batch is not touched
        picked = _picked(node, user)
        read = [rows for index, rows in demands.get(user, ()) if user.args[index] is node]
        if picked is not None:
            found.append(picked)
        elif read and len(read) == _times_read(node, user):
            found += read
        else:
            return None
    if not found or len({rows.axis for rows in found}) > 1:
        return None
    extent = info(node).shape[found[0].axis]
    start, stop = min(r.start for r in found), max(r.stop for r in found)
    few = isinstance(extent, int) and stop - start <= MOST_ROWS * extent
    return Rows(found[0].axis, start, stop) if few else None


def _times_read(node: fx.Node, user: fx.Node) -> int:
    """Return in how many arguments a user reads a value: a product may be of it and itself."""
    read: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), read.append)
    return sum(argument is node for argument in read)


def _picked(node: fx.Node, user: fx.Node) -> Rows | None:
    """Return what a select or slice picks along the token axis of ``[B, N, C]``."""
    shape = info(node).shape
    if not is_op(user, ops.SELECT, ops.PICK) or user.args[0] is not node or len(shape) != 3:
        return None
    axis, *others = user.args[1:]
    bounds = [bound for bound in others if isinstance(bound, int)]
    extent = shape[1]
    if axis not in (1, -2) or not isinstance(extent, int) or len(bounds) != len(others):
        return None
    if is_op(user, ops.SELECT):
        index = bounds[0] % extent
        return Rows(1, index, index + 1)
    if user.target is not ops.slice_ or len(bounds) != 2:
        return None
    start, stop, _ = slice(*bounds).indices(extent)
    return Rows(1, start, stop) if start < stop else None


def _demands(captured: CapturedGraph, node: fx.Node, rows: Rows) -> Iterator[tuple[int, Rows]]:
    """Yield the arguments of which rows suffice to compute rows of a value, and these.

    Nothing is yielded for an operation that needs everything.
    """
    axis, rank = rows.axis, len(info(node).shape)
    if is_quantizer(node):
        if _shares_scales(captured, node, axis):
            yield from _along(node, axis, rows)
    elif is_op(node, *ELEMENTWISE):
        for index, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and "info" in argument.meta:
                shape = info(argument).shape
                along = len(shape) - rank + axis
                if along >= 0 and shape[along] != 1:
                    yield index, Rows(along, rows.start, rows.stop)
    elif is_op(node, ops.LAYER_NORM):
        if axis < rank - len(list_argument(node, 1)):
            yield from _along(node, axis, rows)
    elif is_op(node, ops.LINEAR):
        if axis < rank - 1:
            yield from _along(node, axis, rows)
    elif is_op(node, ops.SOFTMAX):
        dim = node.args[1]
        if isinstance(dim, int) and dim % rank != axis:
            yield from _along(node, axis, rows)
    elif is_op(node, ops.MATMUL):
        left = node.args[0]
        if axis == rank - 2 and isinstance(left, fx.Node) and len(info(left).shape) == rank:
            yield from _along(node, axis, rows)
    elif is_op(node, ops.PERMUTE):
        dims = list_argument(node, 1)
        yield from _along(node, dims[axis] % rank, rows)
    elif is_op(node, ops.TRANSPOSE):
        first, second = (int(d) % rank for d in node.args[1:3] if isinstance(d, int))
        swapped = {first: second, second: first}
        yield from _along(node, swapped.get(axis, axis), rows)
    elif is_op(node, *STATED, ops.FLATTEN, ops.UNFLATTEN):
        found = _before_reshape(node, axis)
        if found is not None:
            yield from _along(node, found, rows)


def _shares_scales(captured: CapturedGraph, node: fx.Node, axis: int) -> bool:
    """Return whether a quantizer has the same scales at every index of an axis."""
    granularity = quantizer_of(captured, node).spec.granularity
    if isinstance(granularity, PerChannel):
        return granularity.axis % len(info(node).shape) != axis
    return type(granularity) is PerTensor


def _along(node: fx.Node, axis: int, rows: Rows) -> Iterator[tuple[int, Rows]]:
    """Yield the first argument, of which the rows lie along ``axis``."""
    operand = node.args[0]
    if isinstance(operand, fx.Node) and "info" in operand.meta:
        yield 0, Rows(axis, rows.start, rows.stop)


def _before_reshape(node: fx.Node, axis: int) -> int | None:
    """Return which axis of a reshape's operand its axis is, if it stays one."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    if "info" not in operand.meta:
        return None
    if is_op(node, *STATED) and not isinstance(list_argument(node, 1)[axis], int):
        return None
    old, new = (probe_shape(info(value), LARGE_BATCH) for value in (operand, node))
    if old is None or new is None:
        return None
    last = len(old)
    if is_op(node, ops.UNFLATTEN):  # what it makes of an axis, it states
        last = int_argument(node, 1) % last
    for candidate in range(1, last):
        same = old[candidate] == new[axis]
        if same and math.prod(old[:candidate]) == math.prod(new[:axis]):
            return candidate
    return None


# Computing less


def _narrow(node: fx.Node, rows: Rows) -> None:
    """Let a node, the operands of which are narrow already, state what it computes."""
    if is_op(node, *STATED):
        extents = list(list_argument(node, 1))
        if extents[rows.axis] != -1:
            extents[rows.axis] = rows.stop - rows.start
        node.args = (node.args[0], extents)
    _set_extent(node, rows)


def _sliced(
    captured: CapturedGraph,
    before: fx.Node,
    operand: fx.Node,
    rows: Rows,
    narrowed: dict[fx.Node, Rows],
) -> fx.Node:
    """Return a node for rows of an operand of which other readers need more."""
    offset = narrowed[operand].start if operand in narrowed else 0
    quantizes = is_quantizer(operand) and _shares_scales(captured, operand, rows.axis)
    # A linear wants its quantizer right in front of it.
    source = node_argument(operand, 0) if quantizes else operand
    arguments: tuple[Any, ...] = (source, rows.axis, rows.start - offset, rows.stop - offset)
    with captured.graph.inserting_before(before):
        value = captured.graph.call_function(ops.slice_, arguments)
    value.meta = dict(source.meta)
    _set_extent(value, rows)
    if not quantizes:
        return value
    site = f"{quantizer_of(captured, operand).site}:rows"
    return call_copy(captured, before, operand, value, site)


def _shift(node: fx.Node, picked: Rows, narrowed: dict[fx.Node, Rows]) -> None:
    """Count the bounds of a select or slice from the first row that is left."""
    source, axis, *_ = node.args
    assert isinstance(source, fx.Node)
    start = narrowed[source].start
    bounds = [picked.start - start, picked.stop - start]
    node.args = (source, axis, *(bounds[:1] if is_op(node, ops.SELECT) else bounds))


def _set_extent(node: fx.Node, rows: Rows) -> None:
    found = info(node)
    shape = list(found.shape)
    shape[rows.axis] = rows.stop - rows.start
    node.meta["info"] = TensorInfo(tuple(shape), found.dtype)
