"""Uniform quantization: scale and zero point from a range, codes, and back.

Rounding is half to even, division by the scale is a division, and the zero point is added
after rounding: the semantics of ONNX ``QuantizeLinear`` and ``DequantizeLinear``.
"""

import torch
from torch import Tensor

__all__ = [
    "affine_parameters",
    "code_bounds",
    "dequantize_affine",
    "quantize_affine",
    "smallest_scale",
]


def code_bounds(bits: int, symmetric: bool) -> tuple[int, int]:
    """Return ``(qmin, qmax)``: signed codes if the format is symmetric, else unsigned."""
    if symmetric:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def smallest_scale(absmax: Tensor) -> Tensor:
    """Return the least scale allowed for groups whose largest magnitude is ``absmax``.

    A constant or all-zero group has an empty range; a scale of 0 would turn it into NaN.
    """
    return torch.clamp(1e-6 * absmax, min=1e-8)


def affine_parameters(
    low: Tensor, high: Tensor, *, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return the scale and the zero point that cover ``[low, high]``.

    Args:
        low: Lower ends, any shape, float.
        high: Upper ends, same shape; ``high >= low``.
        bits: Width of a code, 2 to 8.
        symmetric: Codes centred on 0 with zero point 0; the wider end decides.

    Returns:
        ``(scale, zero_point)``, both of the shape of ``low`` and float. An asymmetric zero
        point is a whole number, and lies in ``[0, 2^bits - 1]`` when ``low <= 0 <= high``.
    """
    absmax = torch.maximum(low.abs(), high.abs())
    if symmetric:
        scale = absmax / (2 ** (bits - 1) - 1)
        # A group of zeros keeps scale 1: its codes are all 0, and a bias measured in steps of
        # this scale stays far from overflow.
        return torch.where(absmax > 0, scale, torch.ones_like(scale)), torch.zeros_like(scale)
    scale = torch.maximum((high - low) / (2**bits - 1), smallest_scale(absmax))
    scale = torch.where(absmax > 0, scale, torch.ones_like(scale))
    return scale, torch.round(-low / scale)


def quantize_affine(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, qmin: int, qmax: int
) -> Tensor:
    """Return ``clamp(round(x / scale) + zero_point, qmin, qmax)`` as float whole numbers."""
    return torch.clamp(torch.round(x / scale) + zero_point, qmin, qmax)


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return ``(codes - zero_point) * scale``."""
    return (codes - zero_point) * scale
