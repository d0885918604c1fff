"""Where a graph can be quantized: the edges into linears, convolutions and products."""

from dataclasses import dataclass
from enum import StrEnum

from torch import fx

from vitcompress.graph import ops
from vitcompress.graph.captured import CapturedGraph
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import info, module_path, node_argument
from vitcompress.graph.ops import is_op
from vitcompress.graph.patterns import attentions, producer

__all__ = ["QuantizationSite", "Role", "enumerate_sites", "unlisted_products"]


class Role(StrEnum):
    """What a quantized tensor is in the network.

    ``product`` is an operand of a product of activations that is no query, key, value or
    untouched softmax: linear attention, probabilities after talking heads. ``head_mixing`` is
    input or weight of a linear over the head axis.
    """

    WEIGHT = "weight"
    PATCH_INPUT = "patch_input"
    NORM_OUTPUT = "norm_output"
    QUERY = "query"
    KEY = "key"
    PROBS = "probs"
    VALUE = "value"
    PROJ_INPUT = "proj_input"
    ACT_OUTPUT = "act_output"
    PRODUCT = "product"
    HEAD_MIXING = "head_mixing"
    HEAD_INPUT = "head_input"
    OTHER = "other"


@dataclass(frozen=True)
class QuantizationSite:
    """One edge of the graph: a value and the operation that reads it.

    Attributes:
        name: Module path and port, e.g. ``blocks.3.attn:probs``; stable across captures.
        role: What the tensor is.
        reader: Node that reads it.
        index: Which argument of the reader it is.
        shape: Its extents; ``None`` where they depend on the batch.
        channel_axis: Axis of channels: output rows of a weight, features of an activation.
    """

    name: str
    role: Role
    reader: fx.Node
    index: int
    shape: tuple[int | None, ...]
    channel_axis: int

    @property
    def value(self) -> fx.Node:
        """The tensor that is quantized, in front of the quantizer if there is one."""
        source = node_argument(self.reader, self.index)
        return node_argument(source, 0) if is_quantizer(source) else source

    @property
    def stored(self) -> bool:
        """Whether the tensor is a parameter; an activation otherwise."""
        return self.value.op == "get_attr"

    @property
    def quantizer(self) -> str | None:
        """Target of the quantizer on this edge, or ``None``."""
        source = node_argument(self.reader, self.index)
        return str(source.target) if is_quantizer(source) else None

    @property
    def module(self) -> str:
        """Path of the module that reads the tensor, e.g. ``blocks.3.attn``."""
        return self.name.partition(":")[0]

    @property
    def operation(self) -> str:
        """Short name of the reader: ``linear``, ``conv2d``, ``matmul``."""
        return str(self.reader.target).split(".")[1]


def enumerate_sites(captured: CapturedGraph) -> dict[str, QuantizationSite]:
    """Return every site by name, in graph order.

    Values computed without an image (constants) are no activation sites. Names come from
    module paths and ports, and an ordinal where one module has several.
    """
    products: dict[tuple[fx.Node, int], Role] = {}
    cores: set[fx.Node] = set()
    mixers: set[fx.Node] = set()
    for attention in attentions(captured):
        if attention.scores is not None:
            products[attention.scores, 0] = Role.QUERY
            products[attention.scores, 1] = Role.KEY
        # What talking heads make of probabilities is no longer between 0 and 1.
        probs = Role.PRODUCT if attention.probs_mixers else Role.PROBS
        products[attention.output, attention.probs_index] = probs
        products[attention.output, 1 - attention.probs_index] = Role.VALUE
        cores.add(attention.output)
        mixers.update(attention.score_mixers, attention.probs_mixers)
    heads = _heads(captured)
    sites: dict[str, QuantizationSite] = {}
    for node in captured.graph.nodes:
        if is_op(node, ops.LINEAR, ops.CONV):
            mixing = node in mixers
            role = Role.HEAD_MIXING if mixing else _input_role(node, cores, heads)
            axis = 1 if is_op(node, ops.CONV) else -1
            _add(sites, node, 0, role, "input", axis)
            if _is_stored(node.args[1]):
                role = Role.HEAD_MIXING if mixing else Role.WEIGHT
                _add(sites, node, 1, role, "weight", 0)
        elif is_op(node, ops.MATMUL):
            for index, port in enumerate(("left", "right")):
                if not _is_stored(node.args[index]):
                    found = products.get((node, index), Role.PRODUCT)
                    name = port if found is Role.PRODUCT else str(found)
                    _add(sites, node, index, found, name, -1)
    return sites


def unlisted_products(captured: CapturedGraph) -> dict[str, str]:
    """Return the products that are no sites, ``path:operation`` to why; they stay float."""
    return {
        f"{module_path(node).path}:{node.name}": f"{node.target} is not recognised as a site"
        for node in captured.graph.nodes
        if is_op(node, ops.UNLISTED_PRODUCT)
    }


def _add(
    sites: dict[str, QuantizationSite],
    reader: fx.Node,
    index: int,
    role: Role,
    port: str,
    axis: int,
) -> None:
    stem = f"{module_path(reader).path}:{port}"
    name, ordinal = stem, 0
    while name in sites:
        ordinal += 1
        name = f"{stem}.{ordinal}"
    source = info(node_argument(reader, index))
    shape = tuple(e if isinstance(e, int) else None for e in source.shape)
    sites[name] = QuantizationSite(name, role, reader, index, shape, axis)


def _is_stored(argument: object) -> bool:
    """Return whether an argument is a stored tensor, quantized or not."""
    if isinstance(argument, fx.Node) and is_quantizer(argument):
        argument = argument.args[0]
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _input_role(reader: fx.Node, cores: set[fx.Node], heads: set[fx.Node]) -> Role:
    if reader in heads:
        return Role.HEAD_INPUT
    source = producer(node_argument(reader, 0))
    if source.op == "placeholder":
        return Role.PATCH_INPUT
    if is_op(source, ops.LAYER_NORM, ops.RMS_NORM):
        return Role.NORM_OUTPUT
    if _is_activated(source):
        return Role.ACT_OUTPUT
    if source in cores:
        return Role.PROJ_INPUT
    return Role.OTHER


def _is_activated(source: fx.Node, depth: int = 4) -> bool:
    """Return whether a value comes from an activation, gated or scaled by constants or not."""
    if is_op(source, ops.ACTIVATION):
        return True
    if depth == 0 or not is_op(source, ops.MUL, ops.ADD, ops.POWER):
        return False
    operands = [a for a in source.args[:2] if isinstance(a, fx.Node) and a.op != "get_attr"]
    if len(operands) == 1:  # StarReLU: s relu(x)^2 + b
        return _is_activated(producer(operands[0]), depth - 1)
    # GeGLU, SwiGLU: act(x) y. Quick GELU: x sigmoid(1.702 x).
    gates = [producer(operand) for operand in operands]
    return is_op(source, ops.MUL) and any(is_op(g, ops.ACTIVATION, ops.GATE) for g in gates)


def _heads(captured: CapturedGraph) -> set[fx.Node]:
    """Return linears whose result reaches the output without another linear or product."""
    heads: set[fx.Node] = set()
    pending = list(captured.output_node.all_input_nodes)
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_op(node, ops.LINEAR):
            heads.add(node)
        elif not is_op(node, ops.CONV, ops.MATMUL, ops.LAYER_NORM):
            pending.extend(node.all_input_nodes)
    return heads
