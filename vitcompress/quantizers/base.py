"""The quantizer module: parameters in, fake-quantized values or integer codes out.

The law of every format: ``forward(x)`` equals ``dequantize(quantize(x))`` bit for bit. It
holds by construction, since ``forward`` is written that way.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitcompress.errors import ConfigError
from vitcompress.quantizers.spec import QuantSpec

__all__ = ["Quantizer"]


class Quantizer(nn.Module, ABC):
    """One number format at one site of a graph.

    Attributes:
        spec: Bits, format, granularity.
        site: Name of the site it serves, for messages and reports.
        frozen: The input is codes already (a stored weight); ``forward`` only dequantizes.
    """

    parameter_names: ClassVar[tuple[str, ...]]
    #: The format reads only the upper end of a range.
    one_sided: ClassVar[bool] = False

    def __init__(self, spec: QuantSpec, site: str = "") -> None:
        super().__init__()
        self.spec = spec
        self.site = site
        self.frozen = False
        for name in self.parameter_names:
            self.register_buffer(name, None)

    @property
    def calibrated(self) -> bool:
        """Whether every parameter has a value."""
        return all(getattr(self, name) is not None for name in self.parameter_names)

    def load(self, **parameters: Tensor) -> None:
        """Set the parameters of the format.

        Args:
            **parameters: One float tensor for each of ``parameter_names``, all of one shape.

        Raises:
            ConfigError: A name is missing or unknown, or a value is not finite.
        """
        if set(parameters) != set(self.parameter_names):
            raise ConfigError(
                f"{self.site}: expected parameters {sorted(self.parameter_names)}, "
                f"found {sorted(parameters)}"
            )
        for name, value in parameters.items():
            if not torch.isfinite(value).all():
                raise ConfigError(f"{self.site}: {name} holds values that are not finite")
            setattr(self, name, value.detach().to(torch.float32).clone())

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set the parameters that cover ``[low, high]``, each shaped like one parameter."""
        self.load(**self.parameters_for(low, high))

    def variants(self) -> Sequence["Quantizer"]:
        """Return quantizers of this spec that differ in what a range leaves open."""
        return [self]

    def approximate(self, groups: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return what quantization in a trial range would make of the values.

        Args:
            groups: Values as ``[G, n]``, one row for each set of parameters.
            low: Lower ends, ``[G]``.
            high: Upper ends, ``[G]``.

        Returns:
            ``[G, n]``. The quantizer's own parameters are neither read nor changed.
        """
        parameters = {n: p[:, None] for n, p in self.parameters_for(low, high).items()}
        return self.decode(self.encode(groups, **parameters), **parameters)

    def quantize(self, x: Tensor) -> Tensor:
        """Return the codes of ``x``, same shape; int8 or uint8 (float32 when not strict)."""
        granularity = self.spec.granularity
        codes = self.encode(granularity.view(x), **self._broadcast(x))
        return codes.reshape(x.shape).to(self.code_dtype)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the values of ``codes``, same shape, float32."""
        granularity = self.spec.granularity
        values = self.decode(
            granularity.view(codes.to(torch.float32)), **self._broadcast(codes)
        )
        return values.reshape(codes.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the fake-quantized values, or the values of ``x`` as codes when frozen."""
        return self.dequantize(x if self.frozen else self.quantize(x))

    def _broadcast(self, x: Tensor) -> dict[str, Tensor]:
        if not self.calibrated:
            raise ConfigError(f"{self.site}: quantizer has no parameters yet; calibrate first")
        granularity = self.spec.granularity
        return {
            name: granularity.broadcast(getattr(self, name), x)
            for name in self.parameter_names
        }

    @property
    @abstractmethod
    def code_dtype(self) -> torch.dtype:
        """The dtype of codes."""

    @abstractmethod
    def parameters_for(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Return the parameters that cover ``[low, high]``, each of the shape of ``low``."""

    @abstractmethod
    def encode(self, x: Tensor, **parameters: Tensor) -> Tensor:
        """Return codes as float whole numbers; parameters broadcast against ``x``."""

    @abstractmethod
    def decode(self, codes: Tensor, **parameters: Tensor) -> Tensor:
        """Return the values of float codes; parameters broadcast against ``codes``."""

    @abstractmethod
    def levels(self) -> int:
        """Return how many distinct values one set of parameters can produce."""

    @abstractmethod
    def defect(self) -> str | None:
        """Return why this quantizer is not a strict b-bit one, or ``None`` if it is."""
