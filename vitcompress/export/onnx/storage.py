"""How quantized weights are stored, and how a file makes floats of them.

Measured, see the deployment notes in the documentation: INT4 and INT2 weights run as integers
only behind a ``Cast`` to INT8, which runtimes fold when they load.
"""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vitcompress.export.onnx.support import axis_of, half_range
from vitcompress.export.onnx.targets import Target
from vitcompress.export.onnx.writer import Writer
from vitcompress.quantizers import Affine

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
    _values: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def lower(self, node: ir.Node) -> None:
        """Replace a marker that readers without a spelling of their own have left."""
        if node.outputs[0].uses():
            self.writer.replace(node, self.value(node.outputs[0]))

    def value(self, marked: ir.Value) -> ir.Value:
        """Return the float weight: container, ``Cast`` if the target wants it, ``DQ``."""
        if marked in self._values:
            return self._values[marked]
        node = marked.producer()
        assert node is not None
        stored = node.inputs[0]
        assert stored is not None
        assert stored.const_value is not None
        quantizer = self.writer.quantizer(node)
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
        name = f"{stored.name or 'weight'}.codes"
        weight = self.writer.constant(codes.astype(np.int8).astype(container), name)
        if low_bit and not direct:
            weight = self.writer.add(node, "Cast", [weight], to=int(ir.DataType.INT8))
        point_type: Any = ml_dtypes.int4 if low_bit and direct else np.int8
        stored_points: NDArray[Any] = points.astype(np.int8).astype(point_type)
        self._values[marked] = self.writer.dequantize(
            node, weight, quantizer.scale.numpy(), stored_points, **axis_of(quantizer)
        )
        return self._values[marked]
