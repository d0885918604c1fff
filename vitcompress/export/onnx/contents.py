"""What an ONNX file says about itself before anything runs it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto

from vitcompress.errors import InputError, UnsupportedModelError

__all__ = ["OnnxContents", "read_contents"]

#: Operators by which a network that was compressed is told from a plain one.
COMPRESSED_OPS = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"),
        *("ConvInteger", "QLinearMatMul", "QLinearConv", "QGemm", "MatMulIntegerToFloat"),
        *("DynamicQuantizeMatMul", "MatMulNBits", "MatMulBnb4", "QAttention"),
    }
)
NARROW_FLOATS = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})


@dataclass(frozen=True, kw_only=True)
class OnnxContents:
    """A network of one image input.

    Attributes:
        batch: Images it takes at once; ``None`` for any number.
        image_shape: ``(C, H, W)``.
        is_float32: Nothing in it is stored or computed in fewer bits.
        size_bytes: Of the file and of its external data.
        sha256: Over the same.
    """

    batch: int | None
    image_shape: tuple[int, ...]
    is_float32: bool
    size_bytes: int
    sha256: str


def read_contents(path: Path) -> OnnxContents:
    """Return what an ONNX file says about itself.

    Raises:
        InputError: It is missing or damaged, or its external data are.
        UnsupportedModelError: It has other inputs than one float32 image of fixed size.
    """
    if not path.is_file():
        raise InputError(f"{path}: file is missing")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # the parser's exception types are not public
        raise InputError(f"{path}: is not an ONNX file, or is damaged: {error}") from error
    if not model.graph.node:
        raise InputError(f"{path}: is not an ONNX file, or is damaged: it has no operators")
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise UnsupportedModelError(f"{path}: expected one image input, found {names}")
    batch, *image_shape = _input_shape(path, inputs[0])
    files = [path, *_external_files(path, model)]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return OnnxContents(
        batch=batch or None,
        image_shape=tuple(image_shape),
        is_float32=not (
            COMPRESSED_OPS & {node.op_type for node in model.graph.node}
            or NARROW_FLOATS & {tensor.data_type for tensor in model.graph.initializer}
        ),
        size_bytes=sum(file.stat().st_size for file in files),
        sha256=digest.hexdigest(),
    )


def _input_shape(path: Path, value: ValueInfoProto) -> list[int]:
    """Return ``[B, C, H, W]``, 0 for a batch that is not fixed."""
    found = value.type.tensor_type
    extents = [extent.dim_value for extent in found.shape.dim]
    if found.elem_type != TensorProto.FLOAT or len(extents) != 4 or 0 in extents[1:]:
        named = [extent.dim_param or extent.dim_value or "?" for extent in found.shape.dim]
        kind = TensorProto.DataType.Name(found.elem_type)
        raise UnsupportedModelError(
            f"{path}: expected float32 images [B, C, H, W] of fixed C, H and W, "
            f"found '{value.name}' of {kind} [{', '.join(map(str, named))}]"
        )
    return extents


def _external_files(path: Path, model: ModelProto) -> Iterator[Path]:
    """Yield the files beside ``path`` that hold its tensors."""
    locations = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    folder = path.resolve().parent
    for location in sorted(locations):
        file = (folder / location).resolve()
        if not file.is_relative_to(folder):
            raise InputError(f"{path}: keeps tensors outside its folder, in '{location}'")
        if not file.is_file():
            raise InputError(f"{path}: its external data '{location}' are missing")
        yield file
