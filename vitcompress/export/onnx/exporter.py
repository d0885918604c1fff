"""Export a compressed graph to an ONNX file that is checked before anyone sees it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor

from vitcompress.errors import ConfigError, ExportError
from vitcompress.export.onnx.attention import fusable_attentions
from vitcompress.export.onnx.lowerings import Lowering
from vitcompress.export.onnx.program import marked_model
from vitcompress.export.onnx.spelling import fix_batch, quantize_early, sums_in_front_of_norms
from vitcompress.export.onnx.support import unsupported_sites
from vitcompress.export.onnx.targets import Target, find_target
from vitcompress.export.onnx.verify import Verification, verify
from vitcompress.export.rewrites import rewritten
from vitcompress.graph import CapturedGraph
from vitcompress.quantizers import Affine, Quantizer

__all__ = ["METADATA_KEY", "ExportResult", "export_onnx"]

#: Key of the JSON that a file carries about itself.
METADATA_KEY = "vitcompress"
#: First opset with INT2 tensors.
INT2_OPSET = 25


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """An exported file.

    Attributes:
        target: Name of the target.
        opset: ONNX opset.
        size_bytes: Size of the file.
        verification: What onnxruntime made of it.
        fused_attention: Attention cores written as one operator.
        unfused_attention: The others, with the reason.
        rewrites: How many places each rewrite changed; see ``export.rewrites``.
        batch: Images in one inference; ``None`` for any number.
    """

    target: str
    opset: int
    size_bytes: int
    verification: Verification
    fused_attention: int = 0
    unfused_attention: Mapping[str, str] = field(default_factory=dict)
    rewrites: Mapping[str, int] = field(default_factory=dict)
    batch: int | None = None


def export_onnx(
    captured: CapturedGraph,
    path: Path,
    images: Tensor,
    *,
    target: str = "ort-cpu",
    batch: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ExportResult:
    """Write an ONNX file for a target and verify it in onnxruntime.

    Args:
        captured: A finished graph (weights frozen).
        path: File to write; the caller moves it into place.
        images: A few preprocessed images for the comparison, ``[N, C, H, W]``.
        target: ``ort-cpu`` or ``generic``.
        batch: Images in one inference; any number by default.
        metadata: JSON types, stored in the file.

    Raises:
        ConfigError: The target is unknown, or the batch is not positive.
        ExportError: A site cannot be written (all are listed), or the file fails verification.
    """
    spelling = find_target(target)
    if batch is not None and batch < 1:
        raise ConfigError(f"batch: expected a whole number of at least 1, got {batch}")
    quantizers = _quantizers(captured)
    refused = unsupported_sites(quantizers)
    if refused:
        listed = "; ".join(f"{site}: {reason}" for site, reason in list(refused.items())[:5])
        more = f"; and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise ExportError(f"{len(refused)} sites cannot be written to ONNX: {listed}{more}")
    rewrites: dict[str, int] = {}
    if spelling.rewrites:
        simpler = rewritten(captured)
        captured, rewrites = simpler.graph, simpler.changed
        quantizers = _quantizers(captured)
    opset = _opset(spelling, quantizers)
    fuses = spelling.attention == "fused"
    fused, unfused = fusable_attentions(captured) if fuses else ([], {})
    model = marked_model(captured, opset=opset, fuse_attention=fuses)
    lowering = Lowering(model, quantizers, spelling)
    lowering.run()
    if spelling.linear == "integer":
        quantize_early(model)
    if spelling.residual == "sum":
        sums_in_front_of_norms(model)
    if batch is not None:
        fix_batch(model, batch)
    model.producer_name = "vitcompress"
    model.metadata_props[METADATA_KEY] = json.dumps(dict(metadata or {}), sort_keys=True)
    ir.save(model, path)
    verification = verify(
        path,
        captured,
        images,
        codes=lowering.codes,
        linears=[*lowering.gemms, *lowering.not_gemm],
        reasons=lowering.not_gemm,
    )
    return ExportResult(
        target=target,
        opset=opset,
        size_bytes=path.stat().st_size,
        verification=verification,
        fused_attention=len(fused),
        unfused_attention=unfused,
        rewrites=rewrites,
        batch=batch,
    )


def _quantizers(captured: CapturedGraph) -> dict[str, Quantizer]:
    return {t: q for t, q in captured.quantizers().items() if isinstance(q, Quantizer)}


def _opset(target: Target, quantizers: Mapping[str, Quantizer]) -> int:
    stores_int2 = any(
        isinstance(q, Affine) and q.frozen and q.spec.bits == 2 for q in quantizers.values()
    )
    return INT2_OPSET if stores_int2 and target.low_bit_weights == "cast" else target.opset
