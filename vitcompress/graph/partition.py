"""Cut a block out of a captured graph as a program of its own, or the graph into a chain.

Reconstruction methods train one block at a time: they need its function apart from the
network, fed with values recorded from the whole.
"""

import heapq
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from vitcompress.errors import UnsupportedModelError
from vitcompress.graph import ops
from vitcompress.graph.captured import CapturedGraph
from vitcompress.graph.metadata import info, module_path
from vitcompress.graph.patterns import Block

__all__ = ["BlockProgram", "batch_factor", "chain", "extract_block"]


#: A block, or a computation that is in none.
_Step = Block | fx.Node


@dataclass(frozen=True)
class BlockProgram:
    """A block as a module, and where it sits in the whole graph.

    Attributes:
        module: Takes the values of ``inputs`` in order and returns a tuple, those of
            ``outputs``. Its tensors and quantizers are the graph's own, not copies.
        inputs: Nodes of the whole graph whose values the block reads.
        outputs: Nodes of the block whose values something behind it reads.
    """

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def extract_block(captured: CapturedGraph, block: Block) -> BlockProgram:
    """Return a block of ``captured`` as a program of its own.

    Stored tensors come along. Integers made from the batch size, such as a number of windows,
    are computed anew from the first input that has the batch in its shape.

    Args:
        captured: Graph to read; not changed.
        block: One of ``patterns.blocks(captured)``.

    Raises:
        UnsupportedModelError: Several tensors cross the border as one value, or an integer
            does where no input tells the batch size.
    """
    members = _convex(captured, block)
    border = dict.fromkeys(
        source
        for node in members
        for source in node.all_input_nodes
        if source not in members and source.op != "get_attr" and not _is_integer(source)
    )
    for node in border:
        if "info" not in node.meta:
            raise UnsupportedModelError(
                f"{block.path}: cannot cut at '{node.name}', which is several tensors at once"
            )
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for source in border:
        copies[source] = graph.placeholder(source.name)
        copies[source].meta = dict(source.meta)

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            outside = node not in members
            if outside and ops.is_op(node, ops.SYM_SIZE):
                copies[node] = _extent(graph, block, list(border), copies, node)
            else:
                copies[node] = graph.node_copy(node, copy)
        return copies[node]

    for node in members:
        copy(node)
    outputs = tuple(
        node
        for node in members
        if not _is_integer(node) and any(user not in members for user in node.users)
    )
    graph.output(tuple(copies[node] for node in outputs))
    attributes: dict[str, Tensor | nn.Module] = {**captured.tensors(), **captured.quantizers()}
    cut = CapturedGraph.build(graph, attributes, ("",) * len(outputs), captured.provenance)
    cut.module.graph.lint()
    return BlockProgram(cut.module, tuple(border), outputs)


def _convex(captured: CapturedGraph, block: Block) -> dict[fx.Node, None]:
    """Return the block's nodes and all on a path between two of them, in graph order."""
    own = set(block.nodes)
    behind, ahead = set(own), set(own)
    for node in captured.graph.nodes:
        if any(source in behind for source in node.all_input_nodes):
            behind.add(node)
    for node in reversed(captured.graph.nodes):
        if any(user in ahead for user in node.users):
            ahead.add(node)
    return dict.fromkeys(n for n in captured.graph.nodes if n in behind and n in ahead)


def _is_integer(node: fx.Node) -> bool:
    return "symbol" in node.meta


def _extent(
    graph: fx.Graph,
    block: Block,
    border: list[fx.Node],
    copies: dict[fx.Node, fx.Node],
    wanted: fx.Node,
) -> fx.Node:
    """Return a node that computes an extent ``k*B`` of an outer tensor from the inputs."""
    factor = batch_factor(wanted.meta["symbol"])
    for source in border:
        for axis, extent in enumerate(info(source).shape):
            found = batch_factor(extent)
            if found is not None and factor is not None:
                size = graph.call_function(ops.sym_size, (copies[source], axis))
                if found != factor:
                    size = graph.call_function(operator.floordiv, (size, found))
                    size = graph.call_function(operator.mul, (size, factor))
                return size
    raise UnsupportedModelError(
        f"{block.path}: none of its inputs tells the size '{wanted.meta['symbol']}' it reads"
    )


def batch_factor(extent: int | str) -> int | None:
    """Return k of ``k*B``, or ``None`` for any other extent."""
    match = re.fullmatch(r"(?:(\d+)\*)?B", str(extent))
    return int(match[1] or 1) if match else None


def chain(captured: CapturedGraph, blocks: Sequence[Block]) -> list[Block]:
    """Return the whole program as blocks that run one after the other.

    Args:
        captured: Graph to read.
        blocks: Disjoint blocks in graph order, e.g. ``patterns.blocks(captured)``.

    Returns:
        The blocks, each with what lies on a path between two of its nodes, and between them
        what is left, under the path of the first linear or convolution in it: the patch
        embedding, downsampling, the head. Every computation is in exactly one.

    Raises:
        UnsupportedModelError: Two blocks need each other's values.
    """
    leader: dict[fx.Node, _Step] = {}
    for block in blocks:
        leader.update((node, block) for node in _convex(captured, block))
    for node in reversed(_without_images(captured)):
        # A class token or a quantized weight belongs to its first reader: alone, it would be a
        # step without inputs, from which no batch size is known.
        reader = next(n for n in captured.graph.nodes if n in node.users)
        leader.setdefault(node, leader.get(reader, reader))
    steps: dict[_Step, list[fx.Node]] = {}
    for node in captured.graph.nodes:
        if _computes(node):
            steps.setdefault(leader.get(node, node), []).append(node)
    found: list[Block] = []
    between: list[fx.Node] = []
    for step in _ordered(captured, steps):
        if isinstance(step, Block):
            if between:
                found.append(_named(between))
            found.append(Block(step.path, tuple(steps[step])))
            between = []
        else:
            between.extend(steps[step])
    return [*found, _named(between)] if between else found


def _without_images(captured: CapturedGraph) -> list[fx.Node]:
    """Return the computations that no image reaches, in graph order."""
    reached = {captured.input_node}
    for node in captured.graph.nodes:
        if not _is_integer(node) and any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    return [n for n in captured.graph.nodes if _computes(n) and n not in reached]


def _computes(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_module") and not _is_integer(node)


def _named(nodes: list[fx.Node]) -> Block:
    weighted = (node for node in nodes if ops.is_op(node, ops.LINEAR, ops.CONV))
    return Block(module_path(next(weighted, nodes[0])).path, tuple(nodes))


def _ordered(captured: CapturedGraph, steps: dict[_Step, list[fx.Node]]) -> list[_Step]:
    """Return steps in an order in which each comes behind what it reads."""
    place = {node: index for index, node in enumerate(captured.graph.nodes)}
    rank = {step: place[nodes[-1]] for step, nodes in steps.items()}
    step_of = {node: step for step, nodes in steps.items() for node in nodes}
    waiting: dict[_Step, set[_Step]] = {}
    readers: dict[_Step, list[_Step]] = {step: [] for step in steps}
    for step, nodes in steps.items():
        sources = {step_of[n] for node in nodes for n in node.all_input_nodes if n in step_of}
        waiting[step] = sources - {step}
        for source in waiting[step]:
            readers[source].append(step)
    at = {index: step for step, index in rank.items()}
    ready = [rank[step] for step, sources in waiting.items() if not sources]
    heapq.heapify(ready)
    found = []
    while ready:
        step = at[heapq.heappop(ready)]
        found.append(step)
        for reader in readers[step]:
            waiting[reader].discard(step)
            if not waiting[reader]:
                heapq.heappush(ready, rank[reader])
    if len(found) < len(steps):
        stuck = [step.path for step in steps if isinstance(step, Block) and waiting[step]]
        raise UnsupportedModelError(f"blocks {stuck} need each other's values; no order runs")
    return found
