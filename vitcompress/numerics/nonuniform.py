"""Logarithmic quantization of values in [0, s]: log2, log-sqrt(2) and its parity form.

Source: Li et al., "RepQ-ViT", ICCV 2023, arXiv:2212.08254, sections 3.2 and 3.3.
Deviation: one code is kept for zero. The published form counts zero on top of ``2^b`` powers,
which is one level more than b bits can hold; it is available as ``strict=False``.
"""

import math

import torch
from torch import Tensor

__all__ = ["log_codes", "log_table", "parity_table"]

#: sqrt(2) rounded to float32: with it both forms of the table agree bit for bit.
SQRT2 = float(torch.tensor(math.sqrt(2.0), dtype=torch.float32))


def log_codes(
    x: Tensor, scale: Tensor, *, bits: int, steps_per_octave: float, strict: bool
) -> Tensor:
    """Return the codes ``round(-steps_per_octave * log2(x / scale))``.

    Args:
        x: Values, any shape; those above ``scale`` saturate to code 0.
        scale: Largest representable value, positive, broadcastable to ``x``.
        bits: Width of a code.
        steps_per_octave: 1 for log2, 2 for log-sqrt(2).
        strict: The largest code means zero. Otherwise zero is an extra code ``2^bits``.

    Returns:
        Float whole numbers in ``[0, 2^bits - 1]`` (``2^bits`` when not strict). Zero and
        values too small for the last power get the zero code.
    """
    zero_code = 2**bits - 1 if strict else 2**bits
    # log2(0) is -inf and lands on the zero code; negative values are not probabilities but
    # must not become NaN codes.
    codes = torch.round(-steps_per_octave * torch.log2(torch.clamp(x, min=0.0) / scale))
    return torch.clamp(codes, 0, zero_code)


def log_table(*, bits: int, steps_per_octave: float, strict: bool) -> Tensor:
    """Return each code's value at scale 1, ``[2^bits]`` float32 (one more if not strict)."""
    powers = 2**bits - 1 if strict else 2**bits
    codes = torch.arange(powers, dtype=torch.float32)
    if steps_per_octave == 1:
        values = torch.exp2(-codes)
    else:
        values = torch.exp2(-torch.ceil(codes / 2)) * torch.where(codes % 2 == 1, SQRT2, 1.0)
    return torch.cat([values, torch.zeros(1)])


def parity_table(scale: Tensor, *, bits: int, strict: bool) -> Tensor:
    """Return the log-sqrt(2) table as ``s~(q) * 2^(-ceil(q / 2))`` (section 3.3).

    The scale absorbs the factor sqrt(2) of odd codes, so that what remains is a shift.

    Args:
        scale: Scalar, float32.
        bits: Width of a code.
        strict: As in :func:`log_codes`.

    Returns:
        ``[2^bits]`` float32 (one more if not strict); the last entry is 0.
    """
    powers = 2**bits - 1 if strict else 2**bits
    codes = torch.arange(powers, dtype=torch.float32)
    parity_scale = torch.where(codes % 2 == 1, scale * SQRT2, scale)
    values = parity_scale * torch.exp2(-torch.ceil(codes / 2))
    return torch.cat([values, torch.zeros(1)])
