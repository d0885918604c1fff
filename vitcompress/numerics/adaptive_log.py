"""Logarithmic quantization with an adaptive base: AdaLog.

Source: Wu et al., "AdaLog: Post-Training Quantization for Vision Transformers with Adaptive
Logarithm Quantizer", ECCV 2024, arXiv:2407.12951. The base is ``2^(q / 37)`` for a whole
number q, so that a code splits into a shift and one of 37 mantissas of b + 1 bits.
Deviation: the largest code means zero. The published form counts zero on top of ``2^b``
powers, which b bits cannot hold; it is available as ``strict=False``.
"""

import math

import torch
from torch import Tensor

__all__ = ["STEPS_PER_OCTAVE", "adaptive_log_codes", "adaptive_log_table"]

#: r of the paper: the base is a power of ``2^(1 / r)``.
STEPS_PER_OCTAVE = 37


def adaptive_log_codes(
    x: Tensor, scale: Tensor, numerator: Tensor, *, bits: int, strict: bool
) -> Tensor:
    """Return the codes ``round(-log2(x / scale) * 37 / q)``.

    Args:
        x: Values, any shape; those above ``scale`` saturate to code 0.
        scale: Largest representable value, positive, broadcastable to ``x``.
        numerator: q, positive, broadcastable to ``x``.
        bits: Width of a code.
        strict: The largest code means zero. Otherwise zero is an extra code ``2^bits``.
    """
    zero_code = 2**bits - 1 if strict else 2**bits
    # The natural logarithm, as runtimes have it; it is several times as fast besides.
    logs = torch.log(torch.clamp(x, min=0.0) / scale)
    steps = logs.mul_(-STEPS_PER_OCTAVE / math.log(2.0) / numerator)
    return steps.round_().clamp_(0, zero_code)


def adaptive_log_table(numerator: int, *, bits: int, strict: bool) -> Tensor:
    """Return each code's value at scale 1, ``[2^bits]`` float32 (one more if not strict).

    Args:
        numerator: q.
        bits: Width of a code; mantissas are rounded to one bit more.
        strict: As in :func:`adaptive_log_codes`.
    """
    powers = 2**bits - 1 if strict else 2**bits
    steps = torch.arange(powers, dtype=torch.float64) * numerator
    shifts = torch.floor(steps / STEPS_PER_OCTAVE)
    largest = 2 ** (bits + 1) - 2
    mantissas = torch.exp2(-(steps % STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE)
    mantissas = torch.round(mantissas * largest) / largest
    values = torch.exp2(-shifts) * mantissas
    return torch.cat([values, torch.zeros(1, dtype=torch.float64)]).float()
