"""What ONNX can express of our quantizers, and how their parameters are written there."""

from typing import Any

import torch
from torch import Tensor

from vitcompress.errors import ExportError
from vitcompress.export.onnx.targets import Target
from vitcompress.graph import CapturedGraph
from vitcompress.graph.edit import is_quantizer
from vitcompress.quantizers import (
    Affine,
    Codebook,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantizer,
)

__all__ = [
    "axis_of",
    "check_support",
    "half_range",
    "signed_codes",
]

_INT8 = torch.iinfo(torch.int8)
#: Sites that a message names.
_LISTED = 5
#: The recipe that leaves out the zero points that a target does not take.
_CURES = {"weights": "deploy_symmetric_weights", "everything": "deploy_symmetric"}


def check_support(captured: CapturedGraph, target: Target) -> None:
    """Check that every quantizer of a finished graph can be written for a target.

    Raises:
        ExportError: Some cannot; the message names them with the reason, and the cure.
    """
    codes = _stored_codes(captured)
    refused: dict[str, str] = {}
    unsigned = False
    for name, quantizer in captured.quantizers().items():
        assert isinstance(quantizer, Quantizer)
        reason = _reason_against(quantizer)
        if reason is None:
            reason = _reason_against_signed(quantizer, codes.get(name), target)
            unsigned = unsigned or reason is not None
        if reason is not None:
            refused[quantizer.site] = reason
    if not refused:
        return
    listed = "; ".join(f"{site}: {why}" for site, why in list(refused.items())[:_LISTED])
    more = f"; and {len(refused) - _LISTED} more" if len(refused) > _LISTED else ""
    cure = f"; quantize again with --recipe {_CURES[target.signed]}" if unsigned else ""
    raise ExportError(
        f"{len(refused)} sites cannot be written to ONNX for target {target.name}: "
        f"{listed}{more}{cure}"
    )


def _reason_against(quantizer: Quantizer) -> str | None:
    """Return why a quantizer has no spelling in ONNX at all."""
    granularity = quantizer.spec.granularity
    if not quantizer.calibrated:
        return "has no parameters"
    defect = quantizer.defect()
    if defect is not None and not (quantizer.frozen and _zero_points_fit(quantizer)):
        return f"not strictly {quantizer.spec.bits} bits: {defect}"
    if quantizer.frozen and not isinstance(quantizer, Affine):
        return f"format {quantizer.spec.format} is not offered on weights"
    if not quantizer.frozen and isinstance(granularity, PerGroup):
        return "groups are not offered on activations"
    if isinstance(quantizer, Codebook) and type(granularity) is not PerTensor:
        return "tables are offered per tensor only"
    return None


def _reason_against_signed(
    quantizer: Quantizer, codes: Tensor | None, target: Target
) -> str | None:
    """Return why a quantizer cannot be INT8 with zero point 0 where the target wants that."""
    if target.signed == "nothing" or (target.signed == "weights" and codes is None):
        return None
    granularity = quantizer.spec.granularity
    if not isinstance(quantizer, Affine):
        return f"format {quantizer.spec.format} is no QDQ"
    if codes is not None:
        if isinstance(granularity, PerGroup):
            # OpenVINO runs it, in float; the verification counts it as such.
            return "INT8 weights have no groups" if target.signed == "everything" else None
        found = signed_codes(codes, quantizer)
        least, most = int(found.min()), int(found.max())
    elif type(granularity) is not PerTensor:
        return f"quantized as {quantizer.spec.describe()}; one scale for the tensor is wanted"
    else:
        least, most = (int(end - quantizer.zero_point) for end in quantizer.bounds)
    if _INT8.min <= least and most <= _INT8.max:
        return None
    return f"codes less their zero point reach {least} to {most}, which INT8 does not hold"


def _stored_codes(captured: CapturedGraph) -> dict[str, Tensor]:
    """Return the codes of each frozen quantizer, by target."""
    return {
        str(node.target): captured.parameter(str(node.all_input_nodes[0].target))
        for node in captured.nodes_of_kind("call_module")
        if is_quantizer(node) and node.all_input_nodes[0].op == "get_attr"
    }


def signed_codes(codes: Tensor, quantizer: Affine) -> Tensor:
    """Return codes less their zero points, same shape, float whole numbers."""
    granularity = quantizer.spec.granularity
    points = granularity.broadcast(quantizer.zero_point, codes)
    return (granularity.view(codes.to(torch.float32)) - points).reshape(codes.shape)


def _zero_points_fit(quantizer: Quantizer) -> bool:
    """Return whether whole zero points outside the codes still fit an INT8 zero point."""
    if not isinstance(quantizer, Affine):
        return False
    points = quantizer.zero_point - (0 if quantizer.spec.symmetric else half_range(quantizer))
    whole = bool((points == points.round()).all())
    return whole and float(points.min()) >= _INT8.min and float(points.max()) <= _INT8.max


def half_range(quantizer: Affine) -> int:
    """Return what turns unsigned codes into signed ones of the same width."""
    return int(2 ** (quantizer.spec.bits - 1))


def axis_of(quantizer: Quantizer, *, transposed: bool = False) -> dict[str, Any]:
    """Return the attributes that place a quantizer's parameters along an axis.

    Args:
        quantizer: Of a weight or an activation.
        transposed: Whether a weight of two axes is stored ``[I, O]``.
    """
    granularity = quantizer.spec.granularity
    if isinstance(granularity, PerChannel):
        return {"axis": 1 - granularity.axis if transposed else granularity.axis}
    if isinstance(granularity, PerGroup):
        return {"axis": 0 if transposed else 1, "block_size": granularity.size}
    return {}
