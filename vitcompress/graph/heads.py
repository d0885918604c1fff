"""Which channels of a linear belong to which attention head.

The way from a linear to an operand of attention reshapes, permutes and picks. Rather than read
those operations, they are run: on the numbers of the channels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vitcompress.graph import ops
from vitcompress.graph.metadata import info, node_argument
from vitcompress.graph.ops import is_op
from vitcompress.graph.partition import batch_factor

__all__ = ["HeadMap", "heads_of_operand", "heads_of_output"]


@dataclass(frozen=True)
class HeadMap:
    """The channels of each head at a linear.

    Attributes:
        linear: The linear node.
        channels: Output rows, or input columns, of each head and dimension, ``[H, D]`` int64.
    """

    linear: fx.Node
    channels: Tensor


def heads_of_operand(product: fx.Node, index: int, axis: int) -> HeadMap | str:
    """Return the rows of the linear that computes an operand of attention.

    Args:
        product: Product of attention, whose operands are ``[..., H, N, D]``.
        index: Which operand.
        axis: Its axis of dimensions, -1 or -2.

    Returns:
        The map, or why there is none: something else than moves and factors lies between.
    """
    operand = node_argument(product, index)
    path: list[fx.Node] = []
    node = operand
    while not is_op(node, ops.LINEAR):
        factor = is_op(node, ops.MUL, ops.DIV) and not isinstance(node.args[1], fx.Node)
        if not factor and not is_op(node, ops.REARRANGE):
            return f"{node.name} lies between it and a linear"
        path.insert(0, node)
        node = node_argument(node, 0)
    branch = next((n for n in (node, *path) if not _has_one_purpose(n)), None)
    if branch is not None:
        return f"{branch.name} has other readers"
    width = info(node).shape[-1]
    assert isinstance(width, int)
    found = _moved_numbers(node, path, torch.arange(width))
    if found.dim() < 3:
        return f"{operand.name} has no axis of heads"
    found = found.movedim(axis, -1)
    channels = found.reshape(-1, *found.shape[-3:])[0, :, 0]
    if not bool((found == channels[:, None]).all()):
        return f"{operand.name} mixes tokens and channels"
    return _checked(node, channels)


def heads_of_output(product: fx.Node) -> HeadMap | str:
    """Return the columns of the linear that alone reads attention's result, or why not."""
    path: list[fx.Node] = []
    node = product
    while not is_op(node, ops.LINEAR):
        if len(node.users) != 1:
            return f"{node.name} has {len(node.users)} readers"
        (node,) = node.users
        if not is_op(node, ops.LINEAR, ops.REARRANGE):
            return f"{node.name} lies between it and a linear"
        path.append(node)
    shape = info(product).shape
    if len(shape) < 3:
        return f"{product.name} has no axis of heads"
    heads, size = shape[-3], shape[-1]
    assert isinstance(heads, int)
    assert isinstance(size, int)
    numbers = torch.arange(heads * size).reshape(heads, 1, size)
    rows = _moved_numbers(product, path[:-1], numbers).flatten(0, -2)
    if rows.shape[1] != heads * size or not bool((rows == rows[0]).all()):
        return f"{node.name} reads several heads in one channel"
    return _checked(node, torch.argsort(rows[0]).reshape(heads, size))


def _has_one_purpose(node: fx.Node) -> bool:
    """Return whether a value is read once, or split into parts each of which is."""
    users = list(node.users)
    if len(users) == 1:
        return True
    parts = {(user.target, str(user.args[1:])) for user in users}
    split = all(is_op(user, ops.GETITEM, ops.SELECT, ops.PICK) for user in users)
    return split and len(parts) == len(users)


def _moved_numbers(start: fx.Node, path: list[fx.Node], numbers: Tensor) -> Tensor:
    """Return what becomes of numbers in the place of a value, for a single image."""
    # Floats: not every operation moves integers.
    known: dict[fx.Node, Any] = {start: numbers.double().expand(_shape_of_one(start))}

    def value_of(node: fx.Node) -> Any:
        return known[node] if node in known else batch_factor(node.meta["symbol"])

    for node in path:
        if is_op(node, ops.MUL, ops.DIV):
            known[node] = known[node_argument(node, 0)]
        else:
            arguments = fx.map_arg(node.args, value_of)
            known[node] = node.target(*arguments, **node.kwargs)  # type: ignore[operator]
    found: Tensor = known[path[-1]] if path else known[start]
    return found.long()


def _shape_of_one(node: fx.Node) -> list[int]:
    extents = [e if isinstance(e, int) else batch_factor(e) for e in info(node).shape]
    return [extent or 1 for extent in extents]


def _checked(linear: fx.Node, channels: Tensor) -> HeadMap | str:
    if len(set(channels.flatten().tolist())) != channels.numel():
        return f"heads share channels of {linear.name}"
    weight = linear.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(weight.users) > 1:
        return f"the weight of {linear.name} is shared or computed"
    return HeadMap(linear, channels)
