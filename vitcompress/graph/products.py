"""Every product of tensors spelled as ``linear`` or ``matmul``.

``einsum``, ``bmm``, ``addmm`` and ``baddbmm`` say the same thing in other words; a site, a
runtime's kernel and a reader should meet one of them only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from vitcompress.graph import ops
from vitcompress.graph.captured import CapturedGraph
from vitcompress.graph.edit import constant_node
from vitcompress.graph.metadata import (
    ModulePath,
    TensorInfo,
    info,
    list_argument,
    module_path,
    node_argument,
)
from vitcompress.graph.ops import is_op

__all__ = ["spell_products", "spell_stored_products"]


def spell_products(captured: CapturedGraph) -> None:
    """Rewrite products in place; an ``einsum`` of another kind than below stays as it is."""
    for node in list(captured.graph.nodes):
        if is_op(node, ops.BMM):
            node.target = ops.matmul
        elif is_op(node, ops.ADDED_PRODUCT):
            _split_sum(captured.graph, node)
        elif is_op(node, ops.EINSUM):
            _spell_einsum(captured.graph, node)


def spell_stored_products(captured: CapturedGraph) -> None:
    """Rewrite ``x @ W`` with a stored ``[I, O]`` matrix as a linear layer, in place."""
    for node in list(captured.graph.nodes):
        if not is_op(node, ops.MATMUL):
            continue
        x, stored = node.args
        if not isinstance(stored, fx.Node) or stored.op != "get_attr":
            continue
        shape, rank = info(stored).shape, len(info(node_argument(node, 0)).shape)
        if not 2 <= len(shape) <= rank or any(extent != 1 for extent in shape[:-2]):
            continue
        path, _, leaf = str(stored.target).rpartition(".")
        matrix = captured.parameter(str(stored.target)).flatten(0, -2)
        transposed = matrix.T.contiguous()
        weight = constant_node(captured, node, leaf, transposed, ModulePath(path, ""))
        node.target = ops.linear
        node.args = (x, weight)


# addmm, baddbmm


def _split_sum(graph: fx.Graph, node: fx.Node) -> None:
    """Write ``beta * sum + alpha * (left @ right)`` as a product and a sum."""
    addend, left, right = node.args[:3]
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return
    with graph.inserting_before(node):
        product = graph.call_function(ops.matmul, (left, right))
        total = graph.call_function(ops.add, (product, addend))
    for new in (product, total):
        new.meta = dict(node.meta)
    node.replace_all_uses_with(total)
    graph.erase_node(node)


# einsum


@dataclass(frozen=True)
class _Letters:
    """The axes of a two-operand einsum, by the part they play in a matrix product.

    Attributes:
        batch: In the result and in one or both operands; broadcast where an operand lacks one.
        row: In the left operand and the result, ``""`` if there is none.
        summed: In both operands, not in the result.
        column: In the right operand and the result, ``""`` if there is none.
    """

    batch: str
    row: str
    summed: str
    column: str


def _parts(left: str, right: str, result: str) -> _Letters | None:
    """Return the parts, or ``None`` where the einsum is no matrix product."""
    summed = [letter for letter in left if letter in right and letter not in result]
    if len(summed) != 1 or any(len(set(term)) != len(term) for term in (left, right, result)):
        return None
    letters = set(left) | set(right)
    if set(result) | set(summed) != letters:  # an axis of one operand alone is summed away
        return None
    rows = [letter for letter in result if letter in left and letter not in right]
    columns = [letter for letter in result if letter in right and letter not in left]
    row, column = (rows or [""])[-1], (columns or [""])[-1]
    batch = "".join(letter for letter in result if letter not in (row, column))
    return _Letters(batch, row, summed[0], column)


def _spell_einsum(graph: fx.Graph, node: fx.Node) -> None:
    equation, operands = str(node.args[0]).replace(" ", ""), list_argument(node, 1)
    terms, arrow, result = equation.partition("->")
    left, _, right = terms.partition(",")
    if not arrow or len(operands) != 2 or not (left + right + result).isalpha():
        return
    parts = _parts(left, right, result)
    if parts is None:
        return
    first, second = operands
    extents = dict(zip(left, info(first).shape, strict=True))
    for letter, extent in zip(right, info(second).shape, strict=True):
        if letter == parts.summed and extent != extents[letter]:
            return  # one is 1 and repeated, which a matmul does not do
        if extents.get(letter, 1) == 1:
            extents[letter] = extent
    writer = _Writer(graph, node, extents)
    rows = writer.arranged(first, left, parts.batch, parts.row, parts.summed)
    columns = writer.arranged(second, right, parts.batch, parts.summed, parts.column)
    present = parts.batch + parts.row + parts.column
    shape = [
        *(extents[letter] for letter in parts.batch),
        *(extents[letter] if letter else 1 for letter in (parts.row, parts.column)),
    ]
    value = writer.call(ops.matmul, (rows, columns), shape)
    if not parts.column:
        value = writer.call(ops.select, (value, -1, 0), shape[:-1])
        shape = shape[:-1]
    if not parts.row:
        value = writer.call(
            ops.select,
            (value, len(parts.batch), 0),
            [*shape[: len(parts.batch)], *shape[len(parts.batch) + 1 :]],
        )
    value = writer.permuted(value, present, result)
    node.replace_all_uses_with(value)
    graph.erase_node(node)


@dataclass(frozen=True)
class _Writer:
    """Writes nodes in front of one, with its metadata."""

    graph: fx.Graph
    before: fx.Node
    extents: dict[str, int | str]

    def call(
        self, target: Any, arguments: tuple[Any, ...], shape: Sequence[int | str]
    ) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, arguments)
        node.meta = {"module": module_path(self.before)}
        node.meta["info"] = TensorInfo(tuple(shape), info(self.before).dtype)
        return node

    def permuted(self, value: fx.Node, present: str, wanted: str) -> fx.Node:
        """Return ``value``, whose axes are ``present``, with them in the order ``wanted``."""
        if present == wanted:
            return value
        order = [present.index(letter) for letter in wanted]
        shape = [info(value).shape[position] for position in order]
        return self.call(ops.permute, (value, order), shape)

    def arranged(self, value: fx.Node, present: str, batch: str, *last: str) -> fx.Node:
        """Return an operand as ``[*batch, *last]``, with an axis of 1 for each it lacks."""
        wanted = batch + "".join(last)
        value = self.permuted(value, present, "".join(a for a in wanted if a in present))
        slots = [*batch, *last]  # an absent row or column is "": a slot of extent 1
        shape: list[int | str] = []
        for position, letter in enumerate(slots):
            if letter and letter in present:
                shape.append(info(value).shape[len(shape)])
                continue
            behind = info(value).shape[len(shape) :]
            shape.append(1)
            value = self.call(ops.unsqueeze, (value, position), [*shape, *behind])
        return value
