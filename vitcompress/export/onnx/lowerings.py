"""What the markers become: one function for each number format and for the linear layer.

Facts behind the spellings (measured, see the deployment notes in the documentation): a linear
runs as integers in onnxruntime only as ``Gemm`` whose inputs all come straight from a
``DequantizeLinear``, the int32 bias included; INT4 weights only behind a ``Cast`` to INT8,
which is folded when the session is made; a signed left operand is many times slower than an
unsigned one, so activations are stored as uint8 whatever their sign.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vitcompress.export.onnx.program import DOMAIN
from vitcompress.export.onnx.support import axis_of, bias_codes, half_range, stored_rows
from vitcompress.export.onnx.targets import Target
from vitcompress.quantizers import (
    AdaLog,
    Affine,
    Log2,
    PerGroup,
    PerTensor,
    Quantizer,
)

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
        not_gemm: Linears that are no integer ``Gemm``, with the reason.
        gemms: Names of linears written as ``Gemm`` between quantized operands.
        codes: Name of the value that holds the codes of each activation quantizer, by target.
    """

    model: ir.Model
    quantizers: Mapping[str, Quantizer]
    target: Target
    not_gemm: dict[str, str] = field(default_factory=dict)
    gemms: list[str] = field(default_factory=list)
    codes: dict[str, str] = field(default_factory=dict)
    _codes: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _values: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _names: int = 0

    def run(self) -> None:
        """Lower every marker, linears first: they decide how their operands are spelled."""
        for kind, lower in (
            ("Attention", self._attention),
            ("Linear", self._linear),
            ("Weight", self._weight_marker),
            ("Quantize", self._quantize_marker),
        ):
            for node in [
                n for n in self.model.graph if (n.domain, n.op_type) == (DOMAIN, kind)
            ]:
                lower(node)
        self._drop_dead_nodes()
        self.model.opset_imports.pop(DOMAIN, None)

    # Linear layers

    def _linear(self, node: ir.Node) -> None:
        path = node.attributes["target"].as_string()
        reason = self._reason_against_gemm(node)
        if reason is None and self.target.linear == "gemm":
            result = self._gemm(node, path)
            self.gemms.append(path)
        else:
            self.not_gemm[path] = reason or f"target {self.target.name} writes MatMul and Add"
            result = self._matmul(node, path)
        self._replace(node, result)

    def _reason_against_gemm(self, node: ir.Node) -> str | None:
        x, weight = node.inputs[0], node.inputs[1]
        assert x is not None
        assert weight is not None
        quantizer = self._marker_quantizer(x, "Quantize")
        if quantizer is None:
            return "its input is not quantized"
        if (
            not isinstance(quantizer, Affine)
            or type(quantizer.spec.granularity) is not PerTensor
        ):
            return f"its input is quantized as {quantizer.spec.describe()}"
        stored = self._marker_quantizer(weight, "Weight")
        assert stored is not None
        if isinstance(stored.spec.granularity, PerGroup):
            return f"its weight is quantized as {stored.spec.describe()}"
        shape = x.shape
        if shape is None or sum(not isinstance(extent, int) for extent in shape) > 1:
            return "several extents of its input are unknown"
        return None

    def _gemm(self, node: ir.Node, path: str) -> ir.Value:
        """Write Q, DQ, Gemm with int32 bias; float output."""
        x, weight = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        assert x is not None
        assert weight is not None
        quantizer, stored = (
            self._marker_quantizer(x, "Quantize"),
            self._marker_quantizer(weight, "Weight"),
        )
        assert isinstance(quantizer, Affine)
        assert isinstance(stored, Affine)
        producer = x.producer()
        assert producer is not None
        codes = self._activation_codes(producer, quantizer)
        extents = [e if isinstance(e, int) else -1 for e in x.shape or ()]
        if len(extents) > 2:
            rows = self._constant(np.array([-1, extents[-1]], dtype=np.int64))
            codes = self._add(node, "Reshape", [codes, rows])
        operand = self._dequantize(node, codes, *self._activation_scale(quantizer))
        inputs = [operand, self._weight_value(weight)]
        float_bias: ir.Value | None = None
        if bias is not None:
            integer = self._int32_bias(node, bias, quantizer, stored)
            if integer is None:
                float_bias = bias
            else:
                inputs.append(integer)
        result = self._add(node, "Gemm", inputs, name=path, transB=1)
        if float_bias is not None:
            result = self._add(node, "Add", [result, float_bias])
        # onnxruntime fuses a Gemm with a Relu right behind it, and then runs it in float; a
        # reshape, which does nothing, stands between.
        if len(extents) > 2 or any(user.op_type == "Relu" for user in _readers(node)):
            out = [*extents[:-1], stored_rows(weight)]
            result = self._add(
                node, "Reshape", [result, self._constant(np.array(out, np.int64))]
            )
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
        integer = self._constant(codes, f"{bias.name}.int32")
        return self._add(node, "DequantizeLinear", [integer, self._constant(scale)], axis=0)

    def _matmul(self, node: ir.Node, path: str) -> ir.Value:
        weight = node.inputs[1]
        assert weight is not None
        transposed = self._add(node, "Transpose", [self._weight_value(weight)], perm=[1, 0])
        result = self._add(node, "MatMul", [node.inputs[0], transposed], name=path)
        if len(node.inputs) > 2:
            result = self._add(node, "Add", [result, node.inputs[2]])
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
        result = self._add(
            node,
            "MultiHeadAttention",
            inputs if bias else inputs[:3],
            name=path,
            domain=CONTRIB,
            **attributes,
        )
        self._replace(node, result)

    # Weights

    def _weight_marker(self, node: ir.Node) -> None:
        if node.outputs[0].uses():
            self._replace(node, self._weight_value(node.outputs[0]))

    def _weight_value(self, value: ir.Value) -> ir.Value:
        """Return the float weight: container, ``Cast`` if the target wants it, ``DQ``."""
        if value in self._values:
            return self._values[value]
        node = value.producer()
        assert node is not None
        stored = node.inputs[0]
        assert stored is not None
        assert stored.const_value is not None
        quantizer = self.quantizers[node.attributes["target"].as_string()]
        assert isinstance(quantizer, Affine)
        offset = 0 if quantizer.spec.symmetric else half_range(quantizer)
        codes = stored.const_value.numpy().astype(np.int16) - offset
        points = quantizer.zero_point.numpy().astype(np.int16) - offset
        bits = quantizer.spec.bits
        low_bit = bits <= 4
        direct = self.target.low_bit_weights == "direct" and bits in (3, 4)
        container: Any = np.int8 if not low_bit else ml_dtypes.int4
        if bits == 2 and self.target.low_bit_weights == "cast":
            container = ml_dtypes.int2
        name = stored.name or "weight"
        weight = self._constant(codes.astype(np.int8).astype(container), f"{name}.codes")
        if low_bit and not direct:
            weight = self._add(node, "Cast", [weight], to=int(ir.DataType.INT8))
        point_type = ml_dtypes.int4 if low_bit and direct else np.int8
        result = self._dequantize(
            node,
            weight,
            quantizer.scale.numpy(),
            points.astype(np.int8).astype(point_type),
            **axis_of(quantizer),
        )
        self._values[value] = result
        return result

    # Activations

    def _quantize_marker(self, node: ir.Node) -> None:
        if not node.outputs[0].uses():
            return
        quantizer = self.quantizers[node.attributes["target"].as_string()]
        if isinstance(quantizer, Log2):
            result = self._log_table(node, quantizer)
        else:
            assert isinstance(quantizer, Affine)
            codes = self._activation_codes(node, quantizer)
            result = self._activation_value(node, codes, quantizer)
        self._replace(node, result)

    def _activation_value(self, node: ir.Node, codes: ir.Value, quantizer: Affine) -> ir.Value:
        """Return the float activation; several scales by plain arithmetic.

        onnxruntime fuses a product of two ``DequantizeLinear`` whatever their axes, into a
        kernel that then refuses to run with a left operand of several scales.
        """
        scale, point = self._activation_scale(quantizer)
        if type(quantizer.spec.granularity) is PerTensor:
            return self._dequantize(node, codes, scale, point)
        shape = self._parameter_shape(node.outputs[0], quantizer)
        value = self._add(node, "Cast", [codes], to=int(ir.DataType.FLOAT))
        zero = self._constant(point.astype(np.float32).reshape(shape))
        value = self._add(node, "Sub", [value, zero])
        return self._add(node, "Mul", [value, self._constant(scale.reshape(shape))])

    def _parameter_shape(self, value: ir.Value, quantizer: Affine) -> list[int]:
        """Return the shape in which one parameter per channel or head fits a value."""
        rank, axis = len(value.shape or ()), axis_of(quantizer)["axis"]
        return [-1 if position == axis % rank else 1 for position in range(rank)]

    def _activation_codes(self, node: ir.Node, quantizer: Affine) -> ir.Value:
        """Return uint8 codes; narrower ones through a clip to what they can represent."""
        marked = node.outputs[0]
        if marked in self._codes:
            return self._codes[marked]
        value = node.inputs[0]
        scale, point = self._activation_scale(quantizer)
        if quantizer.spec.bits < 8:
            value = self._clip(node, value, quantizer)
        codes = self._add(
            node,
            "QuantizeLinear",
            [value, self._constant(scale), self._constant(point)],
            name=quantizer.site,
            **axis_of(quantizer),
        )
        self._codes[marked] = codes
        self._note_codes(node, codes)
        return codes

    def _clip(self, node: ir.Node, value: ir.Value | None, quantizer: Affine) -> ir.Value:
        qmin, qmax = quantizer.bounds
        ends = [
            ((code - quantizer.zero_point) * quantizer.scale).numpy().astype(np.float32)
            for code in (qmin, qmax)
        ]
        if type(quantizer.spec.granularity) is PerTensor:
            return self._add(node, "Clip", [value, *(self._constant(end) for end in ends)])
        assert value is not None
        shape = self._parameter_shape(value, quantizer)
        low, high = (self._constant(end.reshape(shape)) for end in ends)
        return self._add(node, "Min", [self._add(node, "Max", [value, low]), high])

    def _activation_scale(self, quantizer: Affine) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return scale, and the zero point for codes that start at 0."""
        qmin, _ = quantizer.bounds
        return quantizer.scale.numpy(), (quantizer.zero_point - qmin).numpy().astype(np.uint8)

    def _log_table(self, node: ir.Node, quantizer: Log2) -> ir.Value:
        """Encode by a logarithm, decode by looking the code up in a table of ``2^bits``."""
        table = quantizer.table()
        factor = np.float32(-quantizer.steps_per_octave / np.log(2.0))
        value = node.inputs[0]
        if isinstance(quantizer, AdaLog):
            value = self._add(node, "Add", [value, self._constant(quantizer.shift.numpy())])
        positive = self._add(node, "Relu", [value])
        ratio = self._add(node, "Div", [positive, self._constant(quantizer.scale.numpy())])
        log = self._add(node, "Log", [ratio])
        steps = self._add(node, "Mul", [log, self._constant(factor)])
        rounded = self._add(node, "Round", [steps])
        last = np.float32(len(table) - 1)
        bounds = [self._constant(np.float32(0.0)), self._constant(last)]
        clipped = self._add(node, "Clip", [rounded, *bounds])
        codes = self._add(
            node, "Cast", [clipped], name=quantizer.site, to=int(ir.DataType.INT32)
        )
        self._note_codes(node, codes)
        return self._add(node, "Gather", [self._constant(table.numpy()), codes], axis=0)

    def _note_codes(self, node: ir.Node, codes: ir.Value) -> None:
        assert codes.name is not None
        self.codes[node.attributes["target"].as_string()] = codes.name

    # Building blocks

    def _dequantize(
        self,
        node: ir.Node,
        codes: ir.Value,
        scale: NDArray[Any],
        point: NDArray[Any],
        **attributes: Any,
    ) -> ir.Value:
        inputs = [codes, self._constant(scale), self._constant(point)]
        return self._add(node, "DequantizeLinear", inputs, **attributes)

    def _marker_quantizer(self, value: ir.Value, kind: str) -> Quantizer | None:
        node = value.producer()
        if node is None or (node.domain, node.op_type) != (DOMAIN, kind):
            return None
        return self.quantizers[node.attributes["target"].as_string()]

    def _constant(self, value: Any, name: str | None = None) -> ir.Value:
        self._names += 1
        name = name or f"constant_{self._names}"
        if name in self.model.graph.initializers:  # one tensor that serves several layers
            name = f"{name}_{self._names}"
        tensor = ir.tensor(np.asarray(value), name=name)
        initializer = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.model.graph.register_initializer(initializer)
        return initializer

    def _add(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        self._names += 1
        node = ir.node(op_type, list(inputs), attributes=attributes, domain=domain)
        node.name = name or f"{op_type}_{self._names}"
        node.outputs[0].name = f"{node.name}_output"
        self.model.graph.insert_before(before, node)
        result: ir.Value = node.outputs[0]
        return result

    def _replace(self, node: ir.Node, result: ir.Value) -> None:
        old = node.outputs[0]
        result.shape, result.type = old.shape, old.type
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        if result.is_graph_output():
            result.name, old.name = old.name, f"{old.name}_marker"

    def _drop_dead_nodes(self) -> None:
        for node in reversed(list(self.model.graph)):
            if not any(out.uses() or out.is_graph_output() for out in node.outputs):
                self.model.graph.remove(node, safe=True)
        for name, value in list(self.model.graph.initializers.items()):
            if not value.uses():
                del self.model.graph.initializers[name]


def _readers(node: ir.Node) -> list[ir.Node]:
    return [use.node for use in node.outputs[0].uses()]
