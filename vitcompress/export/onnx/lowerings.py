"""What the markers become: the linear layers and attention, and in which order.

Facts behind the spellings (measured, see the deployment notes in the documentation): a linear
runs as integers in onnxruntime only as ``Gemm`` whose inputs all come straight from a
``DequantizeLinear``, the int32 bias included.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from vitcompress.export.onnx.activations import Activations
from vitcompress.export.onnx.storage import Weights
from vitcompress.export.onnx.support import bias_codes, stored_rows
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
        for kind, lower in (
            ("Attention", self._attention),
            ("Linear", self._linear),
            ("Weight", self.weights.lower),
            ("Quantize", self.activations.lower),
        ):
            for node in self.writer.markers(kind):
                lower(node)

    # Linear layers

    def _linear(self, node: ir.Node) -> None:
        path = node.attributes["target"].as_string()
        reason = self._reason_against_integers(node)
        self.linears.append(path)
        if reason is not None:
            self.reasons[path] = reason
        written = (
            self._gemm if reason is None and self.target.linear == "gemm" else self._matmul
        )
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
        shape = x.shape
        if shape is None or sum(not isinstance(extent, int) for extent in shape) > 1:
            return "several extents of its input are unknown"
        return None

    def _gemm(self, node: ir.Node, path: str) -> ir.Value:
        """Write Q, DQ, Gemm with int32 bias; float output."""
        writer, x, weight = self.writer, node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        assert x is not None
        assert weight is not None
        quantizer = writer.quantizer_of(x, "Quantize")
        stored = writer.quantizer_of(weight, "Weight")
        assert isinstance(quantizer, Affine)
        assert isinstance(stored, Affine)
        producer = x.producer()
        assert producer is not None
        codes = self.activations.codes(producer, quantizer)
        extents = [e if isinstance(e, int) else -1 for e in x.shape or ()]
        if len(extents) > 2:
            rows = writer.constant(np.array([-1, extents[-1]], dtype=np.int64))
            codes = writer.add(node, "Reshape", [codes, rows])
        operand = writer.dequantize(node, codes, *self.activations.scale(quantizer))
        inputs = [operand, self.weights.value(weight)]
        float_bias: ir.Value | None = None
        if bias is not None:
            integer = self._int32_bias(node, bias, quantizer, stored)
            if integer is None:
                float_bias = bias
            else:
                inputs.append(integer)
        result = writer.add(node, "Gemm", inputs, name=path, transB=1)
        if float_bias is not None:
            result = writer.add(node, "Add", [result, float_bias])
        # onnxruntime fuses a Gemm with a Relu right behind it, and then runs it in float; a
        # reshape, which does nothing, stands between.
        if len(extents) > 2 or any(user.op_type == "Relu" for user in readers(node)):
            out = np.array([*extents[:-1], stored_rows(weight)], np.int64)
            result = writer.add(node, "Reshape", [result, writer.constant(out)])
        return result

    def _int32_bias(
        self, node: ir.Node, bias: ir.Value, quantizer: Affine, stored: Affine
    ) -> ir.Value | None:
        """Return the bias in steps of ``s_x s_w``, or ``None`` where those cannot express it.

        It is whole steps after the pass ``integer_bias``. Rounding it here instead would make
        the file compute something else than the graph.
        """
        assert bias.const_value is not None
        found = bias_codes(bias.const_value.numpy(), quantizer, stored)
        if found is None:
            return None
        codes, scale = found
        integer = self.writer.constant(codes, f"{bias.name}.int32")
        return self.writer.dequantize(node, integer, scale, None, axis=0)

    def _matmul(self, node: ir.Node, path: str) -> ir.Value:
        writer, weight = self.writer, node.inputs[1]
        assert weight is not None
        stored = self.weights.value(weight, transposed=True)
        result = writer.add(node, "MatMul", [node.inputs[0], stored], name=path)
        if len(node.inputs) > 2:
            result = writer.add(node, "Add", [result, node.inputs[2]])
        return result

    # Attention

    def _attention(self, node: ir.Node) -> None:
        query, key, value, *bias = node.inputs
        inputs = [query, key, value, None, None, *bias]
        attributes: dict[str, Any] = {
            "num_heads": node.attributes["num_heads"].as_int(),
            "scale": node.attributes["scale"].as_float(),
        }
        path = f"{node.attributes['target'].as_string()}:attention"
        self.model.opset_imports[CONTRIB] = 1
        result = self.writer.add(
            node,
            "MultiHeadAttention",
            inputs if bias else inputs[:3],
            name=path,
            domain=CONTRIB,
            **attributes,
        )
        self.writer.replace(node, result)
