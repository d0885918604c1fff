"""What a target takes, checked on the file itself, without running it.

For runtimes that are not here. The rules for TensorRT are those of its documentation and
issues (see the deployment notes): signed codes of 8 bits with zero point 0, one scale for an
activation and one for each output channel of a weight, and a product either between two
dequantized operands or between two floats.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vitcompress.export.onnx.targets import Target

__all__ = ["violations"]

#: Domains of the standard operators.
STANDARD = ("", "ai.onnx")
#: What carries codes between a ``DequantizeLinear`` and a product unchanged.
MOVES = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice"})
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})


def violations(model: ir.Model, target: Target) -> list[str]:
    """Return what a target does not take in a file, each with the node; empty if nothing.

    Args:
        model: As it is to be saved.
        target: For onnxruntime anything goes that it runs, since it runs every file.
    """
    found: list[str] = []
    if target.linear == "matmul":
        found += _foreign(model)
    if target.signed == "everything":
        for node in model.graph:
            found += _unsigned(node)
            if node.op_type in PRODUCTS:
                found += _half_quantized(node)
    return found


def _foreign(model: ir.Model) -> Iterator[str]:
    """Yield operators of other domains than the standard one."""
    for node in model.graph:
        if node.domain not in STANDARD:
            yield f"{node.name}: {node.domain}.{node.op_type} is no standard operator"
    for domain in model.opset_imports:
        if domain not in STANDARD:
            yield f"the file imports domain {domain}"
    for function in model.functions.values():
        yield f"{function.name}: is a function of the file's own"


def _unsigned(node: ir.Node) -> Iterator[str]:
    """Yield codes that are not INT8 with zero point 0, and scales that do not fit them."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    codes = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    scale = _stored(node.inputs[1])
    point = _stored(node.inputs[2]) if len(node.inputs) > 2 else None
    stored = codes is not None and codes.is_initializer()
    if point is None:
        kind = codes.dtype if codes is not None else None
        if node.op_type == "QuantizeLinear" or kind is not ir.DataType.INT8:
            yield f"{node.name}: codes of type {kind}; expected INT8"
    elif point.dtype != np.int8:
        yield f"{node.name}: codes of type {point.dtype}; expected int8"
    elif point.any():
        yield f"{node.name}: zero point {int(point.flatten()[0])}; expected 0"
    if "block_size" in node.attributes and node.attributes["block_size"].as_int():
        yield f"{node.name}: scales by blocks; expected one for each output channel"
    if scale is None:
        yield f"{node.name}: its scale is not stored"
    elif not stored and scale.ndim:
        yield f"{node.name}: {scale.size} scales for an activation; expected one"
    elif not (scale > 0).all():
        yield f"{node.name}: a scale is not above 0"


def _half_quantized(node: ir.Node) -> Iterator[str]:
    """Yield a product of a dequantized operand with a float one."""
    operands = [_origin(value) for value in node.inputs[:2]]
    if operands.count("DequantizeLinear") == 1:
        yield f"{node.name}: a {node.op_type} of one dequantized operand and a float one"


def _origin(value: ir.Value | None) -> str:
    """Return the operator that makes a value, moves of its elements left out."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return "" if node is None else node.op_type


def _stored(value: ir.Value | None) -> NDArray[Any] | None:
    if value is None or value.const_value is None:
        return None
    array: NDArray[Any] = value.const_value.numpy()
    return array
