"""Values that no image takes part in, computed once and stored.

Bias tables picked by index, position MLPs, Fourier positions, shift masks, standardised
weights and concatenated biases are constants. So is what depends on the batch only through its
extent, such as a learned query repeated for every image: one row of it is stored.
"""

import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vitcompress.graph import ops
from vitcompress.graph.captured import CapturedGraph
from vitcompress.graph.edit import constant_node
from vitcompress.graph.metadata import (
    ModulePath,
    TensorInfo,
    info,
    int_argument,
    node_argument,
)
from vitcompress.graph.ops import is_op

__all__ = ["drop_empty_masks", "fold_constants"]

#: Batches at which values that depend on their extent are computed, to compare the rows.
_PROBES = (2, 3)


def fold_constants(captured: CapturedGraph) -> None:
    """Replace values without an image among their ancestors by stored tensors, in place."""
    constants: dict[fx.Node, Any] = {}
    repeated: tuple[dict[fx.Node, Any], ...] = tuple({} for _ in _PROBES)
    for node in captured.graph.nodes:
        if node.op == "get_attr":
            constants[node] = captured.parameter(str(node.target))
            continue
        if node.op != "call_function" or is_op(node, ops.RANDOM):
            continue
        sources = node.all_input_nodes
        if is_op(node, ops.SYM_SIZE):
            factor = _batch_factor(node)
            for batch, values in zip(_PROBES, repeated, strict=True):
                if factor is not None:
                    values[node] = factor * batch
        elif is_op(node, ops.FILL) and all(isinstance(e, int) for e in info(node).shape):
            constants[node] = _filled(node)
        elif all(source in constants for source in sources):
            constants[node] = _computed(node, constants)
        elif all(source in constants or source in repeated[0] for source in sources):
            for values in repeated:
                values[node] = _computed(node, ChainMap(values, constants))
    for node, value in constants.items():
        used = any(user not in constants for user in node.users)
        if node.op == "call_function" and used and isinstance(value, Tensor):
            stored = constant_node(captured, node, "constant", value.contiguous())
            node.replace_all_uses_with(stored, delete_user_cb=lambda u: u not in constants)
    for node, value in repeated[0].items():
        if isinstance(value, Tensor):
            readers = [user for user in node.users if user not in repeated[0]]
            _store_one_row(captured, node, [values[node] for values in repeated], readers)


def drop_empty_masks(captured: CapturedGraph) -> None:
    """Take out masks that hide nothing, in place."""
    for node in list(captured.graph.nodes):
        if not is_op(node, ops.MASKED_FILL):
            continue
        mask = node.args[1]
        if _is_stored(mask) and not captured.parameter(str(mask.target)).any():
            if info(node) != info(node_argument(node, 0)):
                continue  # the mask widens the result
            node.replace_all_uses_with(node.args[0])


def _computed(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
    with torch.no_grad():
        return node.target(*arguments, **keywords)  # type: ignore[operator]


def _filled(node: fx.Node) -> Tensor:
    """Return what a node writes that reads only the dtype of its input."""
    source, *arguments = node.args
    assert isinstance(source, fx.Node)
    stand_in = torch.empty(0, dtype=getattr(torch, info(source).dtype))
    value: Tensor = node.target(stand_in, *arguments, **node.kwargs)  # type: ignore[operator]
    return value


# Repeated for every image


def _batch_factor(node: fx.Node) -> int | None:
    """Return k where a node asks for an extent ``k*B``; ``None`` for any other."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or "info" not in source.meta:
        return None
    match = re.fullmatch(r"(?:(\d+)\*)?B", str(info(source).shape[int_argument(node, 1)]))
    return int(match[1] or 1) if match else None


def _store_one_row(
    captured: CapturedGraph, node: fx.Node, values: Sequence[Tensor], readers: list[fx.Node]
) -> None:
    """Let the readers of a value that is the same for every image read one stored row.

    Rows that are alike may still depend on how many there are: both probes must agree.
    """
    value = values[0]
    if not readers or not value.dim() or info(node).shape[0] != "B":
        return
    if not all(torch.equal(value[0], row) for probe in values for row in probe.unbind(0)):
        return
    broadcasting = [user for user in readers if _broadcasts(user, node)]
    others = [user for user in readers if user not in broadcasting]
    if is_op(node, ops.EXPAND) and _is_stored(node.args[0]):
        others = []  # as simple as it can be
    if not broadcasting and not others:
        return
    row = constant_node(captured, node, "constant", value[:1].contiguous())
    for user in broadcasting:
        user.replace_input_with(node, row)
    if others:
        extents = [_batch_size(captured), *value.shape[1:]]
        with captured.graph.inserting_before(node):
            expanded = captured.graph.call_function(ops.expand, (row, extents))
        expanded.meta = dict(node.meta)
        for user in others:
            user.replace_input_with(node, expanded)


def _batch_size(captured: CapturedGraph) -> fx.Node:
    """Return the node that asks for the number of images, in front of everything else."""
    images = captured.input_node
    for user in images.users:
        if is_op(user, ops.SYM_SIZE) and user.args[1] == 0:
            images.append(user)
            return user
    with captured.graph.inserting_after(images):
        node = captured.graph.call_function(ops.sym_size, (images, 0))
    node.meta = {"module": ModulePath("", ""), "symbol": "B"}
    return node


def _broadcasts(user: fx.Node, value: fx.Node) -> bool:
    """Return whether a reader's result is the same if one row stands for all."""
    if not is_op(user, ops.ADD, ops.SUB, ops.MUL, ops.DIV, ops.MATMUL, ops.MASKED_FILL):
        return False
    other = next((a for a in user.args[:2] if a is not value), None)
    if not isinstance(other, fx.Node) or "info" not in other.meta:
        return False
    found: TensorInfo = info(other)
    return len(found.shape) == len(info(value).shape) and found.shape[0] == "B"


def _is_stored(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"
