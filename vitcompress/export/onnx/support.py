"""What ONNX can express of our quantizers, asked before anything is traced."""

from collections.abc import Mapping

from vitcompress.quantizers import Affine, Codebook, PerGroup, PerTensor, Quantizer

__all__ = ["half_range", "unsupported_sites"]


def unsupported_sites(quantizers: Mapping[str, Quantizer]) -> dict[str, str]:
    """Return the sites that cannot be written to ONNX, with the reason for each."""
    found: dict[str, str] = {}
    for quantizer in quantizers.values():
        granularity = quantizer.spec.granularity
        defect = quantizer.defect()
        if not quantizer.calibrated:
            found[quantizer.site] = "has no parameters"
        elif defect is not None and not (quantizer.frozen and _zero_points_fit(quantizer)):
            found[quantizer.site] = f"not strictly {quantizer.spec.bits} bits: {defect}"
        elif quantizer.frozen and not isinstance(quantizer, Affine):
            found[quantizer.site] = f"format {quantizer.spec.format} is not offered on weights"
        elif not quantizer.frozen and isinstance(granularity, PerGroup):
            found[quantizer.site] = "groups are not offered on activations"
        elif isinstance(quantizer, Codebook) and type(granularity) is not PerTensor:
            found[quantizer.site] = "tables are offered per tensor only"
    return found


def _zero_points_fit(quantizer: Quantizer) -> bool:
    """Return whether whole zero points outside the codes still fit an INT8 zero point."""
    if not isinstance(quantizer, Affine):
        return False
    points = quantizer.zero_point - (0 if quantizer.spec.symmetric else half_range(quantizer))
    whole = bool((points == points.round()).all())
    return whole and float(points.min()) >= -128 and float(points.max()) <= 127


def half_range(quantizer: Affine) -> int:
    """Return what turns unsigned codes into signed ones of the same width."""
    return int(2 ** (quantizer.spec.bits - 1))
