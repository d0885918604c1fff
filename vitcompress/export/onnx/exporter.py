"""Export a compressed graph to an ONNX file that is checked before anyone sees it."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from vitcompress.errors import ConfigError, ExportError
from vitcompress.export.onnx.attention import fusable_attentions
from vitcompress.export.onnx.leftovers import (
    FileSize,
    Leftovers,
    check_leftovers,
    file_size,
    narrowed,
    store_narrow,
)
from vitcompress.export.onnx.lowerings import Lowering
from vitcompress.export.onnx.program import marked_model
from vitcompress.export.onnx.spelling import fix_batch, quantize_early, sums_in_front_of_norms
from vitcompress.export.onnx.structure import violations
from vitcompress.export.onnx.support import check_support
from vitcompress.export.onnx.targets import Target, find_target
from vitcompress.export.onnx.verify import Verification, verify
from vitcompress.export.rewrites import rewritten
from vitcompress.graph import CapturedGraph
from vitcompress.numerics.metrics import cosine
from vitcompress.quantizers import Affine, Quantizer

__all__ = ["METADATA_KEY", "ExportResult", "export_onnx"]

#: Key of the JSON that a file carries about itself.
METADATA_KEY = "vitcompress"
#: First opset with INT2 tensors.
INT2_OPSET = 25
#: Below this cosine, stored tables are not those of the model. One last bit of a float moves
#: the outputs of a quantized network to 0.995, so a table cannot be held to more.
LEAST_LEFTOVER_COSINE = 0.98


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """An exported file.

    Attributes:
        target: Name of the target.
        opset: ONNX opset.
        size_bytes: Size of the file.
        verification: What the target's runtime made of it, or onnxruntime where that did not
            run it.
        not_executed: Why the target's own runtime did not run it; empty where it did.
        size: Where the bytes of the file are.
        leftovers: How tables that no quantizer reads are stored.
        leftover_cosine: Between the outputs with tables stored so and in float32; it is
            the graph with tables stored so that the file was compared with.
        fused_attention: Attention cores written as one operator.
        unfused_attention: The others, with the reason.
        rewrites: How many places each rewrite changed; see ``export.rewrites``.
        batch: Images in one inference; ``None`` for any number.
    """

    target: str
    opset: int
    size_bytes: int
    verification: Verification
    not_executed: str
    size: FileSize
    leftovers: Leftovers
    leftover_cosine: float
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
    leftovers: str = "float32",
    ir_path: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ExportResult:
    """Write an ONNX file for a target and verify it in onnxruntime, and in OpenVINO.

    Args:
        captured: A finished graph (weights frozen).
        path: File to write; the caller moves it into place.
        images: A few preprocessed images for the comparison, ``[N, C, H, W]``.
        target: A name of ``TARGETS``.
        batch: Images in one inference; any number by default.
        leftovers: How tables that no quantizer reads (position embeddings, class tokens) are
            stored: ``float32``, ``float16`` or ``int8``.
        ir_path: ``.xml`` to write as well, the file in OpenVINO's own form; its weights go to
            the ``.bin`` beside it.
        metadata: JSON types, stored in the file.

    Raises:
        ConfigError: The target or the storage is unknown, the batch is not positive, or
            OpenVINO's form is wanted and cannot be made.
        ExportError: A site cannot be written (all are listed), or the file fails verification.
    """
    spelling = find_target(target)
    if batch is not None and batch < 1:
        raise ConfigError(f"batch: expected a whole number of at least 1, got {batch}")
    storage = check_leftovers(leftovers)
    _check_ir(spelling, ir_path)
    check_support(captured, spelling)
    original, captured = captured, narrowed(captured, storage)
    likeness = _likeness(original, captured, images)
    if not likeness >= LEAST_LEFTOVER_COSINE:
        raise ExportError(
            f"{path.name}: leftovers in {storage} move the outputs to cosine {likeness:.4f}, "
            f"expected at least {LEAST_LEFTOVER_COSINE}; store them in more bits"
        )
    rewrites: dict[str, int] = {}
    if spelling.rewrites:
        simpler = rewritten(captured, spelling.rewrites)
        captured, rewrites = simpler.graph, simpler.changed
    quantizers = {t: q for t, q in captured.quantizers().items() if isinstance(q, Quantizer)}
    opset = _opset(spelling, quantizers)
    fuses = spelling.attention == "fused"
    fused, unfused = fusable_attentions(captured) if fuses else ([], {})
    model = marked_model(captured, opset=opset, fuse_attention=fuses)
    lowering = Lowering(model, quantizers, spelling)
    lowering.run()
    store_narrow(lowering.writer, storage)
    lowering.writer.drop_dead()
    if spelling.linear == "integer":
        quantize_early(model)
    if spelling.residual == "sum":
        sums_in_front_of_norms(model)
    if batch is not None:
        fix_batch(model, batch)
    model.producer_name = "vitcompress"
    model.metadata_props[METADATA_KEY] = json.dumps(dict(metadata or {}), sort_keys=True)
    broken = violations(model, spelling)
    if broken:
        raise ExportError(f"{path.name}: not what {target} takes: {'; '.join(broken[:5])}")
    lowering.writer.slim()
    ir.save(model, path)
    found, not_executed = _verified(path, captured, images, lowering, ir_path)
    return ExportResult(
        target=target,
        opset=opset,
        size_bytes=path.stat().st_size,
        verification=found,
        not_executed=not_executed,
        size=file_size(model),
        leftovers=storage,
        leftover_cosine=likeness,
        fused_attention=len(fused),
        unfused_attention=unfused,
        rewrites=rewrites,
        batch=batch,
    )


def _verified(
    path: Path,
    captured: CapturedGraph,
    images: Tensor,
    lowering: Lowering,
    ir_path: Path | None,
) -> tuple[Verification, str]:
    """Return what the target's runtime made of a file, or else onnxruntime, and why."""
    spelling = lowering.target
    reasons = lowering.reasons
    if spelling.linear == "matmul":
        plain = f"target {spelling.name} writes MatMul and Add"
        reasons = {name: reasons.get(name, plain) for name in lowering.linears}
    facts: dict[str, Any] = {"codes": lowering.activations.stored, "linears": lowering.linears}
    found = verify(path, captured, images, reasons=reasons, **facts)
    if spelling.runtime == "onnxruntime":
        return found, ""
    if spelling.runtime == "OpenVINO":
        if not _has_openvino():
            return found, "OpenVINO is not installed; pip install 'vitcompress[openvino]'"
        return verify(
            path,
            captured,
            images,
            reasons=lowering.reasons,
            runtime="OpenVINO",
            ir_path=ir_path,
            **facts,
        ), ""
    intended = spelling.runtime or "the runtime it is meant for, whichever that is,"
    return found, f"{intended} is not here; structure and values were checked"


@torch.no_grad()
def _likeness(original: CapturedGraph, narrow: CapturedGraph, images: Tensor) -> float:
    if original is narrow:
        return 1.0
    return cosine(original.logits(images), narrow.logits(images))


def _check_ir(target: Target, ir_path: Path | None) -> None:
    """Check that OpenVINO's own form can be written if it is wanted.

    Raises:
        ConfigError: It cannot.
    """
    if ir_path is None:
        return
    if target.runtime != "OpenVINO":
        raise ConfigError(f"ir: only target openvino writes it, got target '{target.name}'")
    if not _has_openvino():
        raise ConfigError(
            "ir: OpenVINO writes it and is not installed; pip install 'vitcompress[openvino]'"
        )


def _has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


def _opset(target: Target, quantizers: Mapping[str, Quantizer]) -> int:
    stores_int2 = any(
        isinstance(q, Affine) and q.frozen and q.spec.bits == 2 for q in quantizers.values()
    )
    return INT2_OPSET if stores_int2 and target.int2 else target.opset
