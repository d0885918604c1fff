"""Does the file run, agree with the graph it came from, and run as integers?

The runtime works in a process of its own: a crash in native code then fails the verification
and not the caller. What it ran as is read from the graph that the runtime itself optimised.

Two correct runs of a quantized network drift apart: where a value lies on a rounding boundary,
the last bit of a float decides its code, and one code changes others. So the file is compared
with the graph *in step*: at each quantizer the graph's codes are compared with the runtime's
(they may differ where the value lies on a boundary), and the graph goes on with the runtime's.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcompress.calibration.interpreter import run
from vitcompress.errors import ExportError
from vitcompress.export.onnx.activations import StoredCodes
from vitcompress.export.onnx.coverage import coverage, integer_ops
from vitcompress.graph import CapturedGraph
from vitcompress.numerics.metrics import cosine
from vitcompress.quantizers import Quantizer

__all__ = ["Runtime", "Verification", "verify"]

#: The runtimes that verify, and the program of each.
Runtime = Literal["onnxruntime", "OpenVINO"]
PROGRAMS: dict[Runtime, str] = {
    "onnxruntime": "session.py",
    "OpenVINO": "openvino_session.py",
}

TIMEOUT_SECONDS = 600
#: How far from a boundary a value may lie to count as a tie, relative to the largest value.
TIE_WIDTH = 1e-4
#: Largest share of the codes at one site that may differ without being ties.
MOST_UNEXPLAINED = 2e-3
#: Below this cosine, in step, a file is not the model it was exported from.
LEAST_COSINE = 0.9999


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the runtime did.

    Attributes:
        runtime: Name and version.
        code_mismatch: Share of activation codes that differ, in step.
        in_step_cosine: Between the outputs, in step; of several the least.
        images: How many images both sides computed on their own.
        cosine: Between their logits (the first output, or the one called so), each side on
            its own.
        top1_agreement_percent: Images on which the largest output is the same.
        max_difference: Largest difference, relative to the largest output.
        integer_linears: Linears whose product runs on integers.
        linears: Quantized linears in the file.
        float_linears: Those that fell out, with the reason as far as it is known.
        integer_ops: Fused integer operators in the optimised graph, by type.
    """

    runtime: str
    code_mismatch: float
    in_step_cosine: float
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
    codes: Mapping[str, StoredCodes],
    linears: Sequence[str],
    reasons: Mapping[str, str],
    runtime: Runtime = "onnxruntime",
    ir_path: Path | None = None,
) -> Verification:
    """Return what a runtime makes of a file, compared with the graph.

    Args:
        path: ONNX file.
        captured: Graph it was exported from.
        images: ``[N, C, H, W]``; run in one batch, the first ones also in small batches.
        codes: Where the codes of each activation quantizer are, by target.
        linears: Names of the quantized linears in the file.
        reasons: Why some of them are known not to be integer products.
        runtime: ``OpenVINO`` must be installed.
        ir_path: Where OpenVINO writes the file in its own form (``.xml``, and ``.bin``
            beside it) first, which then is what runs.

    Raises:
        ExportError: The file is not valid, does not run, or computes something else than the
            graph at one of the batch sizes.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name}: not valid ONNX: {error}") from error
    with torch.no_grad():
        expected = captured.logits(images)
    names = [stored.name for stored in codes.values()]
    facts, arrays = _run_apart(path, images, names, runtime, ir_path)
    actual = torch.from_numpy(arrays["all"])[: len(images)]
    in_step = []
    count = len(captured.output_names)
    for batch in facts["batches"]:
        found = [
            torch.from_numpy(arrays[f"batch_{batch}_{index}"])
            for index in range(count + len(codes))
        ]
        by_target = {
            target: stored.of(value)
            for (target, stored), value in zip(codes.items(), found[count:], strict=True)
        }
        compared = images[torch.arange(batch) % len(images)]  # a fixed batch may be larger
        in_step.append(_compare_in_step(path, captured, compared, found[:count], by_target))
    integer, fell_out = coverage(facts["nodes"], linears, reasons)
    return Verification(
        runtime=facts["runtime"],
        code_mismatch=max(mismatch for mismatch, _ in in_step),
        in_step_cosine=min(likeness for _, likeness in in_step),
        images=len(images),
        cosine=cosine(expected, actual),
        top1_agreement_percent=100.0
        * float((expected.argmax(-1) == actual.argmax(-1)).double().mean()),
        max_difference=float((expected - actual).abs().max() / expected.abs().max()),
        integer_linears=integer,
        linears=len(linears),
        float_linears=fell_out,
        integer_ops=integer_ops(facts["ops"]),
    )


def _compare_in_step(
    path: Path,
    captured: CapturedGraph,
    images: Tensor,
    outputs: Sequence[Tensor],
    codes: dict[str, Tensor],
) -> tuple[float, float]:
    """Return the share of codes that differ and the least cosine of an output, in step.

    Raises:
        ExportError: Codes differ that are no ties, or the outputs do.
    """
    differing, total = 0, 0
    worst = ("", 0.0)

    def checked(quantizer: Quantizer, found: Tensor, x: Tensor) -> Tensor:
        nonlocal differing, total, worst
        wrong = quantizer.quantize(x).int() != found
        differing, total = differing + int(wrong.sum()), total + found.numel()
        width = TIE_WIDTH * float(x.abs().max())
        ends = torch.stack([quantizer.quantize(x + sign * width).int() for sign in (-1, 1)])
        tied = (ends.amin(dim=0) <= found) & (found <= ends.amax(dim=0))
        share = float((wrong & ~tied).float().mean())
        worst = max(worst, (quantizer.site, share), key=lambda item: item[1])
        return quantizer.dequantize(found)

    replaced = {}
    for node in captured.nodes_of_kind("call_module"):
        target = str(node.target)
        if target in codes:
            quantizer = captured.module.get_submodule(target)
            assert isinstance(quantizer, Quantizer)
            replaced[node] = partial(checked, quantizer, codes[target])
    expected = run(captured, images, replaced=replaced)
    if worst[1] > MOST_UNEXPLAINED:
        raise ExportError(
            f"{path.name}: {worst[0]}: {100 * worst[1]:.2f} % of the codes differ from the "
            f"model's and are no ties; at most {100 * MOST_UNEXPLAINED:.1f} % may"
        )
    likenesses = []
    for name, own, other in zip(captured.output_names, expected, outputs, strict=True):
        likenesses.append(cosine(own, other))
        if not likenesses[-1] >= LEAST_COSINE:
            label = f"output '{name}' differs" if name else "outputs differ"
            raise ExportError(
                f"{path.name}: {label} from the model's at batch {len(images)}: cosine "
                f"{likenesses[-1]:.5f} in step, expected at least {LEAST_COSINE}"
            )
    return differing / max(total, 1), min(likenesses)


def _run_apart(
    path: Path, images: Tensor, names: Sequence[str], runtime: Runtime, ir_path: Path | None
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    with tempfile.TemporaryDirectory(prefix="vitcompress-verify-") as folder:
        inputs, results = Path(folder) / "images.npy", Path(folder) / "results.npz"
        kept = Path(folder) / "names.json"
        np.save(inputs, images.numpy())
        kept.write_text(json.dumps(list(names)), encoding="utf-8")
        # As a file: as a module it would import this whole package, and torch, first.
        command = [sys.executable, "-P", str(Path(__file__).with_name(PROGRAMS[runtime]))]
        command += [str(path), str(inputs), str(results), str(kept)]
        try:
            done = subprocess.run(
                command if ir_path is None else [*command, str(ir_path)],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"{path.name}: {runtime} did not finish in {TIMEOUT_SECONDS} s"
            ) from error
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise ExportError(f"{path.name}: {runtime} cannot run it: {lines[-1]}")
        facts = json.loads(done.stdout.splitlines()[-1])
        with np.load(results, allow_pickle=False) as arrays:
            return facts, {name: arrays[name] for name in arrays.files}
