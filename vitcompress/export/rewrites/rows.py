"""Rows that nothing reads are not computed.

A classifier that reads the class token needs one row of the last block's output. Operations
on rows behind the last attention, its own output and its queries then run on that row alone;
keys and values still need every token. Exact: the rows that are left are computed as before.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.edit import is_quantizer, quantizer_target
from vitcompress.graph.metadata import TensorInfo, info, list_argument
from vitcompress.graph.moves import probe_shape
from vitcompress.graph.ops import is_op
from vitcompress.quantizers import PerChannel, PerTensor, Quantizer

__all__ = ["keep_needed_rows"]

#: Operations on each element alone, operands broadcast.
ELEMENTWISE = (ops.ADD, ops.SUB, ops.MUL, ops.DIV, ops.ACTIVATION, ops.GATE)
#: Reshapes that state all extents of their result.
STATED = (ops.VIEW, {ops.reshape})


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


def keep_needed_rows(captured: CapturedGraph) -> int:
    """Let every operation compute only the rows that something reads.

    Args:
        captured: Graph to edit; the caller recompiles it.

    Returns:
        How many linears compute fewer rows.
    """
    needed: dict[fx.Node, Rows] = {}
    for node in reversed(captured.graph.nodes):
        rows = _needed(captured, node, needed)
        if rows is not None:
            needed[node] = rows
    narrowed = {
        node: rows for node, rows in needed.items() if any(_operands(captured, node, rows))
    }
    linears = sum(is_op(node, ops.LINEAR) for node in narrowed)
    if not linears:
        return 0
    picks = {
        user: picked
        for node in narrowed
        for user in node.users
        if (picked := _picked(node, user)) is not None
    }
    for node in list(captured.graph.nodes):
        if node in narrowed:
            _narrow(captured, node, narrowed)
        elif node in picks:
            _shift(node, picks[node], narrowed)
    return linears


# What is needed


def _needed(
    captured: CapturedGraph, node: fx.Node, needed: dict[fx.Node, Rows]
) -> Rows | None:
    """Return the rows that the users of a value read; ``None`` for all of it."""
    if "info" not in node.meta or node.op in ("placeholder", "output"):
        return None
    demands: list[Rows] = []
    for user in node.users:
        if is_op(user, ops.SYM_SIZE) and user.args[1] == 0:
            continue  # the batch is not touched
        demand = _picked(node, user)
        if demand is None and user in needed:
            found = dict(_operands(captured, user, needed[user]))
            demand = found.get(node)
        if demand is None:
            return None
        demands.append(demand)
    if not demands or len({rows.axis for rows in demands}) > 1:
        return None
    axis = demands[0].axis
    start, stop = min(r.start for r in demands), max(r.stop for r in demands)
    return None if stop - start == info(node).shape[axis] else Rows(axis, start, stop)


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


def _operands(
    captured: CapturedGraph, node: fx.Node, rows: Rows
) -> Iterator[tuple[fx.Node, Rows]]:
    """Yield the operands of which rows suffice to compute rows of a value, and these.

    Nothing is yielded for an operation that needs everything.
    """
    axis, rank = rows.axis, len(info(node).shape)
    if is_quantizer(node):
        quantizer = captured.module.get_submodule(str(node.target))
        assert isinstance(quantizer, Quantizer)
        granularity = quantizer.spec.granularity
        own = isinstance(granularity, PerChannel) and granularity.axis % rank != axis
        if type(granularity) is PerTensor or own:
            yield from _along(node, axis, rows)
    elif is_op(node, *ELEMENTWISE):
        for argument in node.args:
            if isinstance(argument, fx.Node) and "info" in argument.meta:
                yield from _broadcast(argument, rank, rows)
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
    elif is_op(node, *STATED):
        found = _before_reshape(node, axis)
        if found is not None:
            yield from _along(node, found, rows)


def _along(node: fx.Node, axis: int, rows: Rows) -> Iterator[tuple[fx.Node, Rows]]:
    """Yield the first operand, of which the rows lie along ``axis``."""
    operand = node.args[0]
    if isinstance(operand, fx.Node) and "info" in operand.meta:
        yield operand, Rows(axis, rows.start, rows.stop)


def _broadcast(operand: fx.Node, rank: int, rows: Rows) -> Iterator[tuple[fx.Node, Rows]]:
    shape = info(operand).shape
    axis = len(shape) - rank + rows.axis
    if axis >= 0 and shape[axis] != 1:
        yield operand, Rows(axis, rows.start, rows.stop)


def _before_reshape(node: fx.Node, axis: int) -> int | None:
    """Return which axis of a reshape's operand its axis is, if it stays one."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    if "info" not in operand.meta or not isinstance(list_argument(node, 1)[axis], int):
        return None
    old, new = probe_shape(info(operand)), probe_shape(info(node))
    if old is None or new is None:
        return None
    for candidate in range(1, len(old)):
        same = old[candidate] == new[axis]
        if same and math.prod(old[:candidate]) == math.prod(new[:axis]):
            return candidate
    return None


# Computing less


def _narrow(captured: CapturedGraph, node: fx.Node, narrowed: dict[fx.Node, Rows]) -> None:
    """Let a node compute its needed rows from those of its operands."""
    rows = narrowed[node]
    for operand, demand in list(_operands(captured, node, rows)):
        computed = narrowed.get(operand)
        if computed == demand:
            continue
        offset = 0 if computed is None else computed.start
        value = _sliced(captured, node, operand, demand, offset)
        node.args = tuple(value if argument is operand else argument for argument in node.args)
    if is_op(node, *STATED):
        extents = list(list_argument(node, 1))
        if extents[rows.axis] != -1:
            extents[rows.axis] = rows.stop - rows.start
        node.args = (node.args[0], extents)
    _set_extent(node, rows)


def _sliced(
    captured: CapturedGraph, before: fx.Node, operand: fx.Node, rows: Rows, offset: int
) -> fx.Node:
    """Return a node for rows of an operand that other readers need as a whole."""
    source = operand
    quantizes = is_quantizer(operand)
    if quantizes:  # a linear wants its quantizer right in front of it
        found = operand.args[0]
        assert isinstance(found, fx.Node)
        source = found
    arguments: tuple[Any, ...] = (source, rows.axis, rows.start - offset, rows.stop - offset)
    with captured.graph.inserting_before(before):
        value = captured.graph.call_function(ops.slice_, arguments)
    value.meta = dict(source.meta)
    _set_extent(value, rows)
    if not quantizes:
        return value
    quantizer = copy.deepcopy(captured.module.get_submodule(str(operand.target)))
    assert isinstance(quantizer, Quantizer)
    quantizer.site = f"{quantizer.site}:rows"
    target = quantizer_target(quantizer.site)
    captured.module.add_submodule(target, quantizer)
    with captured.graph.inserting_before(before):
        node = captured.graph.call_module(target, (value,))
    node.meta = dict(operand.meta)
    _set_extent(node, rows)
    return node


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
