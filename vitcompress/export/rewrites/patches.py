"""Convolutions over patches that do not overlap, as linears.

The patch embedding of a vision transformer multiplies each patch with one matrix. Written as
such it runs on the integer kernel of linears, which runtimes have; as a convolution it runs in
float wherever the runtime fuses no convolution between quantizers.
"""

from torch import fx

from vitcompress.export.rewrites.copies import call_copy, quantizer_of
from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import TensorInfo, info, node_argument
from vitcompress.graph.ops import is_op
from vitcompress.quantizers import PerChannel, PerTensor

__all__ = ["linear_patches"]

CONV_ARGUMENTS = ("image", "weight", "bias", "stride", "padding", "dilation", "groups")


def linear_patches(captured: CapturedGraph) -> int:
    """Replace quantized convolutions over separate patches by linears.

    Args:
        captured: Graph to edit, weights frozen; the caller recompiles it.

    Returns:
        How many convolutions were replaced.
    """
    found = [node for node in captured.graph.nodes if _is_patching(captured, node)]
    for node in found:
        _replace(captured, node)
    return len(found)


def _is_patching(captured: CapturedGraph, node: fx.Node) -> bool:
    """Return whether a node is a convolution whose stride is its kernel, without padding."""
    if not is_op(node, {ops.convolution[2]}):
        return False
    given = dict(zip(CONV_ARGUMENTS, node.args, strict=False))
    image, weight = given["image"], given["weight"]
    if not (isinstance(image, fx.Node) and isinstance(weight, fx.Node)):
        return False
    if not (_has_one_scale(captured, image) and _is_stored_alone(captured, weight)):
        return False
    stored = captured.parameter(str(node_argument(weight, 0).target))
    kernel, extents = list(stored.shape[2:]), info(image).shape[2:]
    pairs = zip(extents, kernel, strict=True)
    return (
        bool(min(kernel) > 1)
        and _pair(given.get("stride", 1)) == kernel
        and _pair(given.get("padding", 0)) == [0, 0]
        and _pair(given.get("dilation", 1)) == [1, 1]
        and bool(given.get("groups", 1) == 1)
        and all(isinstance(extent, int) and extent % size == 0 for extent, size in pairs)
    )


def _has_one_scale(captured: CapturedGraph, node: fx.Node) -> bool:
    """Return whether a value is quantized with one scale."""
    return (
        is_quantizer(node) and type(quantizer_of(captured, node).spec.granularity) is PerTensor
    )


def _is_stored_alone(captured: CapturedGraph, node: fx.Node) -> bool:
    """Return whether a value is a stored weight of this node, with a scale a row at most."""
    if not is_quantizer(node) or not quantizer_of(captured, node).frozen:
        return False
    granularity = quantizer_of(captured, node).spec.granularity
    rows = isinstance(granularity, PerChannel) and granularity.axis == 0
    target = str(node_argument(node, 0).target)
    readers = [
        user
        for stored in captured.graph.find_nodes(op="get_attr", target=target)
        for user in stored.users
    ]
    alone = readers == [node] and len(node.users) == 1
    return alone and (rows or type(granularity) is PerTensor)


def _replace(captured: CapturedGraph, node: fx.Node) -> None:
    quantized, weight = node_argument(node, 0), node_argument(node, 1)
    image, stored = node_argument(quantized, 0), node_argument(weight, 0)
    codes = captured.parameter(str(stored.target))
    rows, channels, kernel_height, kernel_width = codes.shape
    height, width = (
        int(extent) // k
        for extent, k in zip(info(image).shape[2:], (kernel_height, kernel_width), strict=True)
    )
    captured.set_parameter(str(stored.target), codes.reshape(rows, -1))
    weight.meta["info"] = info(stored)
    batch, dtype = info(image).shape[0], info(image).dtype
    grid = [-1, channels, height, kernel_height, width, kernel_width]
    row = channels * kernel_height * kernel_width
    with captured.graph.inserting_before(node):
        parts = captured.graph.call_function(ops.reshape, (image, grid))
        moved = captured.graph.call_function(ops.permute, (parts, [0, 2, 4, 1, 3, 5]))
        patches = captured.graph.call_function(ops.reshape, (moved, [-1, height * width, row]))
    patches.meta["info"] = TensorInfo((batch, height * width, row), dtype)
    if len(quantized.users) > 1:  # another reader wants it as an image
        site = f"{quantizer_of(captured, quantized).site}:patches"
        value = call_copy(captured, node, quantized, patches, site)
    else:
        with captured.graph.inserting_before(node):
            value = captured.graph.call_module(str(quantized.target), (patches,))
    with captured.graph.inserting_before(node):
        product = captured.graph.call_function(ops.linear, (value, weight, *node.args[2:3]))
        tokens = captured.graph.call_function(
            ops.reshape, (product, [-1, height, width, rows])
        )
        result = captured.graph.call_function(ops.permute, (tokens, [0, 3, 1, 2]))
    shapes: list[tuple[fx.Node, tuple[int | str, ...]]] = [
        (parts, (batch, *grid[1:])),
        (moved, (batch, height, width, channels, kernel_height, kernel_width)),
        (patches, (batch, height * width, row)),
        (value, (batch, height * width, row)),
        (product, (batch, height * width, rows)),
        (tokens, (batch, height, width, rows)),
        (result, (batch, rows, height, width)),
    ]
    for new, shape in shapes:
        new.meta = {**node.meta, "info": TensorInfo(shape, dtype)}
    node.replace_all_uses_with(result)
    captured.graph.erase_node(node)


def _pair(value: object) -> list[int]:
    found = list(value) if isinstance(value, (list, tuple)) else [value, value]
    return [int(str(extent)) for extent in found]
