"""Per-channel maps folded into the weights next to them: batch norms and LayerScale.

A map ``a x + b`` on channels that comes straight out of a convolution or linear joins its
rows; one that only convolutions and linears read joins their columns. Both are exact, and what
is quantized afterwards is the weight that runs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vitcompress.graph import ops
from vitcompress.graph.axes import moved_axis, pads_with_zero
from vitcompress.graph.captured import CapturedGraph
from vitcompress.graph.edit import constant_node
from vitcompress.graph.metadata import (
    ModulePath,
    info,
    list_argument,
    module_path,
    node_argument,
)
from vitcompress.graph.ops import is_op

__all__ = [
    "ChannelMap",
    "batch_norm_map",
    "fold_batch_norms",
    "fold_channel_scales",
    "fold_leading_batch_norms",
    "stored_tensor",
]


@dataclass(frozen=True)
class ChannelMap:
    """``y = factor x + shift`` on each channel; ``[C]`` float64 each."""

    factor: Tensor
    shift: Tensor


def batch_norm_map(captured: CapturedGraph, norm: fx.Node) -> ChannelMap | None:
    """Return what a batch norm does in evaluation; ``None`` if its tensors are not stored."""
    gamma, beta, mean, variance = (
        stored_tensor(captured, argument) for argument in norm.args[1:5]
    )
    if mean is None or variance is None:
        return None
    eps = norm.args[6]
    assert isinstance(eps, float)
    factor = torch.rsqrt(variance.double() + eps)
    if gamma is not None:
        factor = factor * gamma.double()
    shift = -mean.double() * factor
    return ChannelMap(factor, shift if beta is None else shift + beta.double())


# Behind a convolution or linear


def fold_batch_norms(captured: CapturedGraph) -> None:
    """Fold each batch norm into the layer whose result it alone reads, in place."""
    for node in list(captured.graph.nodes):
        if not is_op(node, ops.BATCH_NORM):
            continue
        producer = _foldable_producer(node)
        channel_map = batch_norm_map(captured, node)
        if producer is None or channel_map is None:
            continue
        _fold_into_rows(captured, producer, channel_map)
        for output in list(node.users):  # getitem 0: the other outputs have no reader
            output.replace_all_uses_with(node.args[0])


def _foldable_producer(norm: fx.Node) -> fx.Node | None:
    """Return the convolution or linear whose only reader is the norm, through reshapes."""
    value = norm.args[0]
    while isinstance(value, fx.Node) and len(value.users) == 1:
        if is_op(value, ops.CONV, ops.LINEAR) and _weight(value) is None:
            return None
        if is_op(value, ops.CONV):
            # A reshape in between may only have dropped extents of 1: [B, C, 1, 1] to [B, C].
            flat = value is norm.args[0] or set(info(value).shape[2:]) == {1}
            return value if flat else None
        if is_op(value, ops.LINEAR):
            # A linear's channels are its last axis; the norm reads axis 1, so both must agree.
            shape = info(node_argument(norm, 0)).shape
            return value if len(shape) == 2 and shape[1] == info(value).shape[-1] else None
        if not is_op(value, ops.RESHAPE) or len(info(value).shape) != 2:
            return None
        value = value.args[0]
    return None


def fold_channel_scales(captured: CapturedGraph) -> None:
    """Fold products with a stored vector over the channels (LayerScale) into rows, in place.

    The vector joins a convolution, linear or LayerNorm whose result nothing else reads;
    operations that move values about may lie in between.
    """
    for layer in list(captured.graph.nodes):
        if not is_op(layer, ops.CONV, ops.LINEAR, ops.LAYER_NORM) or _weight(layer) is None:
            continue
        while (scale := _scale_behind(captured, layer)) is not None:
            value, vector = _scaled(captured, scale)
            assert vector is not None
            factor = vector.flatten().double()
            _fold_into_rows(captured, layer, ChannelMap(factor, torch.zeros_like(factor)))
            scale.replace_all_uses_with(value)
            captured.graph.erase_node(scale)


def _scale_behind(captured: CapturedGraph, layer: fx.Node) -> fx.Node | None:
    """Return a product with a vector over the output channels of a layer."""
    axis = 1 if is_op(layer, ops.CONV) else len(info(layer).shape) - 1
    channels = info(layer).shape[axis]
    value: fx.Node = layer
    while len(value.users) == 1:
        user = next(iter(value.users))
        if is_op(user, ops.MUL):
            _, vector = _scaled(captured, user)
            if vector is None or vector.numel() != channels:
                return None
            position = axis - len(info(value).shape) + vector.dim()
            along = position >= 0 and vector.shape[position] == channels
            return user if along and info(user) == info(value) else None
        moved = moved_axis(user, value, axis)
        if moved is None or (is_op(user, ops.PAD) and not pads_with_zero(user)):
            return None
        value, axis = user, moved
    return None


def _scaled(captured: CapturedGraph, product: fx.Node) -> tuple[fx.Node, Tensor | None]:
    """Return the sides of a product: a value, and a stored float tensor if there is one."""
    first, second = product.args[:2]
    if isinstance(first, fx.Node) and first.op == "get_attr":
        first, second = second, first
    assert isinstance(first, fx.Node)
    vector = stored_tensor(captured, second)
    usable = vector is not None and vector.is_floating_point() and vector.numel() > 1
    return first, vector if usable else None


def _fold_into_rows(captured: CapturedGraph, layer: fx.Node, channel_map: ChannelMap) -> None:
    """Let a layer compute ``channel_map`` of what it computed."""
    place = 2 if is_op(layer, ops.LAYER_NORM) else 1
    weight, bias = (
        stored_tensor(captured, layer.args[index]) if len(layer.args) > index else None
        for index in (place, place + 1)
    )
    factor, shift = channel_map.factor, channel_map.shift
    if weight is None:
        weight = torch.ones(len(factor))
    rows = factor.reshape(-1, *[1] * (weight.dim() - 1))
    if bias is not None:
        shift = bias.double() * factor + shift
    _set_weights(captured, layer, place, weight.double() * rows, shift)


# In front of convolutions and linears


def fold_leading_batch_norms(captured: CapturedGraph) -> None:
    """Fold batch norms that only convolutions and linears read into their columns, in place.

    A convolution that pads cannot take one: its zeros are added behind the norm.
    """
    for norm in list(captured.graph.nodes):
        if not is_op(norm, ops.BATCH_NORM):
            continue
        channel_map = batch_norm_map(captured, norm)
        readers: list[fx.Node] = []
        if channel_map is None or not all(
            _only_layers_read(output, 1, readers) for output in norm.users
        ):
            continue
        for layer in dict.fromkeys(readers):
            _fold_into_columns(captured, layer, channel_map)
        for output in list(norm.users):
            output.replace_all_uses_with(node_argument(norm, 0))


def _only_layers_read(value: fx.Node, axis: int, found: list[fx.Node]) -> bool:
    """Collect the layers that read a value whose channels lie on ``axis``; say if all do."""
    if is_op(value, ops.GETITEM) and value.args[1] != 0:
        return not value.users
    for user in value.users:
        if is_op(user, ops.CONV, ops.LINEAR):
            last = len(info(value).shape) - 1
            if user.args[0] is not value or _weight(user) is None:
                return False
            if axis != (1 if is_op(user, ops.CONV) else last) or _pads(user):
                return False
            found.append(user)
            continue
        moved = None if is_op(user, ops.PAD) else moved_axis(user, value, axis)
        if moved is None or not _only_layers_read(user, moved, found):
            return False
    return bool(value.users)


def _pads(layer: fx.Node) -> bool:
    if not is_op(layer, ops.CONV) or len(layer.args) <= 4:
        return False
    padding = layer.args[4]
    return padding != "valid" if isinstance(padding, str) else any(list_argument(layer, 4))


def _fold_into_columns(
    captured: CapturedGraph, layer: fx.Node, channel_map: ChannelMap
) -> None:
    """Let a layer read ``x`` and compute what it computed of ``channel_map`` of ``x``."""
    weight = stored_tensor(captured, layer.args[1])
    assert weight is not None
    bias = stored_tensor(captured, layer.args[2]) if len(layer.args) > 2 else None
    groups = layer.args[6] if is_op(layer, ops.CONV) and len(layer.args) > 6 else 1
    assert isinstance(groups, int)
    factor, shift = (
        part.reshape(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
        for part in (channel_map.factor, channel_map.shift)
    )
    taps = weight.double().reshape(*factor.shape, -1)
    shifted = (taps * shift[..., None]).sum(dim=(1, 2))
    if bias is not None:
        shifted = shifted + bias.double()
    _set_weights(captured, layer, 1, (taps * factor[..., None]).reshape(weight.shape), shifted)


# Stored tensors


def _weight(layer: fx.Node) -> fx.Node | None:
    """Return the node of a layer's stored weight; for a norm without one, its input.

    ``None`` if the weight or the bias is computed.
    """
    place = 2 if is_op(layer, ops.LAYER_NORM) else 1
    if place == 2 and len(list_argument(layer, 1)) != 1:
        return None
    weight, bias = [*layer.args[place : place + 2], None, None][:2]
    if isinstance(bias, fx.Node) and bias.op != "get_attr":
        return None
    if weight is None:
        return node_argument(layer, 0)
    return weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def stored_tensor(captured: CapturedGraph, node: Any) -> Tensor | None:
    """Return the tensor that an argument reads; ``None`` if it is computed or absent."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        return captured.parameter(str(node.target))
    return None


def _set_weights(
    captured: CapturedGraph, layer: fx.Node, place: int, weight: Tensor, bias: Tensor
) -> None:
    """Store new tensors under the old names, or new ones where others read the old."""
    old = layer.args[place] if len(layer.args) > place else None
    path = str(old.target).rpartition(".")[0] if isinstance(old, fx.Node) else ""
    owner = ModulePath(path, module_path(layer).kind) if path else module_path(layer)
    arguments = [*layer.args, None, None][: max(len(layer.args), place + 2)]
    arguments[place] = constant_node(captured, layer, "weight", weight.float(), owner)
    arguments[place + 1] = constant_node(captured, layer, "bias", bias.float(), owner)
    layer.args = tuple(arguments)
