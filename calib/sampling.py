"""Which samples are chosen: a seeded order of candidates, and how far down it we have come."""

from collections.abc import Sequence

import numpy as np

from calib.errors import SourceError


def candidate_order(
    count: int, labels: Sequence[int] | None, samples: int | None, seed: int
) -> list[int]:
    """Return sample numbers in the order in which they are considered.

    Without labels this is a seeded permutation. With labels the permutation is sorted, stably,
    by the rank of each sample within its class, so every prefix is as class-balanced as it can
    be; with one sample per class both are the same.

    Args:
        count: Samples available.
        labels: Class of each sample, or None.
        samples: How many are wanted; None wants all of them, in their own order.
        seed: Seed of the permutation, in [0, 2**32).
    """
    if samples is None:
        return list(range(count))
    # RandomState is frozen by NumPy's policy: the choice stays the same across releases.
    permutation: list[int] = np.random.RandomState(seed).permutation(count).tolist()
    if labels is None:
        return permutation
    seen: dict[int, int] = {}
    ranks = []
    for number in permutation:
        label = labels[number]
        ranks.append(seen.get(label, 0))
        seen[label] = ranks[-1] + 1
    return [permutation[place] for place in np.argsort(ranks, kind="stable")]


def check_settings(samples: int | None, seed: int, batch_size: int) -> None:
    """Check what every source takes.

    Raises:
        SourceError: A number is out of bounds.
    """
    if samples is not None and samples < 1:
        raise SourceError(f"samples must be at least 1, or None for all, found {samples}")
    if batch_size < 1:
        raise SourceError(f"batch_size must be at least 1, found {batch_size}")
    if not 0 <= seed < 2**32:
        raise SourceError(f"seed must be in [0, 2**32), found {seed}")


class Choice:
    """The samples settled on so far: accepted ones, rejected ones, and those still to examine.

    Copies of a source share one choice, so a sample is examined once whoever asks first.

    Args:
        order: Sample numbers as candidates, from ``candidate_order``.
        wanted: How many to accept; None accepts every readable one.
    """

    def __init__(self, order: Sequence[int], wanted: int | None) -> None:
        self._order = order
        self._position = 0
        self.wanted = len(order) if wanted is None else min(wanted, len(order))
        self.accepted: list[int] = []
        self.rejected: list[tuple[int, str]] = []

    def pending(self) -> int | None:
        """Return the sample to examine next, or None when the choice is complete."""
        if len(self.accepted) == self.wanted or self._position == len(self._order):
            return None
        return self._order[self._position]

    def accept(self) -> None:
        """Take the pending sample."""
        self.accepted.append(self._order[self._position])
        self._position += 1

    def reject(self, reason: str) -> None:
        """Leave the pending sample out for good."""
        self.rejected.append((self._order[self._position], reason))
        self._position += 1
