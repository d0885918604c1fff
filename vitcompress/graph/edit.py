"""Edits of a captured graph that keep names and metadata right."""

import re
from typing import Any

from torch import Tensor, fx, nn

from vitcompress.graph.captured import QUANTIZER_PREFIX, CapturedGraph
from vitcompress.graph.metadata import ModulePath, module_path, set_info

__all__ = [
    "call_after",
    "constant_node",
    "insert_quantizer",
    "is_quantizer",
    "quantizer_target",
    "replace_quantizer",
]


def constant_node(
    captured: CapturedGraph,
    before: fx.Node,
    name: str,
    value: Tensor,
    owner: ModulePath | None = None,
) -> fx.Node:
    """Store a tensor and return the node that reads it.

    Args:
        captured: Graph to edit.
        before: The new node goes in front of this one.
        name: Last part of the tensor's name; numbered if another tensor that is still in use
            has it.
        value: The tensor.
        owner: Module the name belongs to; that of ``before`` by default.

    Returns:
        A ``get_attr`` node.
    """
    owner = owner or module_path(before)
    stem = f"{owner.path}.{name}" if owner.path else name
    target, ordinal = stem, 0
    while _taken(captured, target, before):
        ordinal += 1
        target = f"{stem}_{ordinal}"
    captured.set_parameter(target, value)
    with captured.graph.inserting_before(before):
        node = captured.graph.create_node("get_attr", target)
    node.meta = {"module": owner}
    set_info(node, value)
    return node


def _taken(captured: CapturedGraph, target: str, replaced_for: fx.Node) -> bool:
    """Return whether another node than ``replaced_for`` reads a tensor called ``target``."""
    readers = [
        user
        for node in captured.graph.find_nodes(op="get_attr", target=target)
        for user in node.users
    ]
    if any(user is not replaced_for for user in readers):
        return True
    path, _, leaf = target.rpartition(".")
    try:
        owner = captured.module.get_submodule(path)
    except AttributeError:
        return False
    return isinstance(getattr(owner, leaf, None), nn.Module)


def call_after(
    captured: CapturedGraph, after: fx.Node, target: Any, args: tuple[Any, ...]
) -> fx.Node:
    """Return a new call behind ``after`` that carries its metadata (same shape and owner)."""
    with captured.graph.inserting_after(after):
        node = captured.graph.call_function(target, args)
    node.meta = dict(after.meta)
    return node


def quantizer_target(site: str) -> str:
    """Return the attribute under which the quantizer of a site is stored."""
    return QUANTIZER_PREFIX + re.sub(r"\W", "_", site)


def is_quantizer(node: object) -> bool:
    """Return whether ``node`` calls a quantizer."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and str(node.target).startswith(QUANTIZER_PREFIX)
    )


def insert_quantizer(
    captured: CapturedGraph,
    value: fx.Node,
    readers: list[tuple[fx.Node, int]],
    site: str,
    quantizer: nn.Module,
) -> fx.Node:
    """Put one quantizer on the edges from ``value`` to ``readers``.

    Args:
        captured: Graph to edit; the caller recompiles it.
        value: Producer of the tensor.
        readers: ``(node, argument index)`` of each edge, in graph order.
        site: Name of the first edge; names the module.
        quantizer: The module; must not be in the graph yet.

    Returns:
        The new ``call_module`` node.
    """
    target = quantizer_target(site)
    captured.module.add_submodule(target, quantizer)
    with captured.graph.inserting_before(readers[0][0]):
        node = captured.graph.call_module(target, (value,))
    node.meta = dict(value.meta)
    node.meta["module"] = module_path(readers[0][0])
    for reader, index in readers:
        arguments = list(reader.args)
        arguments[index] = node
        reader.args = tuple(arguments)
    return node


def replace_quantizer(captured: CapturedGraph, target: str, quantizer: nn.Module) -> None:
    """Put another quantizer in the place of the one stored under ``target``."""
    captured.module.set_submodule(target, quantizer)
