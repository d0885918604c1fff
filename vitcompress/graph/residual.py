"""Residual streams: what blocks read through a norm and add to."""

from dataclasses import dataclass, field

from torch import fx

from vitcompress.errors import UnsupportedModelError
from vitcompress.graph import ops
from vitcompress.graph.axes import moved_axis, pads_with_zero
from vitcompress.graph.captured import CapturedGraph
from vitcompress.graph.metadata import info, int_argument, list_argument, module_path
from vitcompress.graph.ops import is_op
from vitcompress.graph.patterns import NormLinearGroup, norm_linear_groups

__all__ = ["ResidualStream", "residual_streams"]


@dataclass
class ResidualStream:
    """Who writes a residual stream and who reads it.

    Attributes:
        channels: Its width.
        writers: Linears and convolutions whose output channels are added to it.
        constants: Stored tensors that are, with the axis of channels: tokens, positions.
        norms: Norms that read it; nothing else does. Their readers are linears alone.
    """

    channels: int
    writers: list[fx.Node] = field(default_factory=list)
    constants: dict[fx.Node, int] = field(default_factory=dict)
    norms: list[NormLinearGroup] = field(default_factory=list)


def residual_streams(
    captured: CapturedGraph,
) -> tuple[list[ResidualStream], dict[str, str]]:
    """Return the streams whose channels can be mapped linearly, everywhere at once.

    Returns:
        The streams, and each norm that reads none of them, by module path, with the reason:
        the operation that would not survive such a map.
    """
    groups, rejected = norm_linear_groups(captured)
    by_norm = {group.norm: group for group in groups}
    streams: list[ResidualStream] = []
    refused = {module_path(norm).path: reason for norm, reason in rejected}
    for group in groups:
        if any(group in stream.norms for stream in streams):
            continue
        try:
            streams.append(_stream(group, by_norm))
        except UnsupportedModelError as error:
            refused[module_path(group.norm).path] = str(error)
    return streams, refused


def _stream(group: NormLinearGroup, groups: dict[fx.Node, NormLinearGroup]) -> ResidualStream:
    """Return the stream that a norm reads.

    Raises:
        UnsupportedModelError: Something about it would not survive; the message names it.
    """
    first = group.norm.all_input_nodes[0]
    width = info(first).shape[-1]
    assert isinstance(width, int)
    stream = ResidualStream(width)
    pending, seen = [(first, len(info(first).shape) - 1)], set[fx.Node]()
    while pending:
        node, axis = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += _written(stream, node, axis)
            pending += _read(stream, node, axis, groups)
    _refuse_shared_tensors(stream)
    return stream


_Places = list[tuple[fx.Node, int]]


def _written(stream: ResidualStream, node: fx.Node, axis: int) -> _Places:
    """Note the writer that a value comes from, or return the parts of the stream it is of."""
    rank = len(info(node).shape)
    if is_op(node, ops.LINEAR) and axis == rank - 1:
        stream.writers.append(node)
        return []
    if is_op(node, ops.CONV) and axis == 1:
        stream.writers.append(node)
        return []
    if node.op == "get_attr":
        stream.constants[node] = axis
        return []
    if is_op(node, ops.ADD) and not node.kwargs and len(node.args) == 2:
        found: _Places = []
        for operand in node.args:
            if not isinstance(operand, fx.Node) or "info" not in operand.meta:
                raise _refusal(node, "adds a number to every channel")
            shape = info(operand).shape
            place = axis - rank + len(shape)
            if place < 0 or shape[place] != stream.channels:
                raise _refusal(node, "adds one number to several channels")
            found.append((operand, place))
        return found
    if is_op(node, ops.CAT):
        return [(part, axis) for part in _parts(node, axis)]
    for source in node.all_input_nodes[:1]:
        for place in range(len(info(source).shape)):
            if _moved(node, source, place) == axis:
                return [(source, place)]
    raise _refusal(node, "is written into the stream")


def _read(
    stream: ResidualStream, node: fx.Node, axis: int, groups: dict[fx.Node, NormLinearGroup]
) -> _Places:
    """Note the norms that read a value, and return what else of the stream it goes into."""
    found: _Places = []
    if node.op == "get_attr":
        return found
    for user in node.users:
        if is_op(user, ops.LAYER_NORM):
            if user not in groups or axis != len(info(node).shape) - 1:
                raise _refusal(user, "normalises the stream for others than linears")
            if any(consumer.pads for consumer in groups[user].consumers):
                raise _refusal(user, "is padded before the linear behind it")
            if groups[user] not in stream.norms:
                stream.norms.append(groups[user])
        elif is_op(user, ops.ADD):
            found.append((user, axis - len(info(node).shape) + len(info(user).shape)))
        elif is_op(user, ops.CAT):
            _parts(user, axis)
            found.append((user, axis))
        else:
            place = _moved(user, node, axis) if "info" in user.meta else None
            if place is None:
                raise _refusal(user, "reads the stream without a norm")
            found.append((user, place))
    return found


def _moved(node: fx.Node, source: fx.Node, axis: int) -> int | None:
    """Return where an axis goes, through means over other axes as well."""
    if is_op(node, ops.PAD) and not pads_with_zero(node):
        return None
    if not is_op(node, ops.MEAN):
        return moved_axis(node, source, axis)
    rank = len(info(source).shape)
    reduced = {int(a) % rank for a in list_argument(node, 1)}
    if axis in reduced:
        return None
    kept = len(node.args) > 2 and node.args[2] is True
    return axis if kept else axis - sum(a < axis for a in reduced)


def _parts(node: fx.Node, axis: int) -> list[fx.Node]:
    """Return what is joined, unless it is joined along the channels."""
    joined = int_argument(node, 1) if len(node.args) > 1 else 0
    if joined % len(info(node).shape) == axis:
        raise _refusal(node, "joins channels")
    return list(list_argument(node, 0))


def _refuse_shared_tensors(stream: ResidualStream) -> None:
    """Refuse tensors that serve another node: changed for the stream, they would be wrong."""
    for constant in stream.constants:
        if len(constant.users) > 1:
            raise _refusal(constant, "serves several nodes")
    for writer in stream.writers:
        for tensor in writer.args[1:3]:
            if isinstance(tensor, fx.Node) and (
                tensor.op != "get_attr" or len(tensor.users) > 1
            ):
                raise _refusal(tensor, f"of {writer.name} is shared or computed")


def _refusal(node: fx.Node, what: str) -> UnsupportedModelError:
    name = str(node.target) if node.op == "get_attr" else node.name
    return UnsupportedModelError(f"{module_path(node).path or 'model'}: {name} {what}")
