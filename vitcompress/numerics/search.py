"""Ranges of values: extremes, exact tail quantiles, and the best of several candidates."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["best_candidate", "coarse_to_fine", "shrunk_ranges", "tail_quantiles"]


def tail_quantiles(values: Tensor, probabilities: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the quantiles at ``1 - p`` and at ``p`` of each row, interpolated linearly.

    Only the tails are sorted, so this stays exact and cheap for millions of values.

    Args:
        values: ``[G, n]`` float, n >= 1.
        probabilities: Upper probabilities in [0.5, 1].

    Returns:
        ``(low, high)``, each ``[P, G]``.
    """
    count = values.shape[1]
    last = count - 1
    tail = count - int(min(probabilities) * last)
    top = torch.topk(values, tail, dim=1).values  # descending
    bottom = torch.topk(values, tail, dim=1, largest=False).values  # ascending

    def interpolate(ordered: Tensor, probability: float) -> Tensor:
        distance = (1.0 - probability) * last
        index = min(int(distance), tail - 1)
        following = min(index + 1, tail - 1)
        return torch.lerp(ordered[:, index], ordered[:, following], distance - index)

    low = torch.stack([interpolate(bottom, p) for p in probabilities])
    high = torch.stack([interpolate(top, p) for p in probabilities])
    return low, high


def shrunk_ranges(values: Tensor, *, steps: int, smallest: float) -> tuple[Tensor, Tensor]:
    """Return ``steps`` ranges per row, from the full one down to ``smallest`` of it.

    Fractions are spaced evenly in the logarithm, so that a heavy-tailed row is searched as
    finely near its body as near its extremes.

    Args:
        values: ``[G, n]`` float.
        steps: Number of candidates, at least 1.
        smallest: Least fraction of the full range, in (0, 1].

    Returns:
        ``(low, high)``, each ``[steps, G]``; the first candidate is the full range.
    """
    fractions = torch.logspace(0.0, torch.log10(torch.tensor(smallest)).item(), steps)
    low, high = torch.aminmax(values, dim=1)
    return fractions[:, None] * low, fractions[:, None] * high


def best_candidate(
    low: Tensor, high: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each group, the candidate range of least loss; ties keep the earlier one.

    Args:
        low: ``[K, G]`` lower ends of K candidates.
        high: ``[K, G]`` upper ends.
        loss: Maps one candidate, ``low [G], high [G]``, to its loss ``[G]``.

    Returns:
        ``(low, high, loss)``, each ``[G]``.
    """
    best_low, best_high = low[0], high[0]
    best = loss(best_low, best_high)
    for candidate_low, candidate_high in zip(low[1:], high[1:], strict=True):
        found = loss(candidate_low, candidate_high)
        better = found < best
        best = torch.where(better, found, best)
        best_low = torch.where(better, candidate_low, best_low)
        best_high = torch.where(better, candidate_high, best_high)
    return best_low, best_high, best


def coarse_to_fine(
    scales: Tensor,
    points: Tensor,
    step: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    keep: int,
    children: int,
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best combination of each group, refined around the best of a coarse grid.

    Args:
        scales: ``[K, G]``, positive.
        points: What goes with each scale (a zero point, a base), ``[K, G]``; stays as it is.
        step: Distance of neighbouring scales, ``[G]``.
        loss: Maps ``scale [G], point [G]`` to the loss ``[G]``.
        keep: Combinations kept in each round.
        children: Scales tried around each of them, over one step of the round before.
        rounds: Of refinement.

    Returns:
        ``(scale, point, loss)``, each ``[G]``.
    """
    smallest = 1e-3 * scales.amin(dim=0)
    losses = torch.stack([loss(s, p) for s, p in zip(scales, points, strict=True)])
    offsets = torch.linspace(-0.5, 0.5, children)[None, :, None]
    for _ in range(rounds):
        best = torch.topk(losses, min(keep, len(losses)), dim=0, largest=False).indices
        scales, points, losses = (t.gather(0, best) for t in (scales, points, losses))
        around = (scales[:, None] + offsets * step).clamp(min=smallest)
        finer = around.flatten(0, 1)
        beside = points[:, None].expand_as(around).flatten(0, 1)
        found = torch.stack([loss(s, p) for s, p in zip(finer, beside, strict=True)])
        scales, points = torch.cat([scales, finer]), torch.cat([points, beside])
        losses = torch.cat([losses, found])
        step = step / (children - 0.5)
    best = losses.argmin(dim=0, keepdim=True)
    return scales.gather(0, best)[0], points.gather(0, best)[0], losses.gather(0, best)[0]
