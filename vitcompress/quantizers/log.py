"""Logarithmic formats for values in [0, 1], such as attention probabilities."""

from torch import Tensor

from vitcompress.numerics.nonuniform import log_codes, log_table
from vitcompress.quantizers.codebook import Codebook

__all__ = ["Log2", "LogSqrt2"]


class Log2(Codebook):
    """Powers of two below ``scale``, and zero."""

    @property
    def steps_per_octave(self) -> float:
        """Powers for each factor of two."""
        return 1.0

    def unit_table(self) -> Tensor:
        return log_table(
            bits=self.spec.bits,
            steps_per_octave=self.steps_per_octave,
            strict=self.spec.strict,
        )

    def encode(self, x: Tensor, **parameters: Tensor) -> Tensor:
        return log_codes(
            x,
            parameters["scale"],
            bits=self.spec.bits,
            steps_per_octave=self.steps_per_octave,
            strict=self.spec.strict,
        )


class LogSqrt2(Log2):
    """Powers of sqrt(2) below ``scale``, and zero (RepQ-ViT, section 3.3)."""

    @property
    def steps_per_octave(self) -> float:
        return 2.0
