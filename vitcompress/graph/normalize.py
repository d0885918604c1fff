"""One spelling for every structure: what the exporter leaves open is decided here.

After normalisation there is no dropout, identity, cast or assertion, no batch norm or
LayerScale that the weights next to it can absorb, no training-time branch of a convolution,
no fused attention, no arithmetic on constants alone; products and reshapes have one spelling
each. The function computed is unchanged up to rounding.
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
from vitcompress.graph.constants import drop_empty_masks, fold_constants
from vitcompress.graph.folding import (
    fold_batch_norms,
    fold_channel_scales,
    fold_leading_batch_norms,
)
from vitcompress.graph.metadata import info, list_argument, module_path
from vitcompress.graph.ops import is_op
from vitcompress.graph.products import spell_products, spell_stored_products

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
    spell_products(captured)
    fold_constants(captured)
    drop_empty_masks(captured)
    spell_stored_products(captured)
    fold_batch_norms(captured)
    merge_branches(captured)
    fold_channel_scales(captured)
    fold_leading_batch_norms(captured)
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


# One spelling


def _one_spelling(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if is_op(node, ops.VIEW):
            # Dropping copies leaves strided values, on which `view` would fail.
            node.target = ops.reshape
        elif is_op(node, ops.INTERNAL_SOFTMAX):
            node.target = ops.softmax
            node.args = node.args[:2]
