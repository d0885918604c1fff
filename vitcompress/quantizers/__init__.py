"""Number formats: a closed set, each with quantize, dequantize and a table or affine map."""

from vitcompress.errors import ConfigError
from vitcompress.quantizers.adalog import AdaLog
from vitcompress.quantizers.affine import Affine
from vitcompress.quantizers.base import Quantizer
from vitcompress.quantizers.codebook import Codebook
from vitcompress.quantizers.log import Log2, LogSqrt2
from vitcompress.quantizers.spec import (
    Granularity,
    PerChannel,
    PerGroup,
    PerHead,
    PerTensor,
    QuantSpec,
)
from vitcompress.quantizers.sulq import Sulq

__all__ = [
    "FORMATS",
    "AdaLog",
    "Affine",
    "Codebook",
    "Granularity",
    "Log2",
    "LogSqrt2",
    "PerChannel",
    "PerGroup",
    "PerHead",
    "PerTensor",
    "QuantSpec",
    "Quantizer",
    "Sulq",
    "make_quantizer",
]

#: Format name in a spec -> class.
FORMATS: dict[str, type[Quantizer]] = {
    "affine": Affine,
    "log2": Log2,
    "log_sqrt2": LogSqrt2,
    "sulq": Sulq,
    "adalog": AdaLog,
}


def make_quantizer(spec: QuantSpec, site: str = "") -> Quantizer:
    """Return an uncalibrated quantizer for ``spec``.

    Raises:
        ConfigError: The format is unknown.
    """
    if spec.format not in FORMATS:
        raise ConfigError(f"{site}: unknown format '{spec.format}'; known: {sorted(FORMATS)}")
    return FORMATS[spec.format](spec, site)
