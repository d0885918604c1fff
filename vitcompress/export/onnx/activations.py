"""How activations are quantized in a file: codes, and floats made of them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from vitcompress.export.onnx.support import axis_of
from vitcompress.export.onnx.targets import Target
from vitcompress.export.onnx.writer import Writer
from vitcompress.quantizers import AdaLog, Affine, Codebook, Log2, PerTensor, Sulq

__all__ = ["Activations", "StoredCodes"]


@dataclass(frozen=True)
class StoredCodes:
    """Where a file holds the codes of a quantizer.

    Attributes:
        name: Of the value.
        offset: What its codes lack to be the quantizer's.
        order: Axes of the quantizer's codes among those of the value; empty if alike.
    """

    name: str
    offset: int = 0
    order: tuple[int, ...] = ()

    def of(self, value: Tensor) -> Tensor:
        """Return the quantizer's codes, int32, from what a runtime made of the value."""
        codes = value.int() + self.offset
        return codes.permute(self.order) if self.order else codes


@dataclass
class Activations:
    """Writes the quantizers of the activations of one model.

    Codes are uint8 whatever their sign where the target takes zero points: onnxruntime's
    kernels take many times longer with a signed left operand. Where it takes none on weights
    (OpenVINO), symmetric activations are int8, since one product may have both as operands.

    Attributes:
        writer: Of the model.
        target: How to spell.
        stored: The codes of each quantizer, by target.
    """

    writer: Writer
    target: Target
    stored: dict[str, StoredCodes] = field(default_factory=dict)
    _codes: dict[tuple[ir.Value, bool], ir.Value] = field(default_factory=dict)

    def lower(self, node: ir.Node) -> None:
        """Replace a marker that linears have left."""
        if not node.outputs[0].uses():
            return
        quantizer = self.writer.quantizer(node)
        if isinstance(quantizer, Codebook):
            result = self._looked_up(node, quantizer)
        else:
            assert isinstance(quantizer, Affine)
            result = self._value(node, self.codes(node, quantizer), quantizer)
        self.writer.replace(node, result)

    def codes(self, node: ir.Node, quantizer: Affine, *, right: bool = False) -> ir.Value:
        """Return 8-bit codes; narrower ones through a clip to what they can represent.

        Args:
            node: Marker of the quantizer.
            quantizer: What it stands for.
            right: Whether they are the right operand of onnxruntime's integer product, which
                is multiplied twice as fast if it is INT8 (measured: 0.12 against 0.24 ms for
                six heads of 197 tokens, queries times keys).
        """
        marked = node.outputs[0]
        if (marked, right) in self._codes:
            return self._codes[marked, right]
        value = node.inputs[0]
        scale, point = self.scale(quantizer, right=right)
        if quantizer.spec.bits < 8:
            value = self._clip(node, value, quantizer)
        both = (marked, not right) in self._codes  # a value may be both kinds of operand
        side = "right" if right else "left"
        codes = self.writer.add(
            node,
            "QuantizeLinear",
            [value, self.writer.constant(scale), self.writer.constant(point)],
            name=f"{quantizer.site}:{side}" if both else quantizer.site,
            **axis_of(quantizer),
        )
        self._codes[marked, right] = codes
        self._note(node, codes, self._offset(quantizer, right))
        return codes

    def scale(
        self, quantizer: Affine, *, right: bool = False
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return scale and zero point of the codes in the file, the latter of their dtype."""
        signed = self.target.signed == "everything" or (
            self.target.signed == "weights" and quantizer.spec.symmetric
        )
        point = (quantizer.zero_point - self._offset(quantizer, right)).numpy()
        return quantizer.scale.numpy(), point.astype(np.int8 if signed or right else np.uint8)

    def _offset(self, quantizer: Affine, right: bool = False) -> int:
        """Return what the codes in the file lack to be those of the quantizer."""
        if self.target.signed == "everything":
            return int(quantizer.zero_point)
        if self.target.signed == "weights" and quantizer.spec.symmetric:
            return 0
        return quantizer.bounds[0] + (128 if right else 0)

    def _value(self, node: ir.Node, codes: ir.Value, quantizer: Affine) -> ir.Value:
        """Return the float activation; several scales by plain arithmetic.

        onnxruntime fuses a product of two ``DequantizeLinear`` whatever their axes, into a
        kernel that then refuses to run with a left operand of several scales.
        """
        writer = self.writer
        scale, point = self.scale(quantizer)
        if type(quantizer.spec.granularity) is PerTensor:
            return writer.dequantize(node, codes, scale, point)
        shape = _parameter_shape(node.outputs[0], quantizer)
        value = writer.add(node, "Cast", [codes], to=int(ir.DataType.FLOAT))
        zero = writer.constant(point.astype(np.float32).reshape(shape))
        value = writer.add(node, "Sub", [value, zero])
        return writer.add(node, "Mul", [value, writer.constant(scale.reshape(shape))])

    def _clip(self, node: ir.Node, value: ir.Value | None, quantizer: Affine) -> ir.Value:
        writer, (qmin, qmax) = self.writer, quantizer.bounds
        ends = [
            ((code - quantizer.zero_point) * quantizer.scale).numpy().astype(np.float32)
            for code in (qmin, qmax)
        ]
        if type(quantizer.spec.granularity) is PerTensor:
            return writer.add(node, "Clip", [value, *(writer.constant(end) for end in ends)])
        assert value is not None
        shape = _parameter_shape(value, quantizer)
        low, high = (writer.constant(end.reshape(shape)) for end in ends)
        return writer.add(node, "Min", [writer.add(node, "Max", [value, low]), high])

    def _looked_up(self, node: ir.Node, quantizer: Codebook) -> ir.Value:
        """Encode by a logarithm, decode by looking the code up in a table of ``2^bits``."""
        writer = self.writer
        table = quantizer.table()
        if isinstance(quantizer, Sulq):
            steps = self._shifted_log_steps(node, quantizer)
        else:
            assert isinstance(quantizer, Log2)
            steps = self._log_steps(node, quantizer)
        rounded = writer.add(node, "Round", [steps])
        last = np.float32(len(table) - 1)
        bounds = [writer.constant(np.float32(0.0)), writer.constant(last)]
        clipped = writer.add(node, "Clip", [rounded, *bounds])
        codes = writer.add(
            node, "Cast", [clipped], name=quantizer.site, to=int(ir.DataType.INT32)
        )
        self._note(node, codes)
        return writer.add(node, "Gather", [writer.constant(table.numpy()), codes], axis=0)

    def _log_steps(self, node: ir.Node, quantizer: Log2) -> ir.Value:
        """Return ``-steps_per_octave log2(x / scale)``."""
        writer = self.writer
        factor = np.float32(-quantizer.steps_per_octave / np.log(2.0))
        value = node.inputs[0]
        if isinstance(quantizer, AdaLog):
            value = writer.add(node, "Add", [value, writer.constant(quantizer.shift.numpy())])
        positive = writer.add(node, "Relu", [value])
        ratio = writer.add(node, "Div", [positive, writer.constant(quantizer.scale.numpy())])
        return writer.add(
            node, "Mul", [writer.add(node, "Log", [ratio]), writer.constant(factor)]
        )

    def _shifted_log_steps(self, node: ir.Node, quantizer: Sulq) -> ir.Value:
        """Return ``(log2(x + shift) - low) / D``."""
        writer = self.writer
        positive = writer.add(node, "Relu", [node.inputs[0]])
        shift = writer.constant(quantizer.shift.numpy())
        log = writer.add(node, "Log", [writer.add(node, "Add", [positive, shift])])
        factor = quantizer.steps / (quantizer.high - quantizer.low).clamp(min=1e-6)
        scaled = writer.constant((factor / np.log(2.0)).numpy().astype(np.float32))
        offset = writer.constant((quantizer.low * factor).numpy())
        return writer.add(node, "Sub", [writer.add(node, "Mul", [log, scaled]), offset])

    def _note(self, node: ir.Node, codes: ir.Value, offset: int = 0) -> None:
        assert codes.name is not None
        target = node.attributes["target"].as_string()
        self.stored[target] = StoredCodes(codes.name, offset)


def _parameter_shape(value: ir.Value, quantizer: Affine) -> list[int]:
    """Return the shape in which one parameter per channel or head fits a value."""
    rank, axis = len(value.shape or ()), axis_of(quantizer)["axis"]
    return [-1 if position == axis % rank else 1 for position in range(rank)]
