"""What the markers become: linears, products and attention, and in which order.

Facts behind the spellings (measured): between ``QuantizeLinear`` and ``DequantizeLinear`` a
linear runs as integers in onnxruntime only as ``Gemm`` with an int32 bias, which needs a
reshape on both sides; ``MatMulIntegerToFloat`` needs neither.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from vitcompress.export.onnx.activations import Activations
from vitcompress.export.onnx.program import DOMAIN
from vitcompress.export.onnx.storage import Weights
from vitcompress.export.onnx.targets import Target
from vitcompress.export.onnx.writer import Writer, readers
from vitcompress.quantizers import Affine, PerGroup, PerTensor, Quantizer

__all__ = ["Lowering"]

#: Domain of onnxruntime's own operators.
CONTRIB = "com.microsoft"


@dataclass
class Lowering:
    """Replaces the markers of one model.

    Attributes:
        model: Model to edit in place.
        quantizers: By the target their markers carry.
        target: How to spell.
        linears: Names of the quantized linears.
        reasons: Why some of them are not to be expected among the integer products.
    """

    model: ir.Model
    quantizers: Mapping[str, Quantizer]
    target: Target
    linears: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.writer = Writer(self.model, self.quantizers)
        self.weights = Weights(self.writer, self.target)
        self.activations = Activations(self.writer, self.target)

    def run(self) -> None:
        """Lower every marker, linears first: they decide how their operands are spelled."""
        for kind, lower in (("Attention", self._attention), ("Linear", self._linear)):
            self._lower(self.writer.markers(kind), lower)
        if self.target.linear == "integer":
            products = [n for n in self.model.graph if (n.domain, n.op_type) == ("", "MatMul")]
            self._lower(products, self._product)
        for kind, lower in (
            ("Weight", self.weights.lower),
            ("Quantize", self.activations.lower),
        ):
            self._lower(self.writer.markers(kind), lower)
        self.model.opset_imports.pop(DOMAIN, None)

    def _lower(self, nodes: list[ir.Node], lower: Callable[[ir.Node], None]) -> None:
        for node in nodes:
            lower(node)
        self.writer.drop_dead()  # what was replaced is no reader of what comes next

    # Linear layers

    def _linear(self, node: ir.Node) -> None:
        path = node.attributes["target"].as_string()
        reason = self._reason_against_integers(node)
        self.linears.append(path)
        if reason is not None:
            self.reasons[path] = reason
        integer = reason is None and self.target.linear == "integer"
        written = self._integer_product if integer else self._matmul
        self.writer.replace(node, written(node, path))

    def _reason_against_integers(self, node: ir.Node) -> str | None:
        x, weight = node.inputs[0], node.inputs[1]
        assert x is not None
        assert weight is not None
        quantizer = self.writer.quantizer_of(x, "Quantize")
        if quantizer is None:
            return "its input is not quantized"
        if (
            not isinstance(quantizer, Affine)
            or type(quantizer.spec.granularity) is not PerTensor
        ):
            return f"its input is quantized as {quantizer.spec.describe()}"
        stored = self.writer.quantizer_of(weight, "Weight")
        assert stored is not None
        if isinstance(stored.spec.granularity, PerGroup):
            return f"its weight is quantized as {stored.spec.describe()}"
        return None

    def _integer_product(self, node: ir.Node, path: str) -> ir.Value:
        """Write Q and onnxruntime's product of uint8 and int8 with float output."""
        x, weight, *bias = node.inputs
        assert x is not None
        assert weight is not None
        quantizer, producer = self.writer.quantizer_of(x, "Quantize"), x.producer()
        assert isinstance(quantizer, Affine)
        assert producer is not None
        codes = self.activations.codes(producer, quantizer)
        stored, *parameters = self.weights.integers(weight)
        pairs = zip(self.activations.scale(quantizer), parameters, strict=True)
        operands = [self.writer.constant(value) for pair in pairs for value in pair]
        self.model.opset_imports[CONTRIB] = 1
        return self.writer.add(
            node,
            "MatMulIntegerToFloat",
            [codes, stored, *operands, *bias],
            name=path,
            domain=CONTRIB,
        )

    def _matmul(self, node: ir.Node, path: str) -> ir.Value:
        writer, weight = self.writer, node.inputs[1]
        assert weight is not None
        quantizer = writer.quantizer_of(weight, "Weight")
        assert quantizer is not None
        if isinstance(quantizer.spec.granularity, PerGroup):
            # onnxruntime takes scales by blocks in front of a product for scales by columns.
            stored = writer.add(node, "Transpose", [self.weights.value(weight)], perm=[1, 0])
        elif path in self.reasons:
            stored = self.weights.folded(node, weight)
        else:
            stored = self.weights.value(weight, transposed=True)
        result = writer.add(node, "MatMul", [node.inputs[0], stored], name=path)
        if len(node.inputs) > 2:
            result = writer.add(node, "Add", [result, node.inputs[2]])
        return result

    # Products of activations

    def _product(self, node: ir.Node) -> None:
        """Write a product of two quantized activations as integers."""
        operands = []
        for value in node.inputs:
            assert value is not None
            quantizer = self.writer.quantizer_of(value, "Quantize")
            if (
                not isinstance(quantizer, Affine)
                or type(quantizer.spec.granularity) is not PerTensor
            ):
                return
            producer = value.producer()
            assert producer is not None
            operands.append((producer, quantizer))
        codes, scales, points = [], [], []
        for right, (producer, quantizer) in enumerate(operands):
            codes.append(self.activations.codes(producer, quantizer, right=bool(right)))
            scale, point = self.activations.scale(quantizer, right=bool(right))
            scales.append(scale)
            points.append(point)
        result, factor = _scaled(node)
        scales[0] = scales[0] * np.float32(factor)
        parameters = [self.writer.constant(value) for value in (*scales, *points)]
        self.model.opset_imports[CONTRIB] = 1
        product = self.writer.add(
            node,
            "MatMulIntegerToFloat",
            [*codes, *parameters],
            name=node.name,
            domain=CONTRIB,
        )
        self.writer.replace(result, product)

    # Attention

    def _attention(self, node: ir.Node) -> None:
        attributes: dict[str, Any] = {"scale": node.attributes["scale"].as_float()}
        if "num_heads" in node.attributes:
            for side in ("q", "kv"):
                attributes[f"{side}_num_heads"] = node.attributes["num_heads"].as_int()
        path = f"{node.attributes['target'].as_string()}:attention"
        result = self.writer.add(node, "Attention", node.inputs, name=path, **attributes)
        self.writer.replace(node, result)


def _scaled(node: ir.Node) -> tuple[ir.Node, float]:
    """Return the multiplication by a number behind a product, if nothing else reads it."""
    found = readers(node)
    if node.outputs[0].is_graph_output() or len(found) != 1 or found[0].op_type != "Mul":
        return node, 1.0
    factors = [v.const_value for v in found[0].inputs if v is not None and v.const_value]
    if len(factors) != 1 or factors[0].size != 1:
        return node, 1.0
    return found[0], float(factors[0].numpy().item())
