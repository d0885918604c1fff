"""Structures recognised in a captured graph: attention, norm-linear groups, blocks.

Recognition looks at operations, never at names. It is computed from the graph on each call, so
it cannot go stale, and it sees through quantizers that are already in place.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from vitcompress.graph import ops
from vitcompress.graph.axes import moved_axis, pads_with_zero
from vitcompress.graph.captured import CapturedGraph
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import (
    info,
    list_argument,
    module_path,
    node_argument,
)
from vitcompress.graph.ops import is_op

__all__ = [
    "Attention",
    "Block",
    "NormLinearGroup",
    "attentions",
    "blocks",
    "norm_linear_groups",
    "producer",
]


def producer(value: fx.Node) -> fx.Node:
    """Return the node that made a value, seen through moves, zero padding and quantizers."""
    while _passes_through(value) and value.all_input_nodes:
        source = value.args[0]
        if not isinstance(source, fx.Node):
            break
        value = source
    return value


def _passes_through(node: fx.Node) -> bool:
    padded = is_op(node, ops.PAD) and pads_with_zero(node)
    return padded or is_op(node, ops.REARRANGE) or is_quantizer(node)


@dataclass(frozen=True)
class Attention:
    """One attention core: a product of activations with the result of a softmax.

    Attributes:
        scores: Product of query (argument 0) and key (argument 1); ``None`` where the softmax
            is not of a product (outlook attention, a softmax over the keys alone).
        softmax: The softmax node.
        output: Product of probabilities and value.
        probs_index: Which argument of ``output`` holds the probabilities.
        score_mixers: Linears over the head axis between ``scores`` and ``softmax``.
        probs_mixers: Those between ``softmax`` and ``output`` (talking heads).
    """

    scores: fx.Node | None
    softmax: fx.Node
    output: fx.Node
    probs_index: int
    score_mixers: tuple[fx.Node, ...]
    probs_mixers: tuple[fx.Node, ...]


def attentions(captured: CapturedGraph) -> Iterator[Attention]:
    """Yield the attention cores in graph order."""
    for node in captured.graph.nodes:
        reader = _probs_reader(node) if is_op(node, ops.SOFTMAX) else None
        if reader is not None:
            found = _score_product(node.args[0])
            scores, mixers = (None, ()) if found is None else found
            yield Attention(scores, node, reader[0], reader[1], mixers, reader[2])


_Path = tuple[fx.Node, ...]


def _score_product(value: object, depth: int = 16) -> tuple[fx.Node, _Path] | None:
    """Return the product behind a softmax, through scaling, masks, biases, mixers, moves."""
    if depth == 0 or not isinstance(value, fx.Node):
        return None
    if is_op(value, ops.MATMUL):
        # A product with a stored table is a position bias; with a stored query it is none.
        table = node_argument(value, 1).op == "get_attr"
        return None if table else (value, ())
    mixer = _mixes_heads(value)
    if not mixer and not is_op(value, ops.SCORE_PATH):
        return None
    sources = [node_argument(value, 0)] if mixer else value.all_input_nodes
    for source in sources:
        found = _score_product(source, depth - 1)
        if found is not None:
            return found[0], (*found[1], value) if mixer else found[1]
    return None


def _probs_reader(softmax: fx.Node) -> tuple[fx.Node, int, _Path] | None:
    """Return the product that reads the probabilities, at which argument, and the mixers."""
    pending: list[tuple[fx.Node, _Path]] = [(softmax, ())]
    seen: set[fx.Node] = set()
    while pending:
        value, mixers = pending.pop(0)
        for user in value.users:
            if user in seen:
                continue
            seen.add(user)
            if is_op(user, ops.MATMUL):
                return user, 0 if user.args[0] is value else 1, mixers
            if _mixes_heads(user) and user.args[0] is value:
                pending.append((user, (*mixers, user)))
            elif is_op(user, ops.REARRANGE) or is_quantizer(user) or _rescales(user, value):
                pending.append((user, mixers))
    return None


def _mixes_heads(node: fx.Node) -> bool:
    """Return whether a linear or 1 x 1 convolution maps the head axis of scores to itself."""
    if not is_op(node, ops.LINEAR, ops.CONV):
        return False
    weight = node.args[1]
    stored = weight.args[0] if is_quantizer(weight) else weight  # type: ignore[union-attr]
    if not isinstance(stored, fx.Node) or stored.op != "get_attr":
        return False
    shape = info(stored).shape
    return len(info(node).shape) == 4 and shape[0] == shape[1] and set(shape[2:]) <= {1}


def _rescales(node: fx.Node, value: fx.Node) -> bool:
    """Return whether probabilities are mixed with constants, or divided by their own sum."""
    if not is_op(node, ops.MUL, ops.ADD, ops.DIV):
        return False
    other = node.args[1] if node.args[0] is value else node.args[0]
    if not isinstance(other, fx.Node) or other.op == "get_attr":
        return True
    total = producer(other)
    return is_op(node, ops.DIV) and is_op(total, ops.SUM) and total.args[0] is value


@dataclass(frozen=True)
class Consumer:
    """A linear that reads a norm, and what lies between.

    Attributes:
        linear: The linear node.
        quantizer: Quantizer on its input edge, if one is attached.
        pads: Zero paddings on the way.
    """

    linear: fx.Node
    quantizer: fx.Node | None
    pads: tuple[fx.Node, ...]


@dataclass(frozen=True)
class NormLinearGroup:
    """A LayerNorm all of whose readers are linears that can absorb a per-channel map.

    Attributes:
        norm: The ``layer_norm`` node.
        consumers: Every linear that reads it.
    """

    norm: fx.Node
    consumers: tuple[Consumer, ...]


def norm_linear_groups(
    captured: CapturedGraph,
) -> tuple[list[NormLinearGroup], list[tuple[fx.Node, str]]]:
    """Return the groups, and each other norm with the reason why it is none.

    A norm qualifies when every path from it ends in a linear, through operations that only
    move tokens about: reshapes that keep the last axis, permutations that leave it last,
    rolls, selections, zero padding. Its tensors must not serve anything else.
    """
    found, rejected = [], []
    for norm in captured.graph.nodes:
        if not is_op(norm, ops.LAYER_NORM):
            continue
        reason = _reason_against_norm(norm)
        consumers: list[Consumer] = []
        if reason is None:
            reason = _follow(norm, None, (), consumers)
        if reason is None:
            found.append(NormLinearGroup(norm, tuple(consumers)))
        else:
            rejected.append((norm, reason))
    return found, rejected


def _reason_against_norm(norm: fx.Node) -> str | None:
    axes = len(list_argument(norm, 1))
    if axes != 1:
        return f"normalises over {axes} axes"
    for tensor in norm.args[2:4]:
        if isinstance(tensor, fx.Node) and (tensor.op != "get_attr" or len(tensor.users) > 1):
            return "its weight or bias serves another node"
    return None


def _follow(
    value: fx.Node, quantizer: fx.Node | None, pads: tuple[fx.Node, ...], found: list[Consumer]
) -> str | None:
    """Collect the consumers of a value whose last axis holds the channels."""
    if not value.users:
        return "nothing reads it"
    for user in value.users:
        reason = None
        if is_op(user, ops.LINEAR):
            reason = _reason_against_linear(user, value)
            found.append(Consumer(user, quantizer, pads))
        elif is_quantizer(user):
            reason = _follow(user, user, pads, found)
        elif is_op(user, ops.PAD) and not pads_with_zero(user):
            reason = f"read by {user.name}"
        elif _keeps_channels(user, value):
            padding = (user,) if is_op(user, ops.PAD) else ()
            reason = _follow(user, quantizer, (*pads, *padding), found)
        elif is_op(user, ops.PAD):
            reason = "channels are padded"
        else:
            reason = f"read by {user.name}"
        if reason is not None:
            return reason
    return None


def _reason_against_linear(linear: fx.Node, value: fx.Node) -> str | None:
    if linear.args[0] is not value:
        return f"{linear.name} uses it as a weight"
    weight = node_argument(linear, 1)
    stored = weight.args[0] if is_quantizer(weight) else weight
    if not isinstance(stored, fx.Node) or stored.op != "get_attr":
        return f"the weight of {linear.name} is computed"
    if len(stored.users) > 1 or len(weight.users) > 1:
        return f"the weight of {linear.name} is shared"
    return None


def _keeps_channels(node: fx.Node, source: fx.Node) -> bool:
    """Return whether an operation leaves the last axis whole, last and in order."""
    if "info" not in node.meta:
        return False
    last = len(info(source).shape) - 1
    return moved_axis(node, source, last) == len(info(node).shape) - 1


@dataclass(frozen=True)
class Block:
    """A repeated unit of the network, such as ``blocks.3``.

    Attributes:
        path: Module path shared by its nodes.
        nodes: Its nodes in graph order.
    """

    path: str
    nodes: tuple[fx.Node, ...]


def blocks(captured: CapturedGraph) -> list[Block]:
    """Return the innermost numbered modules that hold an attention core or several linears."""
    weights: dict[str, int] = {}
    cores = {attention.output for attention in attentions(captured)}
    for node in captured.graph.nodes:
        weight = 2 if node in cores else int(is_op(node, ops.LINEAR, ops.CONV))
        for prefix in _numbered_prefixes(module_path(node).path) if weight else []:
            weights[prefix] = weights.get(prefix, 0) + weight
    candidates = [path for path, weight in weights.items() if weight >= 2]
    inner = [p for p in candidates if not any(q.startswith(p + ".") for q in candidates)]
    return [
        Block(path, tuple(n for n in captured.graph.nodes if _belongs(n, path)))
        for path in inner
    ]


def _numbered_prefixes(path: str) -> list[str]:
    """Return proper prefixes that end in a digit: ``blocks.3`` of ``blocks.3.attn``."""
    parts = path.split(".")
    return [
        ".".join(parts[:length])
        for length in range(1, len(parts))
        if re.search(r"\d$", parts[length - 1])
    ]


def _belongs(node: fx.Node, path: str) -> bool:
    own = module_path(node).path
    return own == path or own.startswith(path + ".")
