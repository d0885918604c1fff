"""What quantization does at each site: noise, ranges, and the channels that rule a range."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from tqdm import tqdm

from vitcompress.calibration import CalibrationSource
from vitcompress.calibration.interpreter import run
from vitcompress.graph import CapturedGraph, QuantizationSite, enumerate_sites
from vitcompress.numerics.metrics import sqnr_db
from vitcompress.quantizers import Quantizer

__all__ = ["SiteMeasurement", "measure_activations"]


@dataclass(frozen=True, kw_only=True)
class SiteMeasurement:
    """Figures of one activation site.

    Attributes:
        low: Least value seen.
        high: Largest value seen.
        rms: Root mean square.
        peak_ratio: Largest magnitude over the root mean square.
        peak_channel: Channel (last axis) that holds the largest magnitude.
        runner_up_ratio: The same ratio without that channel: far smaller where one unit alone
            rules the range.
        sqnr_db: Signal to noise of the site's own quantizer; ``None`` where the site is float.
    """

    low: float
    high: float
    rms: float
    peak_ratio: float
    peak_channel: int
    runner_up_ratio: float
    sqnr_db: float | None


class _Meter:
    """Sums over batches at one site."""

    def __init__(self, quantizer: Quantizer | None) -> None:
        self.quantizer = quantizer
        self.count = 0
        self.signal = self.noise = 0.0
        self.low, self.high = math.inf, -math.inf
        self.absmax: Tensor | None = None

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        low, high = torch.aminmax(rows, dim=0)
        absmax = torch.maximum(low.abs(), high.abs())
        self.absmax = absmax if self.absmax is None else torch.maximum(self.absmax, absmax)
        self.low, self.high = (
            min(self.low, float(low.min())),
            max(self.high, float(high.max())),
        )
        self.signal += float(x.square().sum(dtype=torch.float64))
        self.count += x.numel()
        if self.quantizer is not None:
            self.noise += float((self.quantizer(x) - x).square().sum(dtype=torch.float64))

    def result(self) -> SiteMeasurement:
        assert self.absmax is not None
        rms = math.sqrt(self.signal / self.count)
        peaks = torch.topk(self.absmax, min(2, len(self.absmax)))
        ratios = [float(peak) / rms if rms > 0 else 0.0 for peak in peaks.values]
        return SiteMeasurement(
            low=self.low,
            high=self.high,
            rms=rms,
            peak_ratio=ratios[0],
            peak_channel=int(peaks.indices[0]),
            runner_up_ratio=ratios[-1],
            sqnr_db=None if self.quantizer is None else sqnr_db(self.signal, self.noise),
        )


def measure_activations(
    graph: CapturedGraph, source: CalibrationSource
) -> dict[str, SiteMeasurement]:
    """Return figures for every activation site, from one run over the data.

    Args:
        graph: Float or compressed; quantizers are on.
        source: Images.
    """
    sites = [s for s in enumerate_sites(graph).values() if not s.stored]
    meters = {site.name: _Meter(_quantizer(graph, site)) for site in sites}
    listening: dict[fx.Node, list[_Meter]] = {}
    for site in sites:
        listening.setdefault(site.value, []).append(meters[site.name])

    def tap(group: list[_Meter], value: Tensor) -> None:
        for meter in group:
            meter.update(value)

    taps = {
        node: (lambda value, group=group: tap(group, value))
        for node, group in listening.items()
    }
    for batch in tqdm(source, desc="measuring", disable=None, leave=False):
        run(graph, batch.images, taps=taps)
    return {name: meter.result() for name, meter in meters.items()}


def _quantizer(graph: CapturedGraph, site: QuantizationSite) -> Quantizer | None:
    if site.quantizer is None:
        return None
    found = graph.module.get_submodule(site.quantizer)
    assert isinstance(found, Quantizer)
    return found
