"""What an operation costs: multiply-adds of one image, read off the shapes of the graph."""

import math
import re

from torch import fx

from vitcompress.graph import ops
from vitcompress.graph.captured import CapturedGraph
from vitcompress.graph.metadata import info, node_argument
from vitcompress.graph.ops import is_op

__all__ = ["multiply_adds", "rows_of_an_image"]


def rows_of_an_image(node: fx.Node) -> int:
    """Return how many vectors along the last axis a value holds for each image."""
    return math.prod(map(_of_one_image, info(node).shape[:-1]))


def multiply_adds(captured: CapturedGraph) -> dict[fx.Node, int]:
    """Return the multiply-adds of one image in each linear, convolution and product."""
    found: dict[fx.Node, int] = {}
    for node in captured.graph.nodes:
        if is_op(node, ops.LINEAR, ops.CONV):
            weight = info(node_argument(node, 1)).shape
            results = math.prod(map(_of_one_image, info(node).shape))
            found[node] = results * math.prod(map(_of_one_image, weight[1:]))
        elif is_op(node, ops.MATMUL):
            inner = _of_one_image(info(node_argument(node, 0)).shape[-1])
            found[node] = inner * math.prod(map(_of_one_image, info(node).shape))
    return found


def _of_one_image(extent: int | str) -> int:
    """Return an extent at batch 1: windows may share the batch axis, as in ``64*B``."""
    if isinstance(extent, int):
        return extent
    match = re.fullmatch(r"(?:(\d+)\*)?B(?:\*(\d+))?", extent)
    return 1 if match is None else int(match[1] or match[2] or 1)
