"""SULQ, the shift-uniform-log2 format of I&S-ViT for attention probabilities."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from vitcompress.numerics.shifted_log import (
    SHIFTS,
    last_code,
    shifted_log_codes,
    shifted_log_values,
)
from vitcompress.quantizers.codebook import Codebook

__all__ = ["Sulq"]


class Sulq(Codebook):
    """``2^e - shift``, the exponents e spread evenly over the range that was seen.

    With a shift that is a power of two, zero is represented.
    """

    parameter_names: ClassVar[tuple[str, ...]] = ("shift", "low", "high")
    shift: Tensor
    low: Tensor
    high: Tensor

    @property
    def steps(self) -> int:
        """Number of steps between the least and the largest logarithm."""
        return last_code(self.spec.bits, self.spec.strict)

    def parameters_for(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        # As many octaves as there are codes; beyond 20 a shift is lost in single precision.
        return self._with_shift(low, high, 2.0 ** -min(self.steps, 20))

    def search(
        self, values: Tensor, reader: Callable[[Tensor], Tensor] | None
    ) -> dict[str, float]:
        """Set the parameters under which an error is least; return each candidate's error.

        Args:
            values: Probabilities; per-tensor granularity.
            reader: What is computed from them. Its mean squared error decides, or that of the
                probabilities themselves if it is ``None`` or the format is not strict.
        """
        # With a power of two zero is represented, which most of the published ones lack.
        shifts = (*SHIFTS, *(2.0**-k for k in range(1, 21))) if self.spec.strict else SHIFTS
        judge = reader if reader is not None and self.spec.strict else torch.nn.Identity()
        expected = judge(values)
        low, high = values.amin(), values.amax()
        errors: dict[str, float] = {}
        best: dict[str, Tensor] = {}
        for shift in dict.fromkeys(shifts):
            parameters = self._with_shift(low, high, shift)
            # The public code searches with one step less than it quantizes with.
            steps = last_code(self.spec.bits, strict=True)
            codes = shifted_log_codes(values, **parameters, steps=steps)
            found = judge(shifted_log_values(codes, **parameters, steps=steps))
            error = float((found - expected).square().mean())
            if not errors or error < min(errors.values()):
                best = parameters
            errors[f"{shift:.7g}"] = error
        self.load(**best)
        return errors

    def unit_table(self) -> Tensor:
        codes = torch.arange(self.levels(), dtype=torch.float32, device=self.shift.device)
        return self.decode(codes, shift=self.shift, low=self.low, high=self.high)

    def table(self) -> Tensor:
        return self.unit_table()

    def encode(self, x: Tensor, **parameters: Tensor) -> Tensor:
        return shifted_log_codes(x, **parameters, steps=self.steps)

    def decode(self, codes: Tensor, **parameters: Tensor) -> Tensor:
        return shifted_log_values(codes, **parameters, steps=self.steps)

    def levels(self) -> int:
        return self.steps + 1

    def _with_shift(self, low: Tensor, high: Tensor, shift: float) -> dict[str, Tensor]:
        shifts = torch.full_like(high, shift)
        least, largest = (torch.log2(end.clamp(min=0.0) + shifts) for end in (low, high))
        return {"shift": shifts, "low": least, "high": largest}
