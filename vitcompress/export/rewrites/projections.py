"""Query, key and value from linears of their own.

A projection that yields all three is cut apart by its rows: each part then leaves its product
in the layout that attention wants, and nothing has to be split or copied behind it.
"""

import copy

from torch import fx

from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.edit import constant_node, is_quantizer, quantizer_target
from vitcompress.graph.metadata import TensorInfo, info, module_path, node_argument
from vitcompress.graph.moves import UnknownMoveError
from vitcompress.graph.ops import is_op
from vitcompress.graph.patterns import attentions
from vitcompress.graph.projections import NotProjectedError, Operand, projected_operands
from vitcompress.quantizers import PerChannel, PerGroup, Quantizer

__all__ = ["separate_projections"]


def separate_projections(captured: CapturedGraph) -> int:
    """Cut joint projections of attention into linears of their own.

    Args:
        captured: Graph to edit, weights frozen; the caller recompiles it.

    Returns:
        How many attention cores had a joint projection.
    """
    count = 0
    for core in attentions(captured):
        try:
            found = projected_operands(core)
        except (NotProjectedError, UnknownMoveError):
            continue
        operands = (found.query, found.key, found.value)
        joint = [operand for operand in operands if _is_joint(captured, operand)]
        for operand in joint:
            _separate(captured, operand, found.heads, transposed=operand is found.key)
        count += bool(joint)
    return count


def _is_joint(captured: CapturedGraph, operand: Operand) -> bool:
    """Return whether an operand is part of the result of one linear with a stored weight."""
    if operand.tokens_first or operand.width == info(operand.base).shape[-1]:
        return False
    if not is_op(operand.base, ops.LINEAR):
        return False
    weight, *bias = operand.base.args[1:]
    stored = all(isinstance(b, fx.Node) and b.op == "get_attr" for b in bias if b is not None)
    if not stored or not is_quantizer(weight):
        return False
    assert isinstance(weight, fx.Node)
    quantizer = captured.module.get_submodule(str(weight.target))
    return isinstance(quantizer, Quantizer) and quantizer.frozen


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
    batch, tokens, _ = info(base).shape
    dim = operand.width // heads
    order = [0, 2, 3, 1] if transposed else [0, 2, 1, 3]
    split: tuple[int | str, ...] = (batch, tokens, heads, dim)
    with graph.inserting_before(operand.node):
        product = graph.call_function(ops.linear, (source, part, *bias))
        parted = graph.call_function(ops.reshape, (product, [-1, *split[1:]]))
        value = graph.call_function(ops.permute, (parted, order))
    dtype = info(base).dtype
    shapes = (
        (product, (batch, tokens, operand.width)),
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
    quantizer = copy.deepcopy(captured.module.get_submodule(str(weight.target)))
    assert isinstance(quantizer, Quantizer)
    if isinstance(quantizer.spec.granularity, (PerChannel, PerGroup)):
        for name in quantizer.parameter_names:
            setattr(quantizer, name, getattr(quantizer, name)[start:stop])
    quantizer.site = f"{quantizer.site}[{start}:{stop}]"
    target = quantizer_target(quantizer.site)
    captured.module.add_submodule(target, quantizer)
    with captured.graph.inserting_before(before):
        node = captured.graph.call_module(target, (stored,))
    node.meta = {**weight.meta, "info": info(stored)}
    return node
