"""Distances between a reference and its approximation."""

import torch
from torch import Tensor

__all__ = ["cosine", "kl_divergence", "sqnr_db"]


def sqnr_db(signal_power: float, noise_power: float) -> float:
    """Return the signal-to-quantization-noise ratio in dB; infinite when there is no noise."""
    if noise_power == 0.0:
        return float("inf")
    if signal_power == 0.0:
        return float("-inf")
    return float(
        10.0 * torch.log10(torch.tensor(signal_power / noise_power, dtype=torch.float64))
    )


def cosine(reference: Tensor, found: Tensor) -> float:
    """Return the cosine of the angle between two tensors, each taken as one vector."""
    a, b = reference.flatten().double(), found.flatten().double()
    norms = a.norm() * b.norm()
    return 1.0 if norms == 0.0 else float(a @ b / norms)


def kl_divergence(reference: Tensor, found: Tensor) -> Tensor:
    """Return KL(softmax(reference) || softmax(found)) of each row in nats.

    Args:
        reference: Logits, ``[B, O]``.
        found: Logits, ``[B, O]``.

    Returns:
        ``[B]`` float64, never negative beyond rounding.
    """
    p = torch.log_softmax(reference.double(), dim=-1)
    q = torch.log_softmax(found.double(), dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)
