"""Mergeable observers: split the data anywhere, merge, and get the same result.

Extrema, histograms and samples merge exactly, sums to rounding. Each has ``update``, ``merge``
and ``result``; that is all a distributed engine would need.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

__all__ = [
    "ChannelAbsMax",
    "Histogram",
    "MinMax",
    "Observer",
    "QuantizationNoise",
    "Samples",
    "SecondMoment",
]


class Observer(ABC):
    """Accumulates something about the values at one site."""

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in the values of one batch, batch axis first."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what another observer of the same kind has seen."""

    @abstractmethod
    def result(self) -> Tensor | tuple[Tensor, ...]:
        """Return what was accumulated."""


class MinMax(Observer):
    """Least and largest value; ``result`` is ``(low, high)``, scalars."""

    def __init__(self) -> None:
        self.low = torch.tensor(float("inf"))
        self.high = torch.tensor(float("-inf"))

    def update(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def merge(self, other: Self) -> None:
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)

    def result(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class ChannelAbsMax(Observer):
    """Largest magnitude of each channel (last axis); ``result`` is ``[C]``."""

    def __init__(self) -> None:
        self.absmax: Tensor | None = None

    def update(self, x: Tensor) -> None:
        found = x.reshape(-1, x.shape[-1]).abs().amax(dim=0)
        self.absmax = found if self.absmax is None else torch.maximum(self.absmax, found)

    def merge(self, other: Self) -> None:
        if other.absmax is not None:
            self.update(other.absmax[None])

    def result(self) -> Tensor:
        assert self.absmax is not None, "observer saw no data"
        return self.absmax


class SecondMoment(Observer):
    """Sum of ``x x^T`` over tokens; ``result`` is ``(sum [C, C] float64, count [])``."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        product = rows.T @ rows
        self.total = product if self.total is None else self.total + product
        self.count += len(rows)

    def merge(self, other: Self) -> None:
        if other.total is not None:
            self.total = other.total if self.total is None else self.total + other.total
            self.count += other.count

    def result(self) -> tuple[Tensor, Tensor]:
        assert self.total is not None, "observer saw no data"
        return self.total, torch.tensor(self.count)


class QuantizationNoise(Observer):
    """Signal-to-noise ratio under a quantizer; ``result`` is that of the median channel in dB.

    The median channel rather than all together: where one channel is huge, its power alone
    would make the ratio look good however little is left of the others.

    Args:
        quantizer: Maps values to their approximation.
    """

    def __init__(self, quantizer: Callable[[Tensor], Tensor]) -> None:
        self.quantizer = quantizer
        self.signal: Tensor | None = None
        self.noise: Tensor | None = None

    def update(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        noise = (self.quantizer(x) - x).reshape(-1, x.shape[-1])
        self._add(
            rows.square().sum(dim=0, dtype=torch.float64),
            noise.square().sum(dim=0, dtype=torch.float64),
        )

    def merge(self, other: Self) -> None:
        if other.signal is not None and other.noise is not None:
            self._add(other.signal, other.noise)

    def result(self) -> Tensor:
        assert self.signal is not None, "observer saw no data"
        assert self.noise is not None
        alive = self.signal > 0
        if not bool(alive.any()):
            return torch.tensor(float("inf"), dtype=torch.float64)
        return (10.0 * torch.log10(self.signal[alive] / self.noise[alive])).median()

    def _add(self, signal: Tensor, noise: Tensor) -> None:
        self.signal = signal if self.signal is None else self.signal + signal
        self.noise = noise if self.noise is None else self.noise + noise


class Histogram(Observer):
    """Counts in bins fixed by the float format: sign, exponent and eight bits of mantissa.

    Bins are 0.4 % wide relative to their value everywhere, so no range has to be known ahead
    and two histograms merge by addition. ``result`` is ``(values, counts)``: the centres of
    the bins that are not empty, ascending, and how often each was hit. The outermost bins
    stand for the exact extrema.
    """

    SHIFT = 15  # of the 32 bits of a float, 17 remain

    def __init__(self) -> None:
        self.counts = torch.zeros(2 ** (32 - self.SHIFT), dtype=torch.int64)
        self.extrema = MinMax()

    def update(self, x: Tensor) -> None:
        flat = x.detach().float().reshape(-1)
        bins = (flat.contiguous().view(torch.int32) >> self.SHIFT) + 2 ** (31 - self.SHIFT)
        self.counts += torch.bincount(bins, minlength=len(self.counts))
        self.extrema.update(flat)

    def merge(self, other: Self) -> None:
        self.counts = self.counts + other.counts
        self.extrema.merge(other.extrema)

    def result(self) -> tuple[Tensor, Tensor]:
        hit = torch.nonzero(self.counts).flatten()
        bits = ((hit - 2 ** (31 - self.SHIFT)) << self.SHIFT) + 2 ** (self.SHIFT - 1)
        centres = bits.to(torch.int32).view(torch.float32)
        order = torch.argsort(centres)
        low, high = self.extrema.result()
        values = centres[order].clamp(low, high)
        values[0], values[-1] = low, high
        return values, self.counts[hit][order]


class Samples(Observer):
    """The values of a few images, chosen by a hash of their position so that batching is free.

    Args:
        limit: Most images kept.
        seed: Decides which.
        axis: Axis of the images.
        first: Position of the first image in the whole data, for one of several observers
            that are merged.
    """

    def __init__(self, limit: int, seed: int = 0, axis: int = 0, first: int = 0) -> None:
        self.limit = limit
        self.seed = seed
        self.axis = axis
        self.seen = first
        self.kept: dict[int, Tensor] = {}

    def update(self, x: Tensor) -> None:
        for row in x.movedim(self.axis, 0):
            self._offer(self.seen, row)
            self.seen += 1

    def merge(self, other: Self) -> None:
        for index, row in other.kept.items():
            self._offer(index, row)
        self.seen = max(self.seen, other.seen)

    def result(self) -> Tensor:
        return torch.stack([self.kept[index] for index in sorted(self.kept)], dim=self.axis)

    def _offer(self, index: int, row: Tensor) -> None:
        if len(self.kept) == self.limit:
            worst = max(self.kept, key=self._rank)
            if self._rank(index) >= self._rank(worst):
                return
            del self.kept[worst]
        self.kept[index] = row.detach().clone()

    def _rank(self, index: int) -> int:
        # A multiplicative hash (Knuth) of the image's position: cheap, seeded, order-free.
        return ((index + 1) * 2654435761 + self.seed * 40503) % 2**32
