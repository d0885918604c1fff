"""What a quantizer is to do: bits, format and granularity, as frozen data."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from vitcompress.errors import ConfigError

__all__ = ["Granularity", "PerChannel", "PerGroup", "PerHead", "PerTensor", "QuantSpec"]


@dataclass(frozen=True)
class PerTensor:
    """One set of parameters for the whole tensor: ``[197, 192]`` has 1."""

    def parameter_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of ``scale`` for a tensor of ``shape``."""
        return ()

    def group(self, x: Tensor) -> Tensor:
        """Return ``x`` as ``[G, n]``: one row for each set of parameters."""
        return x.reshape(1, -1)

    def view(self, x: Tensor) -> Tensor:
        """Return ``x`` in a shape that ``broadcast`` parameters fit."""
        return x

    def broadcast(self, parameter: Tensor, x: Tensor) -> Tensor:
        """Return the parameter shaped to broadcast against ``view(x)``."""
        return parameter


@dataclass(frozen=True)
class PerChannel(PerTensor):
    """One set for each index along ``axis``: a weight ``[576, 192]`` with axis 0 has 576."""

    axis: int = 0

    def parameter_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[self.axis],)

    def group(self, x: Tensor) -> Tensor:
        return x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)

    def broadcast(self, parameter: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return parameter.reshape(shape)


@dataclass(frozen=True)
class PerHead(PerChannel):
    """One set for each attention head; ``axis`` is the head axis of ``[B, H, N, D]``."""

    axis: int = 1


@dataclass(frozen=True)
class PerGroup(PerTensor):
    """One set per ``size`` neighbours of an output row: ``[576, 192]`` of 64 has 576 x 3."""

    size: int = 64

    def parameter_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        row = 1
        for extent in shape[1:]:
            row *= extent
        if row % self.size:
            raise ConfigError(
                f"group size {self.size} does not divide a weight row of {row} values; "
                "choose a divisor"
            )
        return (shape[0], row // self.size)

    def group(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.size)

    def view(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, self.size)

    def broadcast(self, parameter: Tensor, x: Tensor) -> Tensor:
        return parameter.unsqueeze(-1)


Granularity = PerTensor | PerChannel | PerHead | PerGroup

_GRANULARITIES: dict[str, type[PerTensor]] = {
    "per_tensor": PerTensor,
    "per_channel": PerChannel,
    "per_head": PerHead,
    "per_group": PerGroup,
}


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Settings of one quantizer.

    Attributes:
        bits: Width of a code, 2 to 8.
        format: ``affine``, ``log2``, ``log_sqrt2``, ``sulq`` or ``adalog``.
        symmetric: Signed codes with zero point 0 (affine only).
        granularity: Which values share one scale.
        strict: At most ``2^bits`` levels and whole zero points in range. ``False`` reproduces
            published behaviour that needs one level more; it cannot be exported.
    """

    bits: int
    format: str = "affine"
    symmetric: bool = False
    granularity: Granularity = PerTensor()
    strict: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"bits must be between 2 and 8, got {self.bits}")

    def describe(self) -> str:
        """Return the spec in a few characters, e.g. ``u8 per_tensor`` or ``log_sqrt2:4``."""
        kind = _kind(self.granularity)
        if isinstance(self.granularity, PerGroup):
            kind += f"({self.granularity.size})"
        loose = "" if self.strict else " (not strict)"
        if self.format == "affine":
            return f"{'s' if self.symmetric else 'u'}{self.bits} {kind}{loose}"
        return f"{self.format}:{self.bits} {kind}{loose}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; :meth:`from_dict` is the inverse."""
        granularity = {"kind": _kind(self.granularity), **asdict(self.granularity)}
        return {**asdict(self), "granularity": granularity}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "QuantSpec":
        """Return the spec that :meth:`to_dict` wrote.

        Raises:
            ConfigError: A field is missing, unknown or out of range.
        """
        try:
            granularity = dict(fields["granularity"])
            kind = _GRANULARITIES[granularity.pop("kind")]
            return cls(**{**fields, "granularity": kind(**granularity)})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a quantizer spec: {fields!r} ({error})") from error


def _kind(granularity: Granularity) -> str:
    return next(name for name, kind in _GRANULARITIES.items() if type(granularity) is kind)
