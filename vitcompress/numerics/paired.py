"""Two runs over the same images: how far apart are they, and could that be chance?

The image is the unit, since images are what was drawn from a population; seeds are not. With
several seeds, the gain of an image is the number of seeds in which it went from wrong to
right, less the number in which it went from right to wrong.

The test is exact: under the hypothesis that the change did nothing, every gain is as likely as
its negative, so the distribution of their sum follows by convolution. With one seed the gains
are -1, 0 and 1, and this is McNemar's exact test (the binomial of the discordant pairs).

Sources: McNemar, "Note on the sampling error of the difference between correlated proportions
or percentages", Psychometrika 1947. Fisher, "The Design of Experiments", 1935, section 21, for
flipped signs. Bonett and Price, "Adjusted Wald confidence interval for a difference of
binomial proportions based on paired data", Journal of Educational and Behavioral Statistics
2012.
Deviation: their two invented images, one gained and one lost, are added to gains over several
seeds as well. They keep the interval from closing where no image changed.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CONFIDENCE",
    "PairedDifference",
    "mean_interval",
    "paired_difference",
    "sign_flip_p",
]

CONFIDENCE = 0.95
_Z = 1.959964  # the normal quantile of CONFIDENCE, two-sided

Outcomes = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The difference of two shares over the same images.

    Attributes:
        images: How many there are.
        gained: Those that are right in more seeds than before.
        lost: Those that are right in fewer.
        difference_pp: Share of right answers now less before, percentage points.
        low_pp: Lower end of the interval of that difference.
        high_pp: Upper end.
        p_value: Two-sided, exact: the chance of a difference at least this large if the change
            did nothing.
    """

    images: int
    gained: int
    lost: int
    difference_pp: float
    low_pp: float
    high_pp: float
    p_value: float

    @property
    def significant(self) -> bool:
        """Whether chance alone would give as much in less than one case of twenty."""
        return self.p_value < 1 - CONFIDENCE


def paired_difference(before: Outcomes, after: Outcomes) -> PairedDifference:
    """Return how two runs differ, with a test and an interval.

    Args:
        before: Whether each image was right, ``[S, N]``: one row for each seed.
        after: The same seeds and images in the same order.

    Raises:
        ValueError: The shapes differ, or there is no image.
    """
    if before.shape != after.shape or before.ndim != 2 or before.size == 0:
        raise ValueError(f"expected equal shapes [S, N], got {before.shape}, {after.shape}")
    seeds, images = before.shape
    gains = after.sum(axis=0, dtype=np.int64) - before.sum(axis=0, dtype=np.int64)
    shares = np.concatenate([gains / seeds, [1.0, -1.0]])
    middle = float(shares.mean())
    reach = _Z * math.sqrt(float(shares.var()) / len(shares))
    return PairedDifference(
        images=images,
        gained=int((gains > 0).sum()),
        lost=int((gains < 0).sum()),
        difference_pp=100.0 * float(gains.sum()) / (seeds * images),
        low_pp=100.0 * max(middle - reach, -1.0),
        high_pp=100.0 * min(middle + reach, 1.0),
        p_value=sign_flip_p(gains),
    )


def sign_flip_p(gains: NDArray[np.int64]) -> float:
    """Return the chance that random signs give a sum at least as far from 0.

    Args:
        gains: Whole numbers, ``[N]``; zeros have no sign and do not count.
    """
    sizes, counts = np.unique(np.abs(gains[gains != 0]), return_counts=True)
    chances = np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        # The sum of `count` gains of +-size lies on every second multiple of size.
        spread = np.zeros(2 * size * count + 1)
        spread[:: 2 * size] = _fair_coins(count)
        chances = np.convolve(chances, spread)
    sums = np.arange(len(chances)) - len(chances) // 2
    return min(1.0, float(chances[np.abs(sums) >= abs(int(gains.sum()))].sum()))


def _fair_coins(count: int) -> NDArray[np.float64]:
    """Return the chance of 0 to ``count`` heads among fair coins, ``[count + 1]``."""
    logs = np.array([math.lgamma(number + 1) for number in range(count + 1)])
    chances: NDArray[np.float64] = np.exp(logs[-1] - logs - logs[::-1] - count * math.log(2))
    return chances


def mean_interval(outcomes: Outcomes) -> tuple[float, float]:
    """Return the interval of a share over images, in percent.

    Agresti and Coull, "Approximate is better than exact for interval estimation of binomial
    proportions", The American Statistician 1998: two right and two wrong images are added.

    Args:
        outcomes: Whether each image was right, ``[S, N]``; seeds of one image are averaged.
    """
    shares = np.concatenate([outcomes.mean(axis=0), [1.0, 1.0, 0.0, 0.0]])
    middle = float(shares.mean())
    reach = _Z * math.sqrt(float(shares.var()) / len(shares))
    return 100.0 * max(middle - reach, 0.0), 100.0 * min(middle + reach, 1.0)
