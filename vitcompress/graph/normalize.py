"""One spelling for every structure: what the exporter leaves open is decided here.

After normalisation there is no dropout, identity, cast or assertion, no batch norm behind a
convolution or linear, no training-time branch beside a convolution, no fused attention, no
arithmetic on constants alone; ``matmul`` and ``reshape`` have one spelling each. The function
computed is unchanged up to rounding.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from vitcompress.errors import UnsupportedModelError
from vitcompress.graph import ops
from vitcompress.graph.branches import merge_branches
from vitcompress.graph.captured import CapturedGraph
from vitcompress.graph.edit import constant_node
from vitcompress.graph.metadata import (
    ModulePath,
    info,
    list_argument,
    module_path,
    node_argument,
)
from vitcompress.graph.ops import is_op

__all__ = ["DECOMPOSITIONS", "normalize"]


def lower_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return fused attention as matmul, softmax, matmul, so that its operands are sites.

    The factor is applied to the scores: query and key stay unscaled, as in RepQ-ViT.

    Args:
        query: ``[..., N, D]``.
        key: ``[..., M, D]``.
        value: ``[..., M, E]``.
        attn_mask: Added to the scores, or boolean: ``False`` hides a key.
        dropout_p: Must be 0.
        is_causal: Must be ``False``.
        scale: Factor of the scores; ``1 / sqrt(D)`` by default.
        enable_gqa: Must be ``False``.

    Returns:
        ``[..., N, E]``.

    Raises:
        UnsupportedModelError: Dropout, a causal mask or grouped heads are asked for.
    """
    if dropout_p > 0.0 or is_causal or enable_gqa:
        raise UnsupportedModelError(
            f"scaled_dot_product_attention with dropout_p={dropout_p}, is_causal={is_causal}, "
            f"enable_gqa={enable_gqa} is not supported; vision transformers use none of them "
            "in evaluation"
        )
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * factor
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(torch.logical_not(attn_mask), -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, dim=-1), value)


#: Given to the exporter, which traces the replacement with all metadata in place.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {ops.attention: lower_attention}


def normalize(captured: CapturedGraph) -> None:
    """Bring a freshly exported graph into normal form, in place."""
    _drop_without_effect(captured.graph)
    _one_spelling(captured.graph)
    _fold_constants(captured)
    _fold_batch_norms(captured)
    merge_branches(captured)
    captured.recompile()


# Operations without effect


def _drop_without_effect(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if is_op(node, ops.RANDOM) or _is_training_dropout(node):
            where = module_path(node)
            raise UnsupportedModelError(
                f"{where.path or 'the model'}: {node.target} draws random numbers in "
                f"evaluation mode ({where.source}); switch it off with self.training"
            )
        if is_op(node, ops.ASSERTION):
            graph.erase_node(node)
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_identity(node: fx.Node) -> bool:
    if is_op(node, ops.IDENTITY):
        return "info" in node.meta
    if not node.args or not isinstance(node.args[0], fx.Node) or "info" not in node.meta:
        return False
    source = node.args[0]
    if "info" not in source.meta:
        return False
    if is_op(node, ops.CAST):
        return info(source) == info(node)
    if is_op(node, ops.PAD):
        return not any(list_argument(node, 1))
    if is_op(node, ops.PICK, ops.RESHAPE):
        return info(source) == info(node)
    if is_op(node, ops.ROLL):
        return not any(list_argument(node, 1))
    return False


def _is_training_dropout(node: fx.Node) -> bool:
    return is_op(node, ops.DROPOUT) and len(node.args) > 2 and node.args[2] is True


# Constants


def _fold_constants(captured: CapturedGraph) -> None:
    """Compute every value without an image among its ancestors, and store it as a tensor."""
    constants: dict[fx.Node, Any] = {}
    for node in captured.graph.nodes:
        if node.op == "get_attr":
            constants[node] = captured.parameter(str(node.target))
        elif is_op(node, ops.FILL) and all(isinstance(e, int) for e in info(node).shape):
            # Reads only the dtype of its input, and writes a value known now.
            constants[node] = _filled(node)
        elif (
            node.op == "call_function"
            and not is_op(node, ops.RANDOM)
            and all(source in constants for source in node.all_input_nodes)
        ):
            arguments = fx.map_arg((node.args, node.kwargs), lambda n: constants[n])
            with torch.no_grad():
                constants[node] = node.target(*arguments[0], **arguments[1])
    for node, value in constants.items():
        used = any(user not in constants for user in node.users)
        if node.op == "call_function" and used and isinstance(value, Tensor):
            stored = constant_node(captured, node, "constant", value.contiguous())
            node.replace_all_uses_with(stored, delete_user_cb=lambda u: u not in constants)


def _filled(node: fx.Node) -> Tensor:
    source, *arguments = node.args
    assert isinstance(source, fx.Node)
    stand_in = torch.empty(0, dtype=getattr(torch, info(source).dtype))
    value: Tensor = node.target(stand_in, *arguments, **node.kwargs)  # type: ignore[operator]
    return value


# One spelling


def _one_spelling(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if is_op(node, ops.BMM):
            node.target = ops.matmul
        elif is_op(node, ops.VIEW):
            # Dropping copies leaves strided values, on which `view` would fail.
            node.target = ops.reshape
        elif is_op(node, ops.INTERNAL_SOFTMAX):
            node.target = ops.softmax
            node.args = node.args[:2]


# Batch norm


def _fold_batch_norms(captured: CapturedGraph) -> None:
    """Fold evaluation-mode batch norms into the convolution or linear before them."""
    for node in list(captured.graph.nodes):
        if not is_op(node, ops.BATCH_NORM):
            continue
        producer = _foldable_producer(node)
        statistics = [_stored(captured, argument) for argument in node.args[1:5]]
        if producer is None or statistics[2] is None or statistics[3] is None:
            continue
        _fold_into(captured, producer, statistics, eps=float(node.args[6]))
        for output in list(node.users):  # getitem 0: the other outputs have no reader
            output.replace_all_uses_with(node.args[0])


def _foldable_producer(norm: fx.Node) -> fx.Node | None:
    """Return the convolution or linear whose only reader is the norm, through reshapes."""
    value = norm.args[0]
    while isinstance(value, fx.Node) and len(value.users) == 1:
        if is_op(value, ops.CONV):
            # A reshape in between may only have dropped extents of 1: [B, C, 1, 1] to [B, C].
            flat = value is norm.args[0] or set(info(value).shape[2:]) == {1}
            return value if flat else None
        if is_op(value, ops.LINEAR):
            # A linear's channels are its last axis; the norm reads axis 1, so both must agree.
            shape = info(node_argument(norm, 0)).shape
            return value if len(shape) == 2 and shape[1] == info(value).shape[-1] else None
        if not is_op(value, ops.RESHAPE) or len(info(value).shape) != 2:
            return None
        value = value.args[0]
    return None


def _stored(captured: CapturedGraph, node: Any) -> Tensor | None:
    if isinstance(node, fx.Node) and node.op == "get_attr":
        return captured.parameter(str(node.target))
    return None


def _fold_into(
    captured: CapturedGraph, producer: fx.Node, statistics: list[Tensor | None], eps: float
) -> None:
    gamma, beta, mean, variance = (None if s is None else s.double() for s in statistics)
    assert mean is not None
    assert variance is not None
    weight_node = node_argument(producer, 1)
    bias_node = producer.args[2] if len(producer.args) > 2 else None
    weight = captured.parameter(str(weight_node.target)).double()
    factor = torch.rsqrt(variance + eps)
    if gamma is not None:
        factor = factor * gamma
    bias = _stored(captured, bias_node)
    shift = -mean if bias is None else bias.double() - mean
    shift = shift * factor + (0.0 if beta is None else beta)
    scaled = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    path = str(weight_node.target).rpartition(".")[0]
    owner = ModulePath(path, module_path(producer).kind)
    new_weight = constant_node(captured, producer, "weight", scaled.float(), owner)
    new_bias = constant_node(captured, producer, "bias", shift.float(), owner)
    producer.args = (producer.args[0], new_weight, new_bias, *producer.args[3:])
