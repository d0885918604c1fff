"""Running a graph node by node: taps on values, quantizers off, whole data sets in step."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from vitcompress.graph.captured import CapturedGraph
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import node_argument

__all__ = ["run", "walk"]

Tap = Callable[[Tensor], None]
Replacement = Callable[[Tensor], Tensor]


class _TappingInterpreter(fx.Interpreter):
    """Shows values to taps as they appear; frees them after their last use."""

    def __init__(
        self,
        module: fx.GraphModule,
        taps: Mapping[fx.Node, Tap],
        bypass: bool,
        replaced: Mapping[fx.Node, Replacement],
    ) -> None:
        super().__init__(module)
        self.taps = taps
        self.bypass = bypass
        self.replaced = replaced

    def run_node(self, n: fx.Node) -> Any:
        if n in self.replaced:
            value = self.replaced[n](self.env[node_argument(n, 0)])
        elif self.bypass and is_quantizer(n):
            value = self.env[node_argument(n, 0)]
        else:
            value = super().run_node(n)
        if n in self.taps:
            self.taps[n](value)
        return value


@torch.no_grad()
def run(
    captured: CapturedGraph,
    images: Tensor,
    *,
    taps: Mapping[fx.Node, Tap] | None = None,
    bypass: bool = False,
    replaced: Mapping[fx.Node, Replacement] | None = None,
) -> tuple[Tensor, ...]:
    """Return the flat outputs for one batch.

    Args:
        captured: Graph to run.
        images: ``[B, C, H, W]`` float32.
        taps: Called with the value of their node.
        bypass: Let values pass quantizers unchanged. Frozen weights cannot be bypassed.
        replaced: What to compute at a node instead, from its first argument.
    """
    captured.check_images(images)
    interpreter = _TappingInterpreter(captured.module, taps or {}, bypass, replaced or {})
    outputs: tuple[Tensor, ...] = interpreter.run(images)
    return outputs


@torch.no_grad()
def walk(
    captured: CapturedGraph,
    batches: Iterable[Tensor],
    visit: Callable[[fx.Node, list[Tensor]], None],
    taps: Mapping[fx.Node, Callable[[list[Tensor]], None]] | None = None,
) -> None:
    """Run all batches through the graph in step, node by node.

    At each quantizer ``visit`` sees the values of *all* batches before they are quantized, and
    may set the quantizer's parameters. So every quantizer is set on the output of those before
    it: sequential calibration in one pass over the data. Memory holds the live values of all
    batches at once, which grows with the number of images and not with depth.

    Args:
        captured: Graph to run.
        batches: Images of each batch, ``[B, C, H, W]``.
        visit: Called with each quantizer node and its inputs; weights come as one tensor.
        taps: Called with the values of their node, one for each batch.
    """
    images = list(batches)
    last_user = _last_users(captured.graph)
    shared: dict[fx.Node, Any] = {}
    values: dict[fx.Node, list[Any]] = {}
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            values[node] = images
        elif node.op == "get_attr":
            shared[node] = captured.parameter(str(node.target))
        elif node.op == "output":
            continue
        elif all(source in shared for source in node.all_input_nodes) and node.all_input_nodes:
            if is_quantizer(node):
                visit(node, [shared[node.args[0]]])
            shared[node] = _call(captured, node, shared.__getitem__)
        else:
            if is_quantizer(node):
                visit(node, values[node.args[0]])
            values[node] = [
                _call(captured, node, partial(_lookup, values, shared, index))
                for index in range(len(images))
            ]
            if taps is not None and node in taps:
                taps[node](values[node])
        for source in last_user.get(node, ()):
            values.pop(source, None)
            shared.pop(source, None)


def _lookup(
    values: Mapping[fx.Node, list[Any]],
    shared: Mapping[fx.Node, Any],
    index: int,
    node: fx.Node,
) -> Any:
    return values[node][index] if node in values else shared[node]


def _call(captured: CapturedGraph, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    arguments = fx.map_arg(node.args, value_of)
    keywords = fx.map_arg(node.kwargs, value_of)
    if node.op == "call_module":
        return captured.module.get_submodule(str(node.target))(*arguments, **keywords)
    return node.target(*arguments, **keywords)  # type: ignore[operator]


def _last_users(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node, the values that no later node reads."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    ending: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.users:
            ending.setdefault(max(node.users, key=order.__getitem__), []).append(node)
    return ending
