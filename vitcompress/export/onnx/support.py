"""What ONNX can express of our quantizers, and how their parameters are written there."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vitcompress.errors import ExportError
from vitcompress.quantizers import (
    Affine,
    Codebook,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantizer,
)

__all__ = ["axis_of", "bias_codes", "half_range", "stored_rows", "unsupported_sites"]

_INT32_MAX = 2**31 - 1


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


def axis_of(quantizer: Quantizer) -> dict[str, Any]:
    """Return the attributes that place a quantizer's parameters along an axis."""
    granularity = quantizer.spec.granularity
    if isinstance(granularity, PerChannel):
        return {"axis": granularity.axis}
    if isinstance(granularity, PerGroup):
        return {"axis": 1, "block_size": granularity.size}
    return {}


def bias_codes(
    bias: NDArray[Any], quantizer: Affine, stored: Affine
) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
    """Return a bias in whole steps of ``s_x s_w`` and the steps.

    Args:
        bias: ``[O]`` float.
        quantizer: Of the input, per tensor.
        stored: Of the weight, per tensor or row.

    Returns:
        Codes and steps, ``[O]`` each; ``None`` where int32 steps cannot express the bias.
    """
    values = bias.astype(np.float64)
    steps = quantizer.scale.double().numpy() * stored.scale.double().numpy()
    scale = np.broadcast_to(steps, values.shape).astype(np.float32)
    codes = np.rint(values / scale)
    apart = np.abs(values / scale - codes) > 1e-3 + 1e-6 * np.abs(codes)
    if apart.any() or np.abs(codes).max(initial=0.0) > _INT32_MAX:
        return None
    return codes.astype(np.int32), scale


def stored_rows(weight: ir.Value) -> int:
    """Return the number of output rows of a weight.

    Raises:
        ExportError: The shape is not static.
    """
    rows = weight.shape[0] if weight.shape is not None else None
    if not isinstance(rows, int):
        raise ExportError(f"{weight.name}: the weight has no static shape")
    return rows
