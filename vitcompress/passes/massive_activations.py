"""Massive activations: the few channels that rule a range take an exact way of their own.

Sun et al., "Massive Activations in Large Language Models", COLM 2024, arXiv:2402.17762
(section 5: vision transformers), describe single hidden units whose values are tens of times
larger than all others. A per-tensor range that covers such a unit leaves the others a handful
of codes. The remedy is ours: for the input x of a linear and its ruling channels J,

    W x + b = W (m * x) + b + sum over j in J of x_j W_j,    m = 0 at J, 1 elsewhere,

holds exactly. What is left of the first term quantizes well; the second stays in float and
costs one multiply-add for each output and channel. Both are plain operations of the graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitcompress.calibration import ChannelAbsMax, Request
from vitcompress.errors import ConfigError
from vitcompress.graph import CapturedGraph, QuantizationSite, Role, enumerate_sites, ops
from vitcompress.graph.costs import multiply_adds, rows_of_an_image
from vitcompress.graph.edit import call_after, constant_node
from vitcompress.graph.metadata import TensorInfo, info, node_argument
from vitcompress.passes.base import Fact, PassContext, PassReport, register

__all__ = [
    "MassiveActivations",
    "MassiveActivationsConfig",
    "ruling_channels",
]


@dataclass(frozen=True, kw_only=True)
class MassiveActivationsConfig:
    """Settings of massive_activations.

    Attributes:
        roles: Inputs of linears that are looked at. Those behind a LayerNorm are left to
            ``repq_vit``, which gives each channel a scale of its own at no cost.
        ratio: How many times smaller the range must be without them.
        channels: Most channels diverted at one site.
        max_share: Most of the network's multiply-adds that may be spent, in (0, 1).
    """

    roles: tuple[Role, ...] = (
        Role.ACT_OUTPUT,
        Role.PROJ_INPUT,
        Role.HEAD_INPUT,
        Role.OTHER,
    )
    ratio: float = 2.0
    channels: int = 2
    max_share: float = 2e-3

    def __post_init__(self) -> None:
        if self.ratio <= 1.0:
            raise ConfigError(f"ratio: expected a value above 1, got {self.ratio}")
        if self.channels < 1:
            raise ConfigError(f"channels: expected at least 1, got {self.channels}")
        if not 0.0 < self.max_share < 1.0:
            raise ConfigError(f"max_share: expected a value in (0, 1), got {self.max_share}")


def ruling_channels(absmax: Tensor, config: MassiveActivationsConfig) -> list[int]:
    """Return the fewest channels without which the range is ``ratio`` times smaller.

    Args:
        absmax: Largest magnitude of each channel, ``[C]``.
        config: ``ratio`` and ``channels`` are read.

    Returns:
        Channels, largest first; none if no ``channels`` of them rule the range.
    """
    ordered, channels = torch.sort(absmax, descending=True)
    for count in range(1, min(config.channels, len(ordered) - 1) + 1):
        if ordered[0] >= config.ratio * ordered[count] and ordered[count] > 0:
            return [int(channel) for channel in channels[:count]]
    return []


def affordable(
    gains: Mapping[str, float], costs: Mapping[str, int], budget: float
) -> list[str]:
    """Return names in order of gain, as long as their costs together stay within a budget."""
    chosen: list[str] = []
    spent = 0
    for name in sorted(gains, key=lambda n: -gains[n]):
        if spent + costs[name] <= budget:
            chosen.append(name)
            spent += costs[name]
    return chosen


@register
class MassiveActivations:
    """Divert the channels that rule the range of a linear's input."""

    name: ClassVar[str] = "massive_activations"
    config_type: ClassVar[type] = MassiveActivationsConfig
    requires: ClassVar[frozenset[Fact]] = frozenset()
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTACHED})
    provides: frozenset[Fact] = frozenset()
    preserves_function: ClassVar[bool] = True

    def __init__(self, config: MassiveActivationsConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        return [Request(site.name, ChannelAbsMax) for site in self._sites(graph)]

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        sites = {site.name: site for site in self._sites(graph)}
        total = sum(multiply_adds(graph).values())
        found: dict[str, list[int]] = {}
        gains: dict[str, float] = {}
        costs: dict[str, int] = {}
        for name, site in sites.items():
            absmax = context.statistics.get(name, ChannelAbsMax)
            assert isinstance(absmax, Tensor)
            channels = ruling_channels(absmax, self.config)
            if channels:
                found[name] = channels
                rest = absmax.index_fill(0, torch.tensor(channels), 0.0)
                gains[name] = float(absmax.max() / rest.max())
                # Of a row: one product for each output and channel; the masking of the input.
                width = len(absmax) + len(channels) * int(info(site.reader).shape[-1])
                costs[name] = width * rows_of_an_image(site.reader)
        chosen = affordable(gains, costs, self.config.max_share * total)
        for name in chosen:
            divert(graph, sites[name], found[name])
        graph.recompile()
        spent = sum(costs[name] for name in chosen)
        return PassReport(
            changed=len(chosen),
            found=len(sites),
            skipped={
                name: f"channels {found[name]} rule its range, but diverting them costs more "
                f"than max_share ({self.config.max_share:g}) leaves"
                for name in found
                if name not in chosen
            },
            details={
                "channels": {name: found[name] for name in chosen},
                "range_ratio": {name: round(gains[name], 2) for name in chosen},
                "multiply_adds": spent,
                "share_of_multiply_adds": spent / total,
            },
        )

    def _sites(self, graph: CapturedGraph) -> list[QuantizationSite]:
        return [
            site
            for site in enumerate_sites(graph).values()
            if site.operation == "linear"
            and site.index == 0
            and site.role in self.config.roles
            and node_argument(site.reader, 1).op == "get_attr"
        ]


def divert(graph: CapturedGraph, site: QuantizationSite, channels: Sequence[int]) -> None:
    """Take channels out of a linear's input, and add what they contribute to its output.

    Args:
        graph: Edited; the caller recompiles it.
        site: Input of a linear with a stored weight.
        channels: Along the last axis of the input.
    """
    linear, value = site.reader, site.value
    weight = graph.parameter(str(node_argument(linear, 1).target))
    mask = torch.ones(weight.shape[1])
    mask[list(channels)] = 0.0
    kept = constant_node(graph, linear, "kept_channels", mask)
    with graph.graph.inserting_before(linear):
        masked = graph.graph.call_function(ops.mul, (value, kept))
    masked.meta = {**linear.meta, "info": info(value)}
    linear.update_arg(0, masked)
    result = linear
    for channel in channels:
        column = constant_node(
            graph, linear, f"diverted_{channel}", weight[:, channel].clone()
        )
        with graph.graph.inserting_before(linear):
            alone = graph.graph.call_function(ops.slice_, (value, -1, channel, channel + 1))
        shape = (*info(value).shape[:-1], 1)
        alone.meta = {**linear.meta, "info": TensorInfo(shape, info(value).dtype)}
        product = call_after(graph, result, ops.mul, (alone, column))
        total = call_after(graph, product, ops.add, (result, product))
        for reader in [user for user in result.users if user not in (product, total)]:
            reader.replace_input_with(result, total)
        result = total
