"""Floats that stay in a file: which they are, and how tables of them are stored in fewer bits.

Position embeddings, class tokens, tables of attention biases, and weights that no quantizer
reads. What is lost is lost in the graph, on purpose and in the open; the file then stores
exactly what the graph holds, so that its verification stays as strict as without. A ``Cast``,
or a ``Cast`` and a product, makes float32 of it, which runtimes fold when they load: an INT8
table behind ``DequantizeLinear`` would be dequantized in every run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir
import torch
from torch import Tensor

from vitcompress.errors import ConfigError
from vitcompress.export.onnx.writer import Writer
from vitcompress.graph import CapturedGraph

__all__ = ["FileSize", "Leftovers", "check_leftovers", "file_size", "narrowed", "store_narrow"]

Leftovers = Literal["float32", "float16", "int8"]

#: Tables of fewer numbers are not worth two more nodes.
LEAST_NUMBERS = 128
#: How far a number may lie from what is stored, relative to the largest: float32's own error.
EXACT = 1e-6
#: Tensors that are listed.
LISTED = 8


@dataclass(frozen=True)
class FileSize:
    """Where the bytes of a file are; what the three leave is names and structure.

    Attributes:
        packed_bytes: Codes of weights in their containers.
        parameter_bytes: Scales, zero points and other constants of quantizers and shapes.
        leftover_bytes: Floats, and biases that are int32.
        largest_leftovers: The largest of those, by name.
    """

    packed_bytes: int
    parameter_bytes: int
    leftover_bytes: int
    largest_leftovers: Mapping[str, int]


def check_leftovers(storage: str) -> Leftovers:
    """Return a name of a storage.

    Raises:
        ConfigError: It is none.
    """
    for known in get_args(Leftovers):
        if storage == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(
        f"leftovers: expected one of {list(get_args(Leftovers))}, got '{storage}'"
    )


def narrowed(captured: CapturedGraph, storage: Leftovers) -> CapturedGraph:
    """Return a graph whose tables hold what their storage can; the same one for float32."""
    if storage == "float32":
        return captured
    graph = captured.clone()
    for name, value in graph.tensors().items():
        if _is_table(value):
            graph.set_parameter(name, _stored(value, storage)[0])
    return graph


def store_narrow(writer: Writer, storage: Leftovers) -> None:
    """Store each table of a model in fewer bits if those hold it exactly."""
    if storage == "float32":
        return
    graph = writer.model.graph
    for name, value in list(graph.initializers.items()):
        if value.dtype != ir.DataType.FLOAT or value.const_value is None or not value.uses():
            continue
        table = torch.from_numpy(value.const_value.numpy().copy())
        if not _is_table(table):
            continue
        held, codes, scale = _stored(table, storage)
        if float((held - table).abs().max()) > EXACT * float(table.abs().max()):
            continue
        first = next(node for node in graph if any(v is value for v in node.inputs))
        narrow = writer.constant(codes.numpy(), f"{name}.{storage}")
        result = writer.add(first, "Cast", [narrow], to=int(ir.DataType.FLOAT))
        if scale is not None:
            result = writer.add(first, "Mul", [result, writer.constant(scale.numpy())])
        result.shape, result.type = value.shape, value.type
        value.replace_all_uses_with(result)


def _is_table(value: Tensor) -> bool:
    return value.dtype == torch.float32 and value.dim() >= 2 and value.numel() >= LEAST_NUMBERS


def _stored(value: Tensor, storage: Leftovers) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what a storage holds of a table, what is stored, and the scale of INT8.

    One scale for each index of the first axis, out of several that have more than one: a
    token, a head, an output channel.
    """
    if storage == "float16":
        half = value.half()
        return half.float(), half, None
    axes = [axis for axis, extent in enumerate(value.shape) if extent > 1]
    others = [axis for axis in range(value.dim()) if len(axes) < 2 or axis != axes[0]]
    largest = value.abs().amax(dim=others, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    codes = (value / scale).round().to(torch.int8)
    return codes.float() * scale, codes, scale


def file_size(model: ir.Model) -> FileSize:
    """Return where the bytes of a finished model are."""
    packed, parameters = 0, 0
    leftovers: dict[str, int] = {}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        count = value.const_value.nbytes
        if name.endswith(".codes"):
            packed += count
        elif Writer.is_unnamed(name):
            parameters += count
        else:
            leftovers[name] = count
    largest = sorted(leftovers.items(), key=lambda item: -item[1])[:LISTED]
    return FileSize(packed, parameters, sum(leftovers.values()), dict(largest))
