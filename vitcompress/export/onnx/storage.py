"""How quantized weights are stored, and how a file makes floats of them.

Measured, see the deployment notes in the documentation: INT4 and INT2 weights run as integers
only behind a ``Cast`` to INT8, which runtimes fold when they load.
"""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcompress.export.onnx.support import axis_of, half_range
from vitcompress.export.onnx.targets import Target
from vitcompress.export.onnx.writer import Writer
from vitcompress.quantizers import Affine, PerGroup

__all__ = ["Weights"]


@dataclass
class Weights:
    """Writes the stored weights of one model.

    Attributes:
        writer: Of the model.
        target: How to spell.
    """

    writer: Writer
    target: Target
    _values: dict[tuple[ir.Value, bool], ir.Value] = field(default_factory=dict)
    _integers: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def lower(self, node: ir.Node) -> None:
        """Replace a marker that readers without a spelling of their own have left."""
        if node.outputs[0].uses():
            self.writer.replace(node, self.value(node.outputs[0]))

    def value(self, marked: ir.Value, *, transposed: bool = False) -> ir.Value:
        """Return the float weight: container, ``Cast`` if the target wants it, ``DQ``.

        Args:
            marked: What a marker makes.
            transposed: Store a weight of two axes as ``[I, O]``, the operand of a product.
        """
        if (marked, transposed) not in self._values:
            node = marked.producer()
            assert node is not None
            self._values[marked, transposed] = self._written(node, transposed)
        return self._values[marked, transposed]

    def integers(self, marked: ir.Value) -> tuple[ir.Value, NDArray[Any], NDArray[Any]]:
        """Return ``[I, O]`` INT8 codes behind their container, scales, INT8 zero points."""
        node = marked.producer()
        assert node is not None
        name, quantizer, codes, points = self._stored(node)
        if marked not in self._integers:
            weight = self._codes(name, codes.numpy().T, quantizer)
            if weight.dtype != ir.DataType.INT8:
                weight = self._cast(node, weight, ir.DataType.INT8)
            self._integers[marked] = weight
        return self._integers[marked], quantizer.scale.numpy(), points.astype(np.int8)

    def folded(self, before: ir.Node, marked: ir.Value) -> ir.Value:
        """Return the float weight, ``[I, O]``, by plain arithmetic, which runtimes fold.

        In front of a product of floats onnxruntime takes ``DequantizeLinear`` of 8-bit codes
        for leave to round the other operand to 8 bits as well (``MatMulNBits``).
        """
        codes, scale, points = self.integers(marked)
        value = self._cast(before, codes, ir.DataType.FLOAT)
        if points.any():
            zero = self.writer.constant(points.astype(np.float32))
            value = self.writer.add(before, "Sub", [value, zero])
        return self.writer.add(before, "Mul", [value, self.writer.constant(scale)])

    def _stored(self, node: ir.Node) -> tuple[str, Affine, Tensor, NDArray[Any]]:
        """Return a weight's name, quantizer, signed codes of its width, and zero points."""
        stored = node.inputs[0]
        assert stored is not None
        assert stored.const_value is not None
        quantizer = self.writer.quantizer(node)
        assert isinstance(quantizer, Affine)
        offset = 0 if quantizer.spec.symmetric else half_range(quantizer)
        codes = torch.from_numpy(stored.const_value.numpy().copy()).short() - offset
        points = (quantizer.zero_point - offset).numpy().astype(np.int32)
        return f"{stored.name or 'weight'}.codes", quantizer, codes, points

    def _written(self, node: ir.Node, transposed: bool) -> ir.Value:
        name, quantizer, codes, points = self._stored(node)
        narrow = codes.numpy()
        signed = self.target.signed != "nothing" and not isinstance(
            quantizer.spec.granularity, PerGroup
        )
        if signed and self._container(quantizer) is np.int8:
            shape = (-1,) + (1,) * (narrow.ndim - 1) if points.ndim else ()
            narrow, points = narrow - points.reshape(shape), np.zeros_like(points)
        scale = quantizer.scale.numpy()
        if transposed:
            narrow, scale, points = narrow.T, scale.T, points.T
        weight = self._codes(name, narrow, quantizer)
        placed = axis_of(quantizer, transposed=transposed)
        if signed:
            weight = self._without_points(node, weight, points, placed)
            return self.writer.dequantize(node, weight, scale, None, **placed)
        kind: Any = np.int8
        if weight.dtype == ir.DataType.INT4:
            if self.target.storage == "direct":
                kind = ml_dtypes.int4
            else:
                weight = self._cast(node, weight, ir.DataType.INT8)
        elif weight.dtype == ir.DataType.INT2:
            weight = self._cast(node, weight, ir.DataType.INT8)
        return self.writer.dequantize(node, weight, scale, points.astype(kind), **placed)

    def _container(self, quantizer: Affine) -> Any:
        bits = quantizer.spec.bits
        if bits > 4 or self.target.storage == "int8":
            return np.int8
        return ml_dtypes.int2 if bits == 2 and self.target.int2 else ml_dtypes.int4

    def _codes(self, name: str, narrow: NDArray[Any], quantizer: Affine) -> ir.Value:
        codes = narrow.astype(np.int8).astype(self._container(quantizer))
        return self.writer.constant(codes, name)

    def _without_points(
        self, node: ir.Node, weight: ir.Value, points: NDArray[Any], placed: dict[str, Any]
    ) -> ir.Value:
        """Return INT8 codes less their zero points, which runtimes fold when they load."""
        if points.any():
            if points.ndim:
                shape = [1] * len(weight.shape or ())
                shape[placed["axis"]] = -1
                points = points.reshape(shape)
            narrow = points.min() >= -8 and points.max() <= 7
            stored = self.writer.constant(
                points.astype(np.int8).astype(ml_dtypes.int4 if narrow else np.int8)
            )
            # onnxruntime subtracts no INT8.
            operands = [self._cast(node, v, ir.DataType.INT32) for v in (weight, stored)]
            weight = self.writer.add(node, "Sub", operands)
            return self._cast(node, weight, ir.DataType.INT8)
        if weight.dtype == ir.DataType.INT8:
            return weight
        return self._cast(node, weight, ir.DataType.INT8)

    def _cast(self, node: ir.Node, value: ir.Value, to: ir.DataType) -> ir.Value:
        return self.writer.add(node, "Cast", [value], to=int(to))
