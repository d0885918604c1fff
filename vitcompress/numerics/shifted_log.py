"""SULQ: uniform quantization of a shifted logarithm.

Source: Zhong et al., "I&S-ViT", arXiv:2311.10126, section 4.1.
Deviation: ``2^bits`` codes. The public code divides the range into ``2^bits`` steps where it
quantizes, though into one less where it searches, and so has one code more than the bits hold;
``strict=False`` does the same.
"""

import torch
from torch import Tensor

__all__ = ["SHIFTS", "last_code", "shifted_log_codes", "shifted_log_values"]

#: The published candidates for the shift.
SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)


def last_code(bits: int, strict: bool) -> int:
    """Return the largest code, which is the number of steps as well."""
    codes: int = 2**bits
    return codes - 1 if strict else codes


def shifted_log_codes(
    x: Tensor, shift: Tensor, low: Tensor, high: Tensor, *, steps: int
) -> Tensor:
    """Return ``round((log2(x + shift) - low) / D)`` with ``D = (high - low) / steps``.

    Args:
        x: Values, not negative; any shape.
        shift: What is added, positive; broadcastable to ``x``.
        low: Least logarithm.
        high: Largest logarithm.
        steps: Number of steps: the largest code.

    Returns:
        Float whole numbers in ``[0, steps]``; the largest stands for the largest value.
    """
    logs = torch.log2(x.clamp(min=0.0) + shift)
    return torch.round((logs - low) / _step(low, high, steps)).clamp(0, steps)


def shifted_log_values(
    codes: Tensor, shift: Tensor, low: Tensor, high: Tensor, *, steps: int
) -> Tensor:
    """Return ``2^e - shift`` with ``e = round(codes D + low)``: a shift and a subtraction."""
    return torch.exp2(torch.round(codes * _step(low, high, steps) + low)) - shift


def _step(low: Tensor, high: Tensor, steps: int) -> Tensor:
    # A constant tensor has an empty range; whatever the step, its code is 0.
    return ((high - low) / steps).clamp(min=1e-6)
