"""Sums of convolutions over one input as a single convolution: the arithmetic of kernels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Convolution", "common_window", "embed_kernel", "fused_convolution", "identity"]


@dataclass(frozen=True)
class Convolution:
    """A convolution without dilation and bias.

    Attributes:
        weight: ``[O, C / groups, *k]``, float64.
        padding: Zeros on both sides, one extent for each spatial axis.
        stride: Likewise.
        groups: Groups of channels.
    """

    weight: Tensor
    padding: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int


def common_window(
    kernels: Sequence[Sequence[int]], paddings: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return extent K and padding P of the smallest kernel that holds all the given ones.

    Args:
        kernels: Extents k of each kernel, one for each spatial axis.
        paddings: Its padding p, likewise.

    Returns:
        ``(K, P)`` for each spatial axis. Tap j reads the input at j - p from the window's
        place; with padding P it has to be tap j + (P - p) to read the same.
    """
    padding = tuple(map(max, zip(*paddings, strict=True)))
    ends = [
        [P - p + k for k, p, P in zip(kernel, own, padding, strict=True)]
        for kernel, own in zip(kernels, paddings, strict=True)
    ]
    return tuple(map(max, zip(*ends, strict=True))), padding


def embed_kernel(weight: Tensor, offset: Sequence[int], extent: Sequence[int]) -> Tensor:
    """Return a kernel with zeros around it.

    Args:
        weight: ``[O, I, *k]``.
        offset: Zeros in front, one number for each spatial axis.
        extent: ``K``, likewise; at least ``offset + k``.

    Returns:
        ``[O, I, *K]``.
    """
    axes = zip(weight.shape[2:], offset, extent, strict=True)
    margins = [(before, whole - before - own) for own, before, whole in axes]
    # `pad` counts axes from the last.
    return F.pad(weight, [margin for pair in reversed(margins) for margin in pair])


def identity(channels: int, groups: int, axes: int) -> Convolution:
    """Return the convolution over ``axes`` spatial axes that copies its input."""
    width = channels // groups
    weight = torch.zeros(channels, width, *[1] * axes, dtype=torch.float64)
    index = torch.arange(channels)
    weight[index, index % width] = 1.0
    return Convolution(weight, (0,) * axes, (1,) * axes, groups)


def fused_convolution(parts: Sequence[tuple[Tensor, Convolution]]) -> Convolution | None:
    """Return ``sum_i scale_i * convolution_i`` as one convolution.

    Args:
        parts: ``scale``, ``[O]`` or ``[1]`` float64, and convolution of each summand. Their
            outputs must have the same shape.

    Returns:
        The convolution; ``None`` if strides or groups differ, or if it has more taps than the
        parts have together.
    """
    first = parts[0][1]
    if any((c.stride, c.groups) != (first.stride, first.groups) for _, c in parts):
        return None
    kernels = [c.weight.shape[2:] for _, c in parts]
    extent, padding = common_window(kernels, [c.padding for _, c in parts])
    if math.prod(extent) > sum(map(math.prod, kernels)):
        return None
    weight = first.weight.new_zeros(*first.weight.shape[:2], *extent)
    for scale, c in parts:
        offset = [P - p for P, p in zip(padding, c.padding, strict=True)]
        factor = scale.reshape(-1, *[1] * (weight.dim() - 1))
        weight = weight + factor * embed_kernel(c.weight, offset, extent)
    return Convolution(weight, padding, first.stride, first.groups)
