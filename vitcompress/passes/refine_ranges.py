"""Refine the ranges of the noisiest sites by what the whole network answers.

Ours; no paper. A few channels of a trained vision transformer carry activations hundreds of
times larger than the rest (Sun et al., "Massive Activations in Large Language Models", COLM
2024, arXiv:2402.17762, section 5 for vision transformers). Judged by the error at the site
itself, a range must cover them, and leaves every other channel a handful of codes. The network
hardly reads their size: the next LayerNorm divides by it. So the few sites whose own noise
stands out are given the range under which the logits move least.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from vitcompress.calibration import MinMax, QuantizationNoise, Request
from vitcompress.errors import ConfigError
from vitcompress.graph import CapturedGraph, QuantizationSite, enumerate_sites
from vitcompress.numerics.metrics import kl_divergence
from vitcompress.passes.base import Fact, PassContext, PassReport, quantizers_of, register
from vitcompress.quantizers import Affine, PerTensor

__all__ = ["RefineRanges", "RefineRangesConfig"]


@dataclass(frozen=True, kw_only=True)
class RefineRangesConfig:
    """Settings of refine_ranges.

    Attributes:
        margin_db: A site qualifies when its signal-to-noise ratio lies this far below the
            median of all activation sites.
        sites: Most sites refined, noisiest first.
        steps: Ranges tried at each site; each costs one run over the calibration images.
        smallest: Least fraction of the range that is tried, in (0, 1).
    """

    margin_db: float = 8.0
    sites: int = 2
    steps: int = 8
    smallest: float = 0.02

    def __post_init__(self) -> None:
        if self.margin_db <= 0.0:
            raise ConfigError(f"margin_db: expected a value above 0, got {self.margin_db}")
        if self.sites < 1 or self.steps < 1:
            raise ConfigError("sites and steps: expected at least 1")
        if not 0.0 < self.smallest < 1.0:
            raise ConfigError(f"smallest: expected a value in (0, 1), got {self.smallest}")


def outstanding(noise_db: dict[str, float], config: RefineRangesConfig) -> list[str]:
    """Return the names of sites whose noise stands out, noisiest first.

    Args:
        noise_db: Signal-to-noise ratio of each activation site in dB.
        config: ``margin_db`` and ``sites`` are read.
    """
    if not noise_db:
        return []
    median = float(torch.tensor(list(noise_db.values())).median())
    found = [name for name, ratio in noise_db.items() if ratio < median - config.margin_db]
    return sorted(found, key=lambda name: noise_db[name])[: config.sites]


def candidate_ranges(
    low: Tensor, high: Tensor, config: RefineRangesConfig
) -> list[tuple[Tensor, Tensor]]:
    """Return ranges of which only the wider end shrinks, never below the narrower one.

    The other end is that of ordinary values, e.g. the -0.17 of GELU, and stays.

    Args:
        low: Least value seen, scalar, at most 0.
        high: Largest value seen, scalar, at least 0.
        config: ``steps`` and ``smallest`` are read.
    """
    ranges = []
    for fraction in torch.logspace(0.0, math.log10(config.smallest), config.steps):
        if high >= -low:
            ranges.append((low, torch.maximum(high * fraction, -low)))
        else:
            ranges.append((torch.minimum(low * fraction, -high), high))
    return ranges


@register
class RefineRanges:
    """Search the ranges of outstanding sites by the divergence of the logits."""

    name: ClassVar[str] = "refine_ranges"
    config_type: ClassVar[type] = RefineRangesConfig
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.FINAL})
    provides: frozenset[Fact] = frozenset({Fact.CALIBRATED})
    preserves_function: ClassVar[bool] = True

    def __init__(self, config: RefineRangesConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        candidates = _candidates(graph)
        return [
            *(
                Request(s.name, partial(QuantizationNoise, quantizer))
                for s, quantizer in candidates
            ),
            *(Request(site.name, MinMax) for site, _ in candidates),
        ]

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        candidates = {site.name: quantizer for site, quantizer in _candidates(graph)}
        noise_db: dict[str, float] = {}
        for name in candidates:
            ratio = context.statistics.get(name, QuantizationNoise)
            assert isinstance(ratio, Tensor)
            noise_db[name] = float(ratio)
        chosen = outstanding(noise_db, self.config)
        refined: dict[str, list[float]] = {}
        if chosen:
            target = context.engine.logits(context.reference, context.source)
        for name in chosen:
            quantizer = candidates[name]
            before = _range(quantizer)
            low, high = context.statistics.get(name, MinMax)
            seen = low.clamp(max=0.0), high.clamp(min=0.0)
            found = self._search(graph, quantizer, seen, target, context)
            if found is not None:
                refined[name] = [float(end) for end in (*before, *found)]
        return PassReport(
            changed=len(refined),
            found=len(candidates),
            details={"noise_db": {n: noise_db[n] for n in chosen}, "ranges": refined},
        )

    def _search(
        self,
        graph: CapturedGraph,
        quantizer: Affine,
        seen: tuple[Tensor, Tensor],
        target: Tensor,
        context: PassContext,
    ) -> tuple[Tensor, Tensor] | None:
        """Leave the best range in place; return it, or ``None`` if it is the present one."""
        present = {name: getattr(quantizer, name) for name in quantizer.parameter_names}
        least = _divergence(graph, target, context)
        best = None
        for candidate in candidate_ranges(*seen, self.config):
            quantizer.set_range(*candidate)
            divergence = _divergence(graph, target, context)
            if divergence < least:
                least, best = divergence, candidate
        if best is None:
            quantizer.load(**present)
        else:
            quantizer.set_range(*best)
        return best


def _candidates(graph: CapturedGraph) -> list[tuple[QuantizationSite, Affine]]:
    """Return the per-tensor affine activation quantizers, each with its first site."""
    known = quantizers_of(graph)
    found: dict[str, tuple[QuantizationSite, Affine]] = {}
    for site in enumerate_sites(graph).values():
        quantizer = known.get(site.quantizer or "")
        if site.stored or not isinstance(quantizer, Affine):
            continue
        if type(quantizer.spec.granularity) is PerTensor and quantizer.defect() is None:
            found.setdefault(str(site.quantizer), (site, quantizer))
    return list(found.values())


def _range(quantizer: Affine) -> tuple[Tensor, Tensor]:
    qmin, qmax = quantizer.bounds
    low = (qmin - quantizer.zero_point) * quantizer.scale
    return low, (qmax - quantizer.zero_point) * quantizer.scale


def _divergence(graph: CapturedGraph, target: Tensor, context: PassContext) -> float:
    """Return the mean KL divergence of the logits from those of the float model, in nats."""
    found = context.engine.logits(graph, context.source)
    return float(kl_divergence(target, found).mean())
