"""The captured program with its tensors: copied, inspected, edited and run as one object."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from vitcompress.errors import InputError, UnsupportedModelError
from vitcompress.graph.metadata import info, set_info

__all__ = ["QUANTIZER_PREFIX", "CapturedGraph", "OutputDict", "Provenance"]

#: Quantizer modules live under this name, one child for each.
QUANTIZER_PREFIX = "quantizers."


@dataclass(frozen=True)
class Provenance:
    """Where a graph came from.

    Attributes:
        model: What the user called it, e.g. ``timm/NAME`` or a class name.
        versions: Library name to version, as of the capture.
    """

    model: str
    versions: dict[str, str]


class OutputDict(dict[str, Tensor]):
    """Named outputs of a model with several, readable as attributes: ``out.logits``."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output '{name}'; there are {sorted(self)}") from None


class CapturedGraph:
    """A model as one FX graph in normalised export IR.

    The graph has one image input and flat outputs. Parameters are buffers under the names they
    had in the model. They are replaced, never written in place: clones share tensors.

    Attributes:
        module: The graph with its tensors and quantizers.
        output_names: One for each output; a single ``""`` if the model returned a bare tensor.
        provenance: Where it came from.
    """

    def __init__(
        self, module: fx.GraphModule, output_names: tuple[str, ...], provenance: Provenance
    ) -> None:
        self.module = module
        self.output_names = output_names
        self.provenance = provenance

    @classmethod
    def build(
        cls,
        graph: fx.Graph,
        attributes: Mapping[str, Tensor | nn.Module],
        output_names: tuple[str, ...],
        provenance: Provenance,
    ) -> "CapturedGraph":
        """Return a captured graph that owns ``graph`` and the attributes it refers to."""
        used = {n.target for n in graph.nodes if n.op in ("get_attr", "call_module")}
        root = {name: value for name, value in attributes.items() if name in used}
        return cls(fx.GraphModule(root, graph, "CapturedModel"), output_names, provenance)

    @property
    def graph(self) -> fx.Graph:
        """The FX graph; call :meth:`recompile` after editing it."""
        return self.module.graph

    @property
    def input_node(self) -> fx.Node:
        """The placeholder of the images."""
        found: fx.Node = next(iter(self.graph.find_nodes(op="placeholder")))
        return found

    @property
    def output_node(self) -> fx.Node:
        """The output node; its argument is a tuple of nodes."""
        return self.graph.output_node()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``(C, H, W)`` of the images."""
        return tuple(int(extent) for extent in info(self.input_node).shape[1:])

    def example(self, batch: int = 2, seed: int = 0) -> Tensor:
        """Return seeded normal noise of the input's shape, ``[batch, C, H, W]`` float32."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, *self.input_shape, generator=generator)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor the graph refers to, by name, in order of first use."""
        names = dict.fromkeys(str(n.target) for n in self.graph.find_nodes(op="get_attr"))
        return {name: self.parameter(name) for name in names}

    def parameter(self, name: str) -> Tensor:
        """Return the tensor called ``name``.

        Raises:
            KeyError: There is none.
        """
        path, _, leaf = name.rpartition(".")
        try:
            value = getattr(self.module.get_submodule(path), leaf)
        except AttributeError:
            raise KeyError(name) from None
        if not isinstance(value, Tensor):
            raise KeyError(name)
        return value

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Replace the tensor called ``name``, or create it."""
        path, _, leaf = name.rpartition(".")
        owner: nn.Module = self.module
        for part in path.split(".") if path else []:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if hasattr(owner, leaf):
            delattr(owner, leaf)
        owner.register_buffer(leaf, value.detach())
        for node in self.graph.find_nodes(op="get_attr", target=name):
            set_info(node, value)

    def quantizers(self) -> dict[str, nn.Module]:
        """Return the quantizer modules of the graph by their target, in graph order."""
        targets = dict.fromkeys(
            str(n.target)
            for n in self.graph.nodes
            if n.op == "call_module" and str(n.target).startswith(QUANTIZER_PREFIX)
        )
        return {target: self.module.get_submodule(target) for target in targets}

    def clone(self) -> "CapturedGraph":
        """Return an independent graph that shares this one's tensors but no quantizer."""
        graph = fx.Graph()
        outputs = graph.graph_copy(self.graph, {})
        output = graph.output(outputs)
        output.meta = copy.copy(self.output_node.meta)
        attributes: dict[str, Any] = dict(self.tensors())
        attributes.update({t: copy.deepcopy(q) for t, q in self.quantizers().items()})
        return CapturedGraph.build(graph, attributes, self.output_names, self.provenance)

    def recompile(self) -> None:
        """Drop dead nodes and unused tensors, lint, and generate the code anew."""
        self.graph.eliminate_dead_code(
            is_impure_node=lambda n: n.op in ("placeholder", "output")
        )
        self.module.delete_all_unused_submodules()
        self.graph.lint()
        self.module.recompile()

    def check(self) -> None:
        """Run the graph once on noise.

        Raises:
            UnsupportedModelError: An output holds values that are not finite.
        """
        with torch.no_grad():
            outputs = self.module(self.example())
        for name, value in zip(self.output_names, outputs, strict=True):
            if not torch.isfinite(value).all():
                label = f"output '{name}'" if name else "the output"
                raise UnsupportedModelError(
                    f"{self.provenance.model}: {label} is not finite on unit normal noise; "
                    "look for NaN or overflowing weights"
                )

    def check_images(self, images: Tensor) -> None:
        """Check that images have the size the graph was captured at.

        Raises:
            InputError: They have another.
        """
        if tuple(images.shape[1:]) != self.input_shape:
            raise InputError(
                f"{self.provenance.model}: expected images of {_extents(self.input_shape)}, "
                f"found {_extents(images.shape[1:])}"
            )

    def __call__(self, images: Tensor) -> Tensor | OutputDict:
        """Return the model's output for images ``[B, C, H, W]``: one tensor, or named ones."""
        self.check_images(images)
        return self.wrap(self.module(images))

    def wrap(self, outputs: tuple[Tensor, ...]) -> Tensor | OutputDict:
        """Return flat outputs in the form the model returned them."""
        if self.output_names == ("",):
            return outputs[0]
        return OutputDict(zip(self.output_names, outputs, strict=True))

    def logits(self, images: Tensor) -> Tensor:
        """Return the classifier's output, ``[B, O]``: the one called logits, or the first."""
        self.check_images(images)
        outputs: tuple[Tensor, ...] = self.module(images)
        index = self.output_names.index("logits") if "logits" in self.output_names else 0
        return outputs[index]

    def nodes_of_kind(self, op: str) -> Iterator[fx.Node]:
        """Yield the nodes with the given FX opcode, in graph order."""
        return (node for node in self.graph.nodes if node.op == op)


def _extents(shape: tuple[int, ...]) -> str:
    return "x".join(str(extent) for extent in shape)
