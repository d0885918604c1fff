"""What every node of a captured graph carries: shape, dtype, module of origin, arguments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

__all__ = [
    "ModulePath",
    "TensorInfo",
    "info",
    "int_argument",
    "list_argument",
    "module_path",
    "node_argument",
    "set_info",
]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a node's value.

    Attributes:
        shape: Extents; those that depend on the batch are expressions of ``B``, e.g. ``64*B``.
        dtype: Name of the dtype, e.g. ``float32``.
    """

    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class ModulePath:
    """The module a node was captured from.

    Attributes:
        path: Qualified name, e.g. ``blocks.3.attn``; empty for the model itself.
        kind: Class name, e.g. ``Attention``.
        source: ``file:line`` of the call, as far as the exporter recorded it.
    """

    path: str
    kind: str
    source: str = ""


def info(node: fx.Node) -> TensorInfo:
    """Return shape and dtype of a node that yields one tensor.

    Raises:
        KeyError: The node yields no tensor.
    """
    found: TensorInfo = node.meta["info"]
    return found


def set_info(node: fx.Node, value: torch.Tensor) -> None:
    """Record the static shape and dtype of a constant."""
    node.meta["info"] = TensorInfo(tuple(value.shape), str(value.dtype).removeprefix("torch."))


def module_path(node: fx.Node) -> ModulePath:
    """Return the module a node belongs to; the model itself where nothing is known."""
    found: ModulePath = node.meta.get("module", ModulePath("", ""))
    return found


# Arguments. The operator's schema fixes their types; FX knows only a union of everything.


def node_argument(node: fx.Node, index: int) -> fx.Node:
    """Return an argument that is the value of another node."""
    argument = node.args[index]
    assert isinstance(argument, fx.Node)
    return argument


def int_argument(node: fx.Node, index: int) -> int:
    """Return an argument that is a whole number: an axis, an index."""
    argument = node.args[index]
    assert isinstance(argument, int)
    return argument


def list_argument(node: fx.Node, index: int) -> Sequence[Any]:
    """Return an argument that is a list: axes, extents, paddings; symbolic ones are nodes."""
    argument = node.args[index]
    assert isinstance(argument, (list, tuple))
    return argument


def translate_metadata(node: fx.Node, batch_symbol: str | None) -> None:
    """Replace the exporter's metadata by ours.

    Args:
        node: Node of an exported graph.
        batch_symbol: Name the exporter gave to the batch, e.g. ``s77``.
    """
    value = node.meta.get("val")
    stack = node.meta.get("nn_module_stack")
    trace = node.meta.get("stack_trace") or ""
    path, kind = "", ""
    if stack:
        path, owner = list(stack.values())[-1]
        kind = owner.rsplit(".", 1)[-1] if isinstance(owner, str) else owner.__name__
    node.meta = {"module": ModulePath(path, kind, _source_line(trace))}
    if isinstance(value, torch.Tensor):
        node.meta["info"] = _tensor_info(value, batch_symbol)
    elif isinstance(value, (tuple, list)) and all(isinstance(v, torch.Tensor) for v in value):
        node.meta["infos"] = tuple(_tensor_info(v, batch_symbol) for v in value)
    elif isinstance(value, torch.SymInt):
        node.meta["symbol"] = _extent(value, batch_symbol)


def _tensor_info(value: torch.Tensor, batch_symbol: str | None) -> TensorInfo:
    shape = tuple(_extent(extent, batch_symbol) for extent in value.shape)
    return TensorInfo(shape, str(value.dtype).removeprefix("torch."))


def _extent(extent: Any, batch_symbol: str | None) -> int | str:
    if isinstance(extent, int):
        return extent
    text = str(extent)
    return text.replace(batch_symbol, "B") if batch_symbol else text


def _source_line(trace: str) -> str:
    """Return ``file:line`` of the innermost frame of a recorded stack trace."""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if not frames:
        return ""
    parts = frames[-1].split(",")
    file = parts[0].removeprefix("File ").strip('"')
    line = parts[1].strip().removeprefix("line ") if len(parts) > 1 else "?"
    return f"{file}:{line}"
