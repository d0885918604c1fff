"""Equalize heads: give the channels of queries, keys and values one range, for one scale each.

An operand of attention has one scale for all its channels, whose ranges differ several times.
As RepQ-ViT does behind norms (Li et al., ICCV 2023, arXiv:2212.08254) and cross-layer
equalization between linears (Nagel et al., ICCV 2019, arXiv:1906.04721), the difference can be
moved into stored weights. With positive c and any m, s for each channel of each head,

    scores:  q k = (q / c) ((k - s) c) + q s,     q s is one number for all keys: the softmax
                                                  does not see it;
    values:  p v = c (p ((v - m) / c)) + m,       each row of p sums to 1,

so that c and m go into the projection behind. Exact in float, free when it runs. The
combination for attention is ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from vitcompress.calibration import Request, Samples
from vitcompress.errors import ConfigError
from vitcompress.graph import CapturedGraph, enumerate_sites, ops
from vitcompress.graph.edit import store_argument, stored_argument
from vitcompress.graph.heads import HeadMap, heads_of_operand, heads_of_output
from vitcompress.graph.metadata import info, module_path, node_argument
from vitcompress.graph.ops import is_op
from vitcompress.graph.patterns import Attention, attentions
from vitcompress.passes.base import Fact, PassContext, PassReport, register

__all__ = ["EqualizeHeads", "EqualizeHeadsConfig", "centres_and_widths"]

#: Centres and widths of an operand: product, index, axis of dimensions.
_Measure = Callable[[fx.Node, int, int], tuple[Tensor, Tensor]]
#: Furthest that a channel is scaled either way.
_MOST = 16.0
_A = [0.5]


@dataclass(frozen=True, kw_only=True)
class EqualizeHeadsConfig:
    """Settings of equalize_heads.

    Attributes:
        tail: Share of a channel's values beyond its range at either end, in [0, 0.5).
        images: Images from which ranges are taken.
    """

    tail: float = 0.001
    alpha: float = 0.5
    scores: bool = True
    images: int = 16

    def __post_init__(self) -> None:
        if not 0.0 <= self.tail < 0.5:
            raise ConfigError(f"tail: expected a share in [0, 0.5), got {self.tail}")
        if self.images < 1:
            raise ConfigError(f"images: expected at least 1, got {self.images}")


def centres_and_widths(values: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """Return the middle and the width of the range of each channel of each head.

    Args:
        values: ``[..., H, N, D]``.
        tail: Share of values beyond the range at either end.

    Returns:
        ``[H, D]`` double each; width 1 where a channel is constant.
    """
    channels = values.movedim(-3, 0).movedim(-1, 1).flatten(2).double()
    low, high = (
        torch.quantile(channels, tail, dim=2),
        torch.quantile(channels, 1 - tail, dim=2),
    )
    width = high - low
    return (low + high) / 2.0, torch.where(width > 0, width, 1.0)


@register
class EqualizeHeads:
    """Move the differences between channels of attention's operands into stored weights."""

    name: ClassVar[str] = "equalize_heads"
    config_type: ClassVar[type] = EqualizeHeadsConfig
    requires: ClassVar[frozenset[Fact]] = frozenset()
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTACHED})
    provides: frozenset[Fact] = frozenset()
    preserves_function: ClassVar[bool] = True

    def __init__(self, config: EqualizeHeadsConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        names = _site_names(graph)
        wanted: dict[str, None] = {}
        for attention in attentions(graph):
            edges = [(attention.output, 1 - attention.probs_index)]
            if attention.scores is not None:
                edges += [(attention.scores, 0), (attention.scores, 1)]
            wanted.update((names[edge], None) for edge in edges if edge in names)
        return [Request(name, partial(Samples, self.config.images)) for name in wanted]

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        names = _site_names(graph)

        def measured(product: fx.Node, index: int, axis: int) -> tuple[Tensor, Tensor]:
            values = context.statistics.get(names[product, index], Samples)
            assert isinstance(values, Tensor)
            return centres_and_widths(values.movedim(axis, -1), self.config.tail)

        skipped: dict[str, str] = {}
        done: list[str] = []
        for attention in list(attentions(graph)):
            path = module_path(attention.output).path
            for part, equalize in (("scores", _scores), ("values", _values)):
                if part == "scores" and not self.config.scores:
                    continue
                _A[0] = self.config.alpha
                reason = equalize(graph, attention, measured)
                if reason:
                    skipped[f"{path}: {part}"] = reason
                else:
                    done.append(f"{path}: {part}")
        graph.recompile()
        return PassReport(changed=len(done), found=len(done) + len(skipped), skipped=skipped)


def _scores(graph: CapturedGraph, attention: Attention, measured: _Measure) -> str:
    """Equalize queries and keys; return why that cannot be done, empty if it was."""
    scores = attention.scores
    if scores is None:
        return "they are no product of queries and keys"
    query = heads_of_operand(scores, 0, axis=-1)
    key = heads_of_operand(scores, 1, axis=-2)
    if isinstance(query, str) or isinstance(key, str):
        return query if isinstance(query, str) else str(key)
    if query.channels.shape != key.channels.shape:
        return "several heads of queries share one of keys"
    _, query_widths = measured(scores, 0, -1)
    centres, key_widths = measured(scores, 1, -2)
    factors = _bounded((query_widths / key_widths).sqrt())
    _map_rows(graph, query, 1.0 / factors, torch.zeros_like(centres))
    _map_rows(graph, key, factors, centres / key.factor)
    return ""


def _values(graph: CapturedGraph, attention: Attention, measured: _Measure) -> str:
    """Equalize values; return why that cannot be done, empty if it was."""
    if attention.probs_index != 0:
        return "values are on the left of their product"
    values = heads_of_operand(attention.output, 1, axis=-1)
    readers = heads_of_output(attention.output)
    if isinstance(values, str) or isinstance(readers, str):
        return values if isinstance(values, str) else str(readers)
    if values.channels.shape != readers.channels.shape:
        return "several heads of probabilities share one of values"
    centres, widths = measured(attention.output, 1, -1)
    if not _rows_sum_to_one(attention):
        centres = torch.zeros_like(centres)
    factors = _bounded((widths / widths.log().mean().exp()) ** _A[0])
    _map_rows(graph, values, 1.0 / factors, centres / values.factor)
    weight, bias = (stored_argument(graph, readers.linear, place) for place in (1, 2))
    assert weight is not None
    columns = readers.channels.flatten()
    moved = weight[:, columns] @ centres.flatten()
    weight[:, columns] *= factors.flatten()
    store_argument(graph, readers.linear, 1, weight)
    store_argument(graph, readers.linear, 2, moved if bias is None else bias + moved)
    return ""


def _rows_sum_to_one(attention: Attention) -> bool:
    """Return whether what multiplies the values is the softmax itself."""
    node = node_argument(attention.output, attention.probs_index)
    while is_op(node, ops.REARRANGE):
        node = node_argument(node, 0)
    axis, rank = attention.softmax.args[1], len(info(attention.softmax).shape)
    return node is attention.softmax and axis in (-1, rank - 1)


def _map_rows(graph: CapturedGraph, heads: HeadMap, factors: Tensor, shifts: Tensor) -> None:
    """Make a linear compute ``(y - shift) * factor`` in place of y, by head and dimension."""
    rows = heads.channels.flatten()
    weight, bias = (stored_argument(graph, heads.linear, place) for place in (1, 2))
    assert weight is not None
    weight[rows] *= factors.flatten()[:, None]
    store_argument(graph, heads.linear, 1, weight)
    if bias is None and not bool(shifts.any()):
        return
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    bias[rows] = (bias[rows] - shifts.flatten()) * factors.flatten()
    store_argument(graph, heads.linear, 2, bias)


def _bounded(factors: Tensor) -> Tensor:
    return factors.clamp(1.0 / _MOST, _MOST)


def _site_names(graph: CapturedGraph) -> dict[tuple[fx.Node, int], str]:
    return {(s.reader, s.index): s.name for s in enumerate_sites(graph).values()}
