"""Where an axis goes when an operation rearranges its tensor."""

import math

from torch import fx

from vitcompress.graph import ops
from vitcompress.graph.metadata import info, int_argument, list_argument
from vitcompress.graph.ops import is_op

__all__ = ["moved_axis", "pads_with_zero"]


def moved_axis(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Return the axis of ``node`` that holds axis ``axis`` of its input, whole and in order.

    Args:
        node: A rearranging operation: reshape, permutation, roll, slice, padding.
        source: Its input.
        axis: Axis of the input, not negative.

    Returns:
        An axis that is not negative; ``None`` if the axis is split, merged, cut or padded, or
        the operation is of another kind.
    """
    if "info" not in node.meta or "info" not in source.meta:
        return None
    rank = len(info(source).shape)
    if is_op(node, ops.EXPAND):
        # A repeated extent of 1 would look like the axis in front of it, merged.
        moved = axis + len(info(node).shape) - rank
        return moved if info(node).shape[moved] == info(source).shape[axis] else None
    if is_op(node, ops.RESHAPE):
        return _reshaped(info(node).shape, info(source).shape, axis)
    if is_op(node, ops.PERMUTE):
        return [position % rank for position in list_argument(node, 1)].index(axis)
    if is_op(node, ops.TRANSPOSE):
        first, second = (int_argument(node, index) % rank for index in (1, 2))
        return {first: second, second: first}.get(axis, axis)
    if is_op(node, ops.ROLL):
        rolled = [a % rank for a in list_argument(node, 2)] if len(node.args) > 2 else []
        return None if not rolled or axis in rolled else axis
    if is_op(node, ops.PAD):
        widths = list_argument(node, 1)
        position = 2 * (rank - 1 - axis)
        return None if any(widths[position : position + 2]) else axis
    if is_op(node, ops.PICK, ops.SELECT):
        picked = (int_argument(node, 1) if len(node.args) > 1 else 0) % rank
        if picked == axis:
            return None
        return axis - 1 if is_op(node, ops.SELECT) and picked < axis else axis
    return None


def pads_with_zero(pad: fx.Node) -> bool:
    """Return whether a padding fills with zeros: a factor passes those and nothing else."""
    mode: object = pad.args[2] if len(pad.args) > 2 else "constant"
    filler: object = pad.args[3] if len(pad.args) > 3 else 0.0
    if isinstance(mode, (int, float)):  # constant_pad_nd(x, pad, value)
        mode, filler = "constant", mode
    return mode == "constant" and not filler


def _reshaped(
    after: tuple[int | str, ...], before: tuple[int | str, ...], axis: int
) -> int | None:
    """Find an axis after a reshape: row-major order keeps it where as much lies behind it."""
    behind = _size(before[axis + 1 :])
    for position in range(len(after) - 1, -1, -1):
        # An axis of extent 1 next to ours has as much behind it: the extents must agree too.
        if after[position] == before[axis] and _size(after[position + 1 :]) == behind:
            return position
    return None


def _size(extents: tuple[int | str, ...]) -> tuple[int, tuple[str, ...]]:
    """Return a number of elements, and apart from it the factors that are not known."""
    known = math.prod(e for e in extents if isinstance(e, int))
    return known, tuple(sorted(e for e in extents if isinstance(e, str)))
