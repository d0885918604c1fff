"""Search for the range a quantizer should cover: min-max, percentile, MSE, output-MSE.

The percentile form with several candidates is the search of RepQ-ViT (arXiv:2212.08254, public
code): try a few clips symmetric in probability and keep the one of least mean squared error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitcompress.errors import ConfigError, PassError
from vitcompress.numerics.search import best_candidate, shrunk_ranges, tail_quantiles
from vitcompress.quantizers import PerChannel, Quantizer

__all__ = ["RangeConfig", "fit_range", "search_range"]

Method = Literal["minmax", "percentile", "mse", "output_mse"]


@dataclass(frozen=True, kw_only=True)
class RangeConfig:
    """How a range is found.

    Attributes:
        method: ``minmax`` takes the extremes; ``percentile`` the best of ``percentiles`` by
            mean squared error; ``mse`` the best of ``steps`` shrunk ranges by mean squared
            error; ``output_mse`` the same by the error of what the reader computes.
        percentiles: Upper probabilities in [0.5, 1]; one alone is taken without a search.
        steps: Number of candidates of ``mse`` and ``output_mse``.
        smallest: Least fraction of the full range that is tried, in (0, 1).
        include_zero: Widen ranges that leave out 0, so that zero points are codes. Ranges of
            per-channel activations are exempt: theirs vanish when they are folded.
    """

    method: Method = "mse"
    percentiles: tuple[float, ...] = (0.999, 0.9999, 0.99999)
    steps: int = 32
    smallest: float = 0.05
    include_zero: bool = True

    def __post_init__(self) -> None:
        if not self.percentiles or not all(0.5 <= p <= 1.0 for p in self.percentiles):
            raise ConfigError(
                f"percentiles: expected values in [0.5, 1], got {list(self.percentiles)}"
            )
        if self.steps < 1:
            raise ConfigError(f"steps: expected at least 1, got {self.steps}")
        if not 0.0 < self.smallest < 1.0:
            raise ConfigError(f"smallest: expected a value in (0, 1), got {self.smallest}")


def search_range(
    quantizer: Quantizer,
    values: Tensor,
    config: RangeConfig,
    *,
    counts: Tensor | None = None,
    reader: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the range that ``config`` finds for a quantizer.

    Args:
        quantizer: Gives format, bits and granularity; not changed.
        values: The tensor at its site, or bin centres if ``counts`` is given.
        config: Method and candidates.
        counts: How often each value occurs, ``[n]``; per-tensor quantizers only.
        reader: What the next operation computes from the (approximated) tensor; needed by
            ``output_mse``.

    Returns:
        ``(low, high)``, of the shape of one parameter.

    Raises:
        PassError: The values are not finite.
        ConfigError: ``output_mse`` without ``reader``.
    """
    low, high, _ = _search(quantizer, values, config, counts, reader, scored=False)
    return low, high


def fit_range(
    quantizer: Quantizer,
    values: Tensor,
    config: RangeConfig,
    *,
    counts: Tensor | None = None,
    reader: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Set a quantizer to the best range of its best variant; see :func:`search_range`."""
    variants = quantizer.variants()
    found: dict[str, Tensor] = {}
    least = math.inf
    for variant in variants:
        low, high, loss = _search(
            variant, values, config, counts, reader, scored=len(variants) > 1
        )
        if not found or float(loss.sum()) < least:
            least, found = float(loss.sum()), variant.parameters_for(low, high)
    quantizer.load(**found)


def _search(
    quantizer: Quantizer,
    values: Tensor,
    config: RangeConfig,
    counts: Tensor | None,
    reader: Callable[[Tensor], Tensor] | None,
    *,
    scored: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best range, and its loss ``[G]``: 0 for a lone candidate unless scored."""
    if not torch.isfinite(values).all():
        raise PassError(f"{quantizer.site}: calibration saw values that are not finite")
    granularity = quantizer.spec.granularity
    shape = granularity.parameter_shape(tuple(values.shape))
    groups = granularity.group(values)
    low, high = _candidates(groups, counts, config)
    if config.include_zero:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if quantizer.one_sided:
        low = torch.zeros_like(low)
    if len(low) == 1 and not scored:
        return low[0].reshape(shape), high[0].reshape(shape), torch.zeros(1)
    loss = _loss(quantizer, values, groups, counts, config, reader)
    best_low, best_high, least = best_candidate(low, high, loss)
    return best_low.reshape(shape), best_high.reshape(shape), least


def _candidates(
    groups: Tensor, counts: Tensor | None, config: RangeConfig
) -> tuple[Tensor, Tensor]:
    """Return candidate ranges as ``low [K, G], high [K, G]``."""
    if config.method == "minmax":
        low, high = torch.aminmax(groups, dim=1)
        return low[None], high[None]
    if config.method == "percentile":
        if counts is None:
            return tail_quantiles(groups, config.percentiles)
        return _histogram_quantiles(groups[0], counts, config.percentiles)
    return shrunk_ranges(groups, steps=config.steps, smallest=config.smallest)


def _histogram_quantiles(
    centres: Tensor, counts: Tensor, probabilities: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    ranks = torch.cumsum(counts, dim=0)
    last = float(ranks[-1]) - 1.0
    wanted = torch.tensor(probabilities, dtype=torch.float64)
    high = centres[
        torch.searchsorted(ranks, wanted * last, right=True).clamp(max=len(ranks) - 1)
    ]
    low = centres[torch.searchsorted(ranks, (1.0 - wanted) * last, right=True)]
    return low[:, None], high[:, None]


def _loss(
    quantizer: Quantizer,
    values: Tensor,
    groups: Tensor,
    counts: Tensor | None,
    config: RangeConfig,
    reader: Callable[[Tensor], Tensor] | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from one candidate range ``[G], [G]`` to its loss ``[G]``."""
    if config.method != "output_mse":

        def mean_squared_error(low: Tensor, high: Tensor) -> Tensor:
            error = (quantizer.approximate(groups, low, high) - groups).square_()
            if counts is not None:
                return (error.double() * counts).sum(dim=1)
            return error.mean(dim=1)

        return mean_squared_error
    if reader is None:
        raise ConfigError(
            f"{quantizer.site}: output_mse needs a linear or product that reads it"
        )
    target = reader(values)

    def output_error(low: Tensor, high: Tensor) -> Tensor:
        if isinstance(quantizer.spec.granularity, PerChannel):
            raise ConfigError(f"{quantizer.site}: output_mse searches per-tensor ranges only")
        approximated = quantizer.approximate(groups, low, high).reshape(values.shape)
        return (reader(approximated) - target).square().mean().reshape(1)

    return output_error
