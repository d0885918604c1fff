"""Fill the parameters of attached quantizers from data.

Two ways of looking at the data: in parallel, every quantizer off, through mergeable observers;
or sequentially, each quantizer set on the output of those before it (as RepQ-ViT does).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from vitcompress.calibration import (
    FirstImages,
    Histogram,
    RangeConfig,
    Request,
    Samples,
    Statistics,
    fit_range,
)
from vitcompress.errors import ConfigError, PassError
from vitcompress.graph import CapturedGraph, QuantizationSite, Role, enumerate_sites
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import info, node_argument
from vitcompress.passes.base import Fact, PassContext, PassReport, quantizers_of, register
from vitcompress.quantizers import PerTensor, Quantizer, Sulq

__all__ = ["Calibrate", "CalibrateConfig"]


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(RangeConfig):
    """Settings of calibrate, besides those of the range search.

    Attributes:
        roles: Only quantizers at these roles; all by default. Those that have parameters
            already are left alone.
        sequential: See upstream quantization. Costs memory that grows with the images.
        images: Look at the first so many images only, sequential form only; at all by default.
        sample_images: Images whose values are kept where a histogram does not serve
            (finer than per tensor, and ``output_mse``), parallel form only.
        sample_tokens: Rows of a linear's input on which ``output_mse`` measures.
    """

    roles: tuple[Role, ...] | None = None
    sequential: bool = False
    images: int | None = None
    sample_images: int = 32
    sample_tokens: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is not None and (self.images < 1 or not self.sequential):
            raise ConfigError(
                f"images: expected at least 1, with sequential: true; got {self.images}"
            )
        if self.sample_images < 1 or self.sample_tokens < 1:
            raise ConfigError("sample_images and sample_tokens: expected at least 1")


@register
class Calibrate:
    """Find the range of every attached quantizer that has none."""

    name: ClassVar[str] = "calibrate"
    config_type: ClassVar[type] = CalibrateConfig
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTACHED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.FINAL})
    provides: frozenset[Fact] = frozenset({Fact.CALIBRATED})
    preserves_function: ClassVar[bool] = True

    def __init__(self, config: CalibrateConfig) -> None:
        self.config = config
        if config.roles is not None:
            # Other roles may still be waiting: a later calibrate without roles completes them.
            self.provides = frozenset()

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        if self.config.sequential:
            return []
        return [
            Request(site.name, self._observer(site, quantizer))
            for site, quantizer in self._pending(graph)
            if not site.stored
        ]

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        pending = self._pending(graph)
        if self.config.sequential:
            self._walk(graph, pending, context)
        else:
            for site, quantizer in pending:
                if site.stored:
                    values, counts = graph.parameter(str(site.value.target)), None
                else:
                    values, counts = self._observed(site, quantizer, context.statistics)
                self._set(graph, site, quantizer, values, counts, context.generator)
        return PassReport(changed=len(pending), found=len(quantizers_of(graph)))

    def _pending(self, graph: CapturedGraph) -> list[tuple[QuantizationSite, Quantizer]]:
        """Return the first site of each quantizer that is to be set."""
        quantizers = quantizers_of(graph)
        found: dict[str, tuple[QuantizationSite, Quantizer]] = {}
        for site in enumerate_sites(graph).values():
            target = site.quantizer
            quantizer = None if target is None else quantizers.get(target)
            if target is None or quantizer is None or quantizer.calibrated or target in found:
                continue
            if self.config.roles is None or site.role in self.config.roles:
                found[target] = site, quantizer
        return list(found.values())

    # Parallel form

    def _observer(
        self, site: QuantizationSite, quantizer: Quantizer
    ) -> Callable[[], Histogram | Samples]:
        if self._uses_histogram(quantizer):
            return Histogram
        axis, rows = _rows_of_an_image(site.value)
        return partial(Samples, self.config.sample_images * rows, axis=axis)

    def _uses_histogram(self, quantizer: Quantizer) -> bool:
        return (
            type(quantizer.spec.granularity) is PerTensor
            and self.config.method != "output_mse"
            and not isinstance(quantizer, Sulq)
        )

    def _observed(
        self, site: QuantizationSite, quantizer: Quantizer, statistics: Statistics
    ) -> tuple[Tensor, Tensor | None]:
        if self._uses_histogram(quantizer):
            values, counts = statistics.get(site.name, Histogram)
            return values, counts
        samples = statistics.get(site.name, Samples)
        assert isinstance(samples, Tensor)
        return samples, None

    # Sequential form

    def _walk(
        self,
        graph: CapturedGraph,
        pending: list[tuple[QuantizationSite, Quantizer]],
        context: PassContext,
    ) -> None:
        by_target = {site.quantizer: (site, quantizer) for site, quantizer in pending}
        operands: dict[fx.Node, list[Tensor]] = {}
        taps = {
            node: partial(operands.__setitem__, node)
            for node in (_other_operand(s) for s, q in pending if isinstance(q, Sulq))
        }

        def visit(node: fx.Node, values: list[Tensor]) -> None:
            if str(node.target) in by_target:
                site, quantizer = by_target[str(node.target)]
                stacked, counts = self._stacked(site, quantizer, values)
                if isinstance(quantizer, Sulq):
                    quantizer.search(stacked, self._product(site, operands))
                else:
                    self._set(graph, site, quantizer, stacked, counts, context.generator)

        source = context.source
        if self.config.images is not None:
            source = FirstImages(source, self.config.images)
        context.engine.walk(graph, source, visit, taps=taps)

    @staticmethod
    def _product(
        site: QuantizationSite, operands: dict[fx.Node, list[Tensor]]
    ) -> Callable[[Tensor], Tensor]:
        """Return the product that reads probabilities, as a function of them."""
        node = _other_operand(site)
        if node not in operands:
            raise PassError(f"{site.name}: what it is multiplied with is computed after it")
        other = torch.cat(operands.pop(node), dim=_rows_of_an_image(node)[0])
        if site.index == 0:
            return lambda probs: probs @ other
        return lambda probs: other @ probs

    def _stacked(
        self, site: QuantizationSite, quantizer: Quantizer, values: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the values of all batches, as a histogram where each is tried many times."""
        if self.config.method == "mse" and self._uses_histogram(quantizer):
            histogram = Histogram()
            for value in values:
                histogram.update(value)
            return histogram.result()
        axis, _ = _rows_of_an_image(site.value)
        return torch.cat(values, dim=axis) if len(values) > 1 else values[0], None

    def _set(
        self,
        graph: CapturedGraph,
        site: QuantizationSite,
        quantizer: Quantizer,
        values: Tensor,
        counts: Tensor | None,
        generator: torch.Generator,
    ) -> None:
        if isinstance(quantizer, Sulq):
            quantizer.search(values, None)
            return
        config: RangeConfig = self.config
        reader = None
        if config.method == "output_mse":
            reader = _linear_reader(graph, site)
            if reader is None:  # weights, products and convolutions are judged by themselves
                config = RangeConfig(
                    method="mse",
                    steps=config.steps,
                    smallest=config.smallest,
                    include_zero=config.include_zero,
                )
            else:
                values = _some_rows(values, self.config.sample_tokens, generator)
        if not site.stored and type(quantizer.spec.granularity) is not PerTensor:
            config = _without_zero(config)
        fit_range(quantizer, values, config, counts=counts, reader=reader)


def _rows_of_an_image(value: fx.Node) -> tuple[int, int]:
    """Return the axis that grows with the batch, and by how much: windows may share it."""
    for axis, extent in enumerate(info(value).shape):
        match = re.fullmatch(r"(?:(\d+)\*)?B", str(extent))
        if match is not None:
            return axis, int(match[1] or 1)
    return 0, 1


def _other_operand(site: QuantizationSite) -> fx.Node:
    """Return the tensor that one at a product is multiplied with, not quantized."""
    source = node_argument(site.reader, 1 - site.index)
    return node_argument(source, 0) if is_quantizer(source) else source


def _without_zero(config: RangeConfig) -> RangeConfig:
    return RangeConfig(
        method=config.method,
        percentiles=config.percentiles,
        steps=config.steps,
        smallest=config.smallest,
        include_zero=False,
    )


def _linear_reader(
    graph: CapturedGraph, site: QuantizationSite
) -> Callable[[Tensor], Tensor] | None:
    """Return ``x -> x W^T`` for the input of a linear, ``None`` for other sites."""
    if site.operation != "linear" or site.index != 0:
        return None
    weight_node = node_argument(site.reader, 1)
    if is_quantizer(weight_node):
        weight_node = node_argument(weight_node, 0)
    weight = graph.parameter(str(weight_node.target))
    return lambda x: x @ weight.T


def _some_rows(values: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Return at most ``limit`` rows of the last axis, and every row that holds an extreme."""
    rows = values.reshape(-1, values.shape[-1])
    if len(rows) <= limit:
        return rows
    chosen = torch.randperm(len(rows), generator=generator)[:limit]
    extremes = torch.stack([rows.amax(dim=1).argmax(), rows.amin(dim=1).argmin()])
    return rows[torch.cat([chosen, extremes])]
