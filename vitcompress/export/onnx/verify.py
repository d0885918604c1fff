"""Does the file run, agree with the graph it came from, and run as integers?

The runtime works in a process of its own: a crash in native code then fails the verification and
not the caller. What it ran as is read from the graph that the runtime itself optimised.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcompress.errors import ExportError
from vitcompress.graph import CapturedGraph
from vitcompress.numerics.metrics import cosine

__all__ = ["Verification", "verify"]

#: Fused operators of onnxruntime that multiply integers.
INTEGER_OPS = (
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
    "QLinearConv",
    "ConvInteger",
)
TIMEOUT_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the runtime did.

    Attributes:
        runtime: Name and version.
        images: How many images both sides computed.
        cosine: Between the outputs of all images.
        top1_agreement_percent: Images on which the largest output is the same.
        max_difference: Largest difference, relative to the largest output.
        integer_linears: Linears whose product runs on integers.
        linears: Quantized linears in the file.
        float_linears: Those that fell out, with the reason as far as it is known.
        integer_ops: Fused integer operators in the optimised graph, by type.
    """

    runtime: str
    images: int
    cosine: float
    top1_agreement_percent: float
    max_difference: float
    integer_linears: int
    linears: int
    float_linears: dict[str, str]
    integer_ops: dict[str, int]


def verify(
    path: Path,
    captured: CapturedGraph,
    images: Tensor,
    *,
    linears: Sequence[str],
    reasons: dict[str, str],
) -> Verification:
    """Return what onnxruntime makes of a file, compared with the graph.

    Args:
        path: ONNX file.
        captured: Graph it was exported from.
        images: ``[N, C, H, W]``; run in one batch, then the first alone, to try both extents.
        linears: Names of the quantized linears in the file.
        reasons: Why some of them are known not to be integer products.

    Raises:
        ExportError: The file is not valid, does not run, or depends on the batch size.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name}: not valid ONNX: {error}") from error
    with torch.no_grad():
        expected = captured.logits(images)
    found, single, facts = _run_apart(path, images)
    if not np.allclose(single, found[:1], rtol=1e-3, atol=1e-3 * np.abs(found).max()):
        raise ExportError(
            f"{path.name}: the result for an image depends on the batch it is in"
        )
    actual = torch.from_numpy(found)
    integer, fell_out = _coverage(facts["nodes"], linears, reasons)
    counts = {op: facts["ops"][op] for op in INTEGER_OPS if facts["ops"].get(op)}
    return Verification(
        runtime=facts["runtime"],
        images=len(images),
        cosine=cosine(expected, actual),
        top1_agreement_percent=100.0
        * float((expected.argmax(-1) == actual.argmax(-1)).double().mean()),
        max_difference=float((expected - actual).abs().max() / expected.abs().max()),
        integer_linears=integer,
        linears=len(linears),
        float_linears=fell_out,
        integer_ops=counts,
    )


def _coverage(
    nodes: Sequence[Sequence[str]], linears: Sequence[str], reasons: dict[str, str]
) -> tuple[int, dict[str, str]]:
    """Count linears among the fused integer nodes, by the names they kept."""
    integer = {name for op, name in nodes if op in INTEGER_OPS}
    others = {name: op for op, name in nodes if op not in INTEGER_OPS}
    fell_out = {}
    for name in linears:
        if not any(
            found == name or found.startswith((f"{name}_", f"{name}/")) for found in integer
        ):
            seen = (
                f"runs as {others[name]}"
                if name in others
                else "was fused into something else"
            )
            fell_out[name] = reasons.get(name, seen)
    return len(linears) - len(fell_out), fell_out


def _run_apart(
    path: Path, images: Tensor
) -> tuple[NDArray[np.float32], NDArray[np.float32], dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="vitcompress-verify-") as folder:
        inputs, results = Path(folder) / "images.npy", Path(folder) / "results.npz"
        np.save(inputs, images.numpy())
        # As a file: as a module it would import this whole package, and torch, first.
        command = [sys.executable, "-P", str(Path(__file__).with_name("session.py"))]
        try:
            done = subprocess.run(
                [*command, str(path), str(inputs), str(results)],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"{path.name}: onnxruntime did not finish in {TIMEOUT_SECONDS} s"
            ) from error
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ExportError(f"{path.name}: onnxruntime cannot run it: {lines[-1]}")
        facts = json.loads(done.stdout.splitlines()[-1])
        with np.load(results, allow_pickle=False) as arrays:
            return arrays["all"], arrays["first"], facts
