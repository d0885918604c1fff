"""Graphs drawn by hand, node by node: tracing would take most of the time of a small test."""

from typing import Any

import torch
from small import noise
from torch import Tensor, fx

from vitcompress.graph.captured import CapturedGraph, Provenance
from vitcompress.graph.metadata import ModulePath, TensorInfo, info, set_info
from vitcompress.quantizers import Quantizer

aten = torch.ops.aten

#: Batch at which shapes are found: no extent of a drawn graph is a multiple of it.
BATCH = 11


class Drawing:
    """A graph that grows call by call.

    Attributes:
        graph: What was drawn so far.
        images: The placeholder, ``[B, *shape]``.
        batch: The batch's extent as a node.
    """

    def __init__(self, *shape: int) -> None:
        self.graph = fx.Graph()
        self.images = self.graph.placeholder("images")
        self._tensors: dict[str, Tensor | torch.nn.Module] = {}
        self._values: dict[fx.Node, Any] = {}
        self._note(self.images, noise(BATCH, *shape, seed=1))
        self.batch = self.graph.call_function(aten.sym_size.int, (self.images, 0))
        self._values[self.batch] = BATCH

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        """Return a call of an operator."""
        node = self.graph.call_function(target, args)
        self._note(node, target(*fx.map_arg(args, self._values.__getitem__)))
        return node

    def stored(self, *shape: int, seed: int | None = None) -> fx.Node:
        """Return a stored tensor of noise, of unit gain as a weight."""
        value = noise(*shape, seed=len(self._tensors) if seed is None else seed)
        return self.tensor(value / (shape[-1] ** 0.5 if len(shape) > 1 else 1))

    def tensor(self, value: Tensor) -> fx.Node:
        """Return a stored tensor."""
        name = f"stored_{len(self._tensors)}"
        self._tensors[name] = value
        node = self.graph.get_attr(name)
        self._values[node] = value
        set_info(node, value)
        return node

    def quantized(self, value: fx.Node, quantizer: Quantizer, site: str) -> fx.Node:
        """Return a call of a quantizer, which has its parameters already."""
        quantizer.site = site
        target = f"quantizers.{site}"
        self._tensors[target] = quantizer
        node = self.graph.call_module(target, (value,))
        self._note(node, quantizer(self._values[value]))
        return node

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a value at the drawing's batch."""
        return tuple(self._values[node].shape)

    def captured(self, *outputs: fx.Node) -> CapturedGraph:
        """Return the graph that yields these values."""
        self.graph.output(outputs)
        names = ("",) if len(outputs) == 1 else tuple(f"y{i}" for i in range(len(outputs)))
        return CapturedGraph.build(self.graph, self._tensors, names, Provenance("drawn", {}))

    def _note(self, node: fx.Node, value: Any) -> None:
        self._values[node] = value
        node.meta["module"] = ModulePath("drawn", "Drawing")
        if isinstance(value, Tensor):
            shape = tuple(_extent(extent) for extent in value.shape)
            node.meta["info"] = TensorInfo(shape, "float32")
        elif isinstance(value, (tuple, list)):
            node.meta["infos"] = tuple(
                TensorInfo(tuple(_extent(extent) for extent in part.shape), "float32")
                for part in value
            )


def _extent(extent: int) -> int | str:
    times, left = divmod(extent, BATCH)
    if left:
        return extent
    return "B" if times == 1 else f"{times}*B"


def assert_same_outputs(
    before: CapturedGraph, after: CapturedGraph, *, tolerance: float = 1e-5
) -> None:
    """Compare two graphs at batches of one, of two, where extents coincide, and of three."""
    for batch in (1, 2, 3):
        x = noise(batch, *before.input_shape, seed=batch + 100)
        with torch.no_grad():
            pairs = list(zip(before.module(x), after.module(x), strict=True))
        for expected, found in pairs:
            largest = float(expected.abs().amax()) if expected.numel() else 0.0
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * largest)


def extents(node: fx.Node) -> tuple[int | str, ...]:
    """Return the shape that a node's metadata states."""
    return info(node).shape
