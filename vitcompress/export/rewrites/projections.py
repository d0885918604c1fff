"""Query, key and value from linears of their own.

A projection that yields all three is cut apart by its rows: each part then leaves its product
in the layout that attention wants, and nothing has to be split or copied behind it.
"""

import contextlib

from torch import fx

from vitcompress.export.rewrites.copies import call_copy, quantizer_of
from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.edit import constant_node, is_quantizer
from vitcompress.graph.metadata import TensorInfo, info, module_path, node_argument
from vitcompress.graph.moves import UnknownMoveError
from vitcompress.graph.ops import is_op
from vitcompress.graph.patterns import attentions
from vitcompress.graph.projections import (
    NotProjectedError,
    Operand,
    ProjectedOperands,
    projected_operands,
)
from vitcompress.quantizers import PerChannel, PerGroup, PerTensor

__all__ = ["separate_projections"]


def separate_projections(captured: CapturedGraph) -> int:
    """Cut joint projections of attention into linears of their own.

    Args:
        captured: Graph to edit, weights frozen; the caller recompiles it.

    Returns:
        How many attention cores had a joint projection.
    """
    cores: list[ProjectedOperands] = []
    for core in attentions(captured):
        with contextlib.suppress(NotProjectedError, UnknownMoveError):
            cores.append(projected_operands(core))
    joint = [[o for o in _operands(found) if _is_joint(captured, o)] for found in cores]
    parts = {operand.node for operands in joint for operand in operands}
    joint = [[o for o in operands if _serves(o.base, parts)] for operands in joint]
    for found, operands in zip(cores, joint, strict=True):
        for operand in operands:
            _separate(captured, operand, found.heads, transposed=operand is found.key)
    return sum(bool(operands) for operands in joint)


def _operands(found: ProjectedOperands) -> tuple[Operand, ...]:
    return found.query, found.key, found.value


def _is_joint(captured: CapturedGraph, operand: Operand) -> bool:
    """Return whether an operand is part of the result of one linear with a stored weight."""
    if operand.width == info(operand.base).shape[-1]:
        return False
    if not is_op(operand.base, ops.LINEAR):
        return False
    weight, *bias = operand.base.args[1:]
    stored = all(isinstance(b, fx.Node) and b.op == "get_attr" for b in bias if b is not None)
    if not stored or not is_quantizer(weight):
        return False
    assert isinstance(weight, fx.Node)
    quantizer = quantizer_of(captured, weight)
    granularity = quantizer.spec.granularity
    by_rows = isinstance(granularity, PerChannel) and granularity.axis == 0
    return quantizer.frozen and (
        by_rows or type(granularity) is PerTensor or isinstance(granularity, PerGroup)
    )


def _serves(base: fx.Node, parts: set[fx.Node]) -> bool:
    """Return whether all that is read of a projection are these parts of it.

    It would be computed for other readers all the same.
    """
    pending = [base]
    while pending:
        for user in pending.pop().users:
            if user in parts or is_op(user, ops.SYM_SIZE):
                continue
            if not is_op(user, ops.REARRANGE):
                return False
            pending.append(user)
    return True


def _separate(
    captured: CapturedGraph, operand: Operand, heads: int, *, transposed: bool
) -> None:
    graph, base = captured.graph, operand.base
    source, weight = node_argument(base, 0), node_argument(base, 1)
    start, stop = operand.start, operand.start + operand.width
    owner = module_path(base)
    part = _rows_of_weight(captured, operand, weight, start, stop)
    bias = [
        constant_node(
            captured,
            operand.node,
            "bias",
            captured.parameter(str(b.target))[start:stop],
            owner,
        )
        for b in base.args[2:]
        if isinstance(b, fx.Node)
    ]
    rows, dim = info(base).shape[:2], operand.width // heads
    image, token = (1, 0) if operand.tokens_first else (0, 1)
    order = [image, 2, 3, token] if transposed else [image, 2, token, 3]
    split: tuple[int | str, ...] = (*rows, heads, dim)
    extents = [-1 if axis == image else extent for axis, extent in enumerate(split)]
    with graph.inserting_before(operand.node):
        product = graph.call_function(ops.linear, (source, part, *bias))
        parted = graph.call_function(ops.reshape, (product, extents))
        value = graph.call_function(ops.permute, (parted, order))
    dtype = info(base).dtype
    shapes = (
        (product, (*rows, operand.width)),
        (parted, split),
        (value, tuple(split[axis] for axis in order)),
    )
    for node, shape in shapes:
        node.meta = {**base.meta, "info": TensorInfo(shape, dtype)}
    operand.node.replace_all_uses_with(value)


def _rows_of_weight(
    captured: CapturedGraph, operand: Operand, weight: fx.Node, start: int, stop: int
) -> fx.Node:
    """Return a quantizer node that reads some rows of a stored weight."""
    before, owner = operand.node, module_path(operand.base)
    codes = captured.parameter(str(node_argument(weight, 0).target))
    stored = constant_node(captured, before, "weight", codes[start:stop], owner)
    site = f"{quantizer_of(captured, weight).site}[{start}:{stop}]"
    node = call_copy(captured, before, weight, stored, site)
    quantizer = quantizer_of(captured, node)
    if type(quantizer.spec.granularity) is not PerTensor:
        for name in quantizer.parameter_names:
            setattr(quantizer, name, getattr(quantizer, name)[start:stop])
    return node
