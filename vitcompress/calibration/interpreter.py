"""Running a graph node by node: taps on values, quantizers off, whole data sets in step."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from vitcompress.graph import ops
from vitcompress.graph.captured import CapturedGraph
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import node_argument
from vitcompress.graph.ops import is_op

__all__ = ["Visit", "run", "walk"]

Tap = Callable[[Tensor], None]
Replacement = Callable[[Tensor], Tensor]
Visit = Callable[[fx.Node, list[Tensor]], None]


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
    visit: Visit,
    *,
    taps: Mapping[fx.Node, Callable[[list[Tensor]], None]] | None = None,
) -> None:
    """Run all batches through the graph in step, node by node.

    Before each quantizer, linear and convolution ``visit`` sees the values of *all* batches
    that are its first argument, and may set the quantizer's parameters or replace stored
    tensors. So every node is dealt with on the output of those before it: sequential
    calibration in one pass over the data. Memory holds the live values of all batches at once,
    which grows with the number of images and not with depth.

    Args:
        captured: Graph to run.
        batches: Images of each batch, ``[B, C, H, W]``.
        visit: Called with the node and its inputs; a weight comes as one tensor.
        taps: Called with the values of their node, one for each batch.
    """
    stream = _Stream(captured, list(batches))
    for node in list(captured.graph.nodes):
        if is_quantizer(node) or is_op(node, ops.LINEAR, ops.CONV):
            visit(node, stream.inputs(node))
        stream.step(node)
        if taps is not None and node in taps:
            taps[node](stream.values[node])


class _Stream:
    """The values of all batches, as far as later nodes read them."""

    def __init__(self, captured: CapturedGraph, images: list[Tensor]) -> None:
        self.captured = captured
        self.images = images
        self.values: dict[fx.Node, list[Any]] = {}
        # Nodes that depend on stored tensors alone are computed when they are read: whoever
        # visits a node may have replaced what it reads.
        self.constants: set[fx.Node] = set()
        self.last_user = _last_users(captured.graph)

    def inputs(self, node: fx.Node) -> list[Tensor]:
        """Return the first argument of a node: one for each batch, or the one constant."""
        source = node_argument(node, 0)
        return [self._constant(source)] if source in self.constants else self.values[source]

    def step(self, node: fx.Node) -> None:
        """Compute a node for all batches, and drop what no later node reads."""
        if node.op == "placeholder":
            self.values[node] = self.images
        elif node.op == "get_attr" or (
            node.all_input_nodes and self.constants.issuperset(node.all_input_nodes)
        ):
            self.constants.add(node)
        elif node.op != "output":
            read = {n: self._constant(n) for n in node.all_input_nodes if n in self.constants}
            self.values[node] = [
                self._call(node, partial(self._lookup, read, index))
                for index in range(len(self.images))
            ]
        for source in self.last_user.get(node, ()):
            self.values.pop(source, None)

    def _constant(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self.captured.parameter(str(node.target))
        return self._call(node, self._constant)

    def _lookup(self, read: Mapping[fx.Node, Any], index: int, node: fx.Node) -> Any:
        return read[node] if node in read else self.values[node][index]

    def _call(self, node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
        arguments = fx.map_arg(node.args, value_of)
        keywords = fx.map_arg(node.kwargs, value_of)
        if node.op == "call_module":
            module = self.captured.module.get_submodule(str(node.target))
            return module(*arguments, **keywords)
        return node.target(*arguments, **keywords)  # type: ignore[operator]


def _last_users(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node, the values that no later node reads."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    ending: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.users:
            ending.setdefault(max(node.users, key=order.__getitem__), []).append(node)
    return ending
