"""Base of non-uniform formats: an encode rule and a table of at most ``2^bits`` values."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from vitcompress.quantizers.base import Quantizer

__all__ = ["Codebook"]


class Codebook(Quantizer):
    """A format whose values are ``scale * table[code]``."""

    parameter_names: ClassVar[tuple[str, ...]] = ("scale",)
    one_sided: ClassVar[bool] = True
    scale: Tensor

    @abstractmethod
    def unit_table(self) -> Tensor:
        """Return the value of each code for scale 1, float32."""

    def table(self) -> Tensor:
        """Return the value of each code, float32; per tensor only."""
        return self.unit_table() * self.scale

    @property
    def code_dtype(self) -> torch.dtype:
        # The extra zero code of a format that is not strict needs a ninth bit at 8 bits.
        return torch.uint8 if self.spec.strict else torch.int16

    def parameters_for(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        return {"scale": torch.where(high > 0, high, torch.ones_like(high))}

    def decode(self, codes: Tensor, **parameters: Tensor) -> Tensor:
        return self.unit_table().to(codes.device)[codes.long()] * parameters["scale"]

    def levels(self) -> int:
        return len(self.unit_table())

    def defect(self) -> str | None:
        if self.levels() > 2**self.spec.bits:
            return f"{self.levels()} levels, {self.spec.bits} bits hold {2**self.spec.bits}"
        return None
