"""AdaLog: a logarithmic format whose base is chosen, for softmax and shifted GELU outputs."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vitcompress.errors import ConfigError
from vitcompress.numerics.adaptive_log import (
    STEPS_PER_OCTAVE,
    adaptive_log_codes,
    adaptive_log_table,
)
from vitcompress.quantizers.base import Quantizer
from vitcompress.quantizers.codebook import looked_up
from vitcompress.quantizers.log import Log2
from vitcompress.quantizers.spec import QuantSpec

__all__ = ["AdaLog"]

#: Bases that calibration tries, as numerators q; the paper takes all of 10 to 138.
_NUMERATORS = range(10, 139, 4)


class AdaLog(Log2):
    """``scale * table(numerator)[code] - shift``.

    The shift makes values with a small negative part positive (0.17 for GELU). The published
    form adds it in front of the code and takes it off in the bias of the reader,
    ``b - shift * sum of W``; here the table holds the values less the shift, which gives the
    same sum and needs no reader with a bias.

    Args:
        spec: Bits, granularity.
        site: Name of the site.
        base: Numerator of :meth:`parameters_for`; 37 is log2.
    """

    parameter_names: ClassVar[tuple[str, ...]] = ("scale", "numerator", "shift")
    one_sided: ClassVar[bool] = False
    numerator: Tensor
    shift: Tensor

    def __init__(self, spec: QuantSpec, site: str = "", base: int = STEPS_PER_OCTAVE) -> None:
        super().__init__(spec, site)
        self.base = base

    def variants(self) -> Sequence[Quantizer]:
        return [AdaLog(self.spec, self.site, base) for base in _NUMERATORS]

    def load(self, **parameters: Tensor) -> None:
        super().load(**parameters)
        # One table serves all groups; only its scale differs.
        first = self.numerator.flatten()[0]
        if bool((self.numerator != first).any()) or first < 1 or first % 1 != 0:
            raise ConfigError(
                f"{self.site}: adalog needs one whole numerator for all groups, found "
                f"{self.numerator.flatten().tolist()[:4]}"
            )

    @property
    def steps_per_octave(self) -> float:
        return STEPS_PER_OCTAVE / float(self.numerator.flatten()[0])

    def unit_table(self) -> Tensor:
        chosen = self.base if self.numerator is None else int(self.numerator.flatten()[0])
        return self._unit_table(chosen)

    def table(self) -> Tensor:
        return super().table() - self.shift

    def parameters_for(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        shift = (-low).clamp(min=0.0)
        width = high + shift
        return {
            "scale": torch.where(width > 0, width, torch.ones_like(width)),
            "numerator": torch.full_like(width, self.base),
            "shift": shift,
        }

    def encode(self, x: Tensor, **parameters: Tensor) -> Tensor:
        return adaptive_log_codes(
            x + parameters["shift"],
            parameters["scale"],
            parameters["numerator"],
            bits=self.spec.bits,
            strict=self.spec.strict,
        )

    def decode(self, codes: Tensor, **parameters: Tensor) -> Tensor:
        table = self._unit_table(int(parameters["numerator"].flatten()[0]))
        return looked_up(table, codes) * parameters["scale"] - parameters["shift"]

    def _unit_table(self, numerator: int) -> Tensor:
        return adaptive_log_table(numerator, bits=self.spec.bits, strict=self.spec.strict)
