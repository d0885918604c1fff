"""Uniform quantization with a scale and a zero point."""

from typing import ClassVar

import torch
from torch import Tensor

from vitcompress.errors import ConfigError
from vitcompress.numerics.affine import (
    affine_parameters,
    code_bounds,
    dequantize_affine,
    quantize_affine,
)
from vitcompress.quantizers.base import Quantizer

__all__ = ["Affine"]


class Affine(Quantizer):
    """``(clamp(round(x / scale) + zero_point) - zero_point) * scale``."""

    parameter_names: ClassVar[tuple[str, ...]] = ("scale", "zero_point")
    scale: Tensor
    zero_point: Tensor

    def load(self, **parameters: Tensor) -> None:
        super().load(**parameters)
        if self.spec.strict and self._fractional():
            raise ConfigError(f"{self.site}: a strict quantizer needs whole zero points")

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and largest code."""
        return code_bounds(self.spec.bits, self.spec.symmetric)

    @property
    def code_dtype(self) -> torch.dtype:
        if not self.spec.strict:
            return torch.float32
        return torch.int8 if self.spec.symmetric else torch.uint8

    def parameters_for(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        scale, zero_point = affine_parameters(
            low, high, bits=self.spec.bits, symmetric=self.spec.symmetric
        )
        return {"scale": scale, "zero_point": zero_point}

    def encode(self, x: Tensor, **parameters: Tensor) -> Tensor:
        qmin, qmax = self.bounds
        return quantize_affine(x, qmin=qmin, qmax=qmax, **parameters)

    def decode(self, codes: Tensor, **parameters: Tensor) -> Tensor:
        return dequantize_affine(codes, **parameters)

    def levels(self) -> int:
        # A zero point between two codes puts both clamp edges off the grid: one level more.
        on_grid: int = 2**self.spec.bits
        return on_grid + int(self._fractional())

    def defect(self) -> str | None:
        qmin, qmax = self.bounds
        if self._fractional():
            return (
                f"zero point {self.zero_point.flatten()[0].item():.3f} is not a whole number"
            )
        outside = (self.zero_point < qmin) | (self.zero_point > qmax)
        if bool(outside.any()):
            return (
                f"zero point {self.zero_point[outside][0].item():.0f} outside [{qmin}, {qmax}]"
            )
        return None

    def _fractional(self) -> bool:
        return bool((self.zero_point != torch.round(self.zero_point)).any())
