"""Building blocks of the lowering: nodes and constants under names that are taken once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vitcompress.export.onnx.program import DOMAIN
from vitcompress.quantizers import Quantizer

__all__ = ["Writer", "readers"]


@dataclass
class Writer:
    """Adds to one model in place.

    Attributes:
        model: Model with markers.
        quantizers: By the target their markers carry.
    """

    model: ir.Model
    quantizers: Mapping[str, Quantizer]
    _names: int = 0
    _constants: dict[tuple[Any, ...], ir.Value] = field(default_factory=dict)

    def markers(self, kind: str) -> list[ir.Node]:
        """Return the markers of a kind in graph order."""
        return [n for n in self.model.graph if (n.domain, n.op_type) == (DOMAIN, kind)]

    def quantizer(self, marker: ir.Node) -> Quantizer:
        """Return the quantizer that a marker stands for."""
        return self.quantizers[marker.attributes["target"].as_string()]

    def quantizer_of(self, value: ir.Value, kind: str) -> Quantizer | None:
        """Return the quantizer whose marker of this kind makes a value."""
        node = value.producer()
        if node is None or (node.domain, node.op_type) != (DOMAIN, kind):
            return None
        return self.quantizer(node)

    def constant(self, value: Any, name: str | None = None) -> ir.Value:
        """Return a stored tensor; unnamed ones of equal value are one."""
        array = np.asarray(value)
        if name is None:
            key = (array.dtype.str, str(array.dtype), array.shape, array.tobytes())
            if key not in self._constants:
                self._names += 1
                self._constants[key] = self._stored(array, f"c{self._names}")
            return self._constants[key]
        if name in self.model.graph.initializers:  # one tensor that serves several layers
            self._names += 1
            name = f"{name}_{self._names}"
        return self._stored(array, name)

    @staticmethod
    def is_unnamed(name: str) -> bool:
        """Return whether :meth:`constant` has invented a name."""
        return name[:1] == "c" and name[1:].isdigit()

    def _stored(self, array: NDArray[Any], name: str) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        initializer = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.model.graph.register_initializer(initializer)
        return initializer

    def add(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Put a node of one output in front of another; return the output."""
        self._names += 1
        node = ir.node(op_type, list(inputs), attributes=attributes, domain=domain)
        node.name = name or f"n{self._names}"
        node.outputs[0].name = f"v{self._names}"
        self.model.graph.insert_before(before, node)
        result: ir.Value = node.outputs[0]
        return result

    def dequantize(
        self,
        before: ir.Node,
        codes: ir.Value,
        scale: NDArray[Any],
        point: NDArray[Any] | None,
        **attributes: Any,
    ) -> ir.Value:
        """Return ``(codes - point) * scale``; ``point`` may be left out where it is 0."""
        inputs = [codes, self.constant(scale)]
        if point is not None:
            inputs.append(self.constant(point))
        return self.add(before, "DequantizeLinear", inputs, **attributes)

    def replace(self, node: ir.Node, result: ir.Value) -> None:
        """Let the readers of a marker read ``result``."""
        old = node.outputs[0]
        result.shape, result.type = old.shape, old.type
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        if result.is_graph_output():
            result.name, old.name = old.name, f"{old.name}_marker"

    def drop_dead(self) -> None:
        """Drop what nothing reads."""
        for node in reversed(list(self.model.graph)):
            if not any(out.uses() or out.is_graph_output() for out in node.outputs):
                self.model.graph.remove(node, safe=True)
        for name, value in list(self.model.graph.initializers.items()):
            if not value.uses():
                del self.model.graph.initializers[name]
        self._constants = {k: v for k, v in self._constants.items() if v.uses()}

    def slim(self) -> None:
        """Drop what no runtime reads: the exporter's remarks, and shapes inside the graph.

        They are a third of the file's structure, which at 2 bits shows beside the weights.
        """
        for node in self.model.graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                if not value.is_graph_output():
                    value.shape = value.type = None
        for value in self.model.graph.initializers.values():
            value.metadata_props.clear()
        self.model.graph.metadata_props.clear()
        self.model.graph.doc_string = None


def readers(node: ir.Node) -> list[ir.Node]:
    """Return the nodes that read a node's first output."""
    return [use.node for use in node.outputs[0].uses()]
