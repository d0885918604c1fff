"""Curvature of a loss at a point, from gradients alone.

g is the gradient of the loss where dz was added to its minimum z; for a quadratic loss of
Hessian H, ``g = H dz``.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["DiagonalFit", "RankOneFit", "row_sums"]

_TINY = torch.finfo(torch.float32).tiny


def row_sums(
    gradient: Callable[[Tensor], Tensor], points: Iterable[Tensor], share: float = 1e-3
) -> Tensor:
    """Return the mean over samples of ``|g(z + delta 1) - g(z - delta 1)| / (2 delta)``.

    It is the magnitude of the row sums of the Hessian: its diagonal only where the Hessian is
    diagonal (Wu et al., "APHQ-ViT", CVPR 2025, arXiv:2504.02508).

    Args:
        gradient: Gradient of the loss summed over a batch; of the shape of its argument.
        points: z, batch by batch, ``[B, ...]``.
        share: delta as a share of the root mean square of z. The published 1e-6 is lost in
            single precision where |z| is 16 and more.

    Returns:
        ``[...]``, the shape of one sample.
    """
    total, count = torch.zeros(()), 0
    for z in points:
        delta = share * z.square().mean().sqrt().clamp(min=1e-12)
        difference = gradient(z + delta) - gradient(z - delta)
        found = (difference / (2.0 * delta)).abs().sum(dim=0)
        total, count = total.to(z.device) + found, count + len(z)
    return total / max(count, 1)


class DiagonalFit:
    """The diagonal H that fits ``g = H dz`` best: ``sum g dz / sum dz^2``.

    Source: LS-ViT, CVPR 2026, as reported by others.
    """

    def __init__(self) -> None:
        self._products = self._squares = torch.zeros(())

    def update(self, gradients: Tensor, errors: Tensor) -> None:
        """Take in a batch of g and dz, ``[B, d]`` each."""
        self._products = self._products.to(errors.device) + (gradients * errors).sum(dim=0)
        self._squares = self._squares.to(errors.device) + errors.square().sum(dim=0)

    def result(self) -> Tensor:
        """Return the diagonal, ``[d]``; noise below 0 counts as 0."""
        return (self._products / self._squares.clamp(min=_TINY)).clamp(min=0.0)


class RankOneFit:
    """The u whose ``u u^T`` fits ``g = u (u^T dz)`` best: ``sum g sqrt(c) / sum c``.

    ``c = dz^T g`` is the square of ``u^T dz``, whose sign it does not tell. Each sample is
    aligned with the sum of those before it. Samples with c <= 0 say nothing and are left out.

    Source: LS-ViT, CVPR 2026, as reported by others, who do not mention the sign; without the
    alignment, samples of either sign cancel.
    """

    def __init__(self) -> None:
        self._sum = self._weight = torch.zeros(())

    def update(self, gradients: Tensor, errors: Tensor) -> None:
        """Take in a batch of g and dz, ``[B, d]`` each."""
        weights = (gradients * errors).sum(dim=1).clamp(min=0.0)
        scaled = gradients * weights.sqrt()[:, None]
        for sample in scaled:
            against = self._sum.dim() > 0 and bool(self._sum @ sample < 0)
            self._sum = self._sum.to(sample.device) + (-sample if against else sample)
        self._weight = self._weight.to(errors.device) + weights.sum()

    def result(self) -> Tensor:
        """Return u, ``[d]``, up to its sign."""
        return self._sum / self._weight.clamp(min=_TINY)
