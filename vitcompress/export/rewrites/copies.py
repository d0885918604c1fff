"""Copies of quantizers, for values that rewrites split."""

import copy

from torch import fx

from vitcompress.graph import CapturedGraph
from vitcompress.graph.edit import quantizer_target
from vitcompress.quantizers import Quantizer

__all__ = ["call_copy", "quantizer_of"]


def quantizer_of(captured: CapturedGraph, node: fx.Node) -> Quantizer:
    """Return the quantizer that a node calls."""
    quantizer = captured.module.get_submodule(str(node.target))
    assert isinstance(quantizer, Quantizer)
    return quantizer


def call_copy(
    captured: CapturedGraph, before: fx.Node, quantized: fx.Node, value: fx.Node, site: str
) -> fx.Node:
    """Quantize another value as ``quantized`` is, by a quantizer of its own.

    Args:
        captured: Graph to edit.
        before: The new node goes in front of this one.
        quantized: Call of the quantizer to copy.
        value: What the copy reads.
        site: Name of the copy's site; numbered if another quantizer has it.

    Returns:
        The call of the copy.
    """
    quantizer = copy.deepcopy(quantizer_of(captured, quantized))
    taken, ordinal = captured.quantizers(), 0
    quantizer.site = site
    while quantizer_target(quantizer.site) in taken:
        ordinal += 1
        quantizer.site = f"{site}.{ordinal}"
    target = quantizer_target(quantizer.site)
    captured.module.add_submodule(target, quantizer)
    with captured.graph.inserting_before(before):
        node = captured.graph.call_module(target, (value,))
    node.meta = {**quantized.meta, "info": value.meta["info"]}
    return node
