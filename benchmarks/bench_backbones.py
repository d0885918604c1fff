"""Does every backbone go through every stage?

Capture, comparison with eager, quantization (``deploy`` at W8A8 and W4A8, ``repq_vit`` at
W8A8 with the products of attention), artefact, ONNX export and its verification; coverage,
noise, seconds and peak memory of each. Weights are random (``backbones.py``), images
rendered. Each model has a process of its own: its peak memory is its own, and a crash costs
one row. Left out: accuracy, which random weights do not have, and speed of execution.

    python benchmarks/bench_backbones.py --models vit_tiny_patch16_224,torchvision/swin_t
    python benchmarks/bench_backbones.py --tier 1 --jobs 2 --resume
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from backbone_rows import notes, problems, read_rows, regressions
from backbones import BACKBONES, Backbone, build, is_batch_norm, is_norm, liveliness, select
from harness import ROOT, recording, results_file
from torch import Tensor, fx, nn

import calib
import vitcompress
from vitcompress.engine.memory import PeakMemory
from vitcompress.errors import VitcompressError
from vitcompress.evaluate import logits_of
from vitcompress.graph import CapturedGraph, capture, enumerate_sites, unlisted_products
from vitcompress.numerics.metrics import sqnr_db
from vitcompress.report import ExportEntry

BATCH = 4
TIMEOUT_SECONDS = 3600
#: Label, scheme, recipe (``None`` is the scheme's default), and whether files are written.
SCHEMES = (
    ("W8A8", "W8A8", None, True),
    ("W4A8", "W4A8", None, True),
    ("repq_vit", "W8A8", "repq_vit", False),
)


class StageFailedError(Exception):
    """A stage failed and is recorded; what needs its result cannot go on."""


class Record:
    """The row of one model while it is measured.

    Attributes:
        row: What is known so far.
    """

    def __init__(self, case: Backbone, emit: Callable[[dict[str, Any]], None]) -> None:
        self.emit = emit
        self.row: dict[str, Any] = {
            "model": case.key,
            "tier": case.tier,
            "refused": case.refused,
            "samples": case.samples,
            "seconds": {},
            "peak_bytes": {},
            "schemes": {},
            "failures": [],
        }

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage, and record what it raises.

        Raises:
            StageFailedError: It raised something.
        """
        # If the process dies in this stage, this is the last that is heard of it.
        self.emit({**self.row, "running": name})
        started, memory = time.perf_counter(), PeakMemory()
        try:
            with memory:
                yield
        except Exception as error:  # whatever a library raises is a finding
            self.row["failures"].append(failure(name, error))
            raise StageFailedError(name) from error
        finally:
            self.row["seconds"][name] = round(time.perf_counter() - started, 2)
            self.row["peak_bytes"][name] = memory.peak_bytes


def failure(stage: str, error: Exception) -> dict[str, Any]:
    """Return what a stage raised; paths of this machine are cut from the message."""
    text = re.sub(r"[^\s'\"]*/site-packages/", "", str(error).strip())
    text = text.replace(f"{ROOT}/", "").replace(f"{tempfile.gettempdir()}/", "")
    code = error.exit_code if isinstance(error, VitcompressError) else 1
    return {
        "stage": stage,
        "type": type(error).__name__,
        "message": text,
        "exit_code": code,
    }


# One model


def measure(case: Backbone, record: Record) -> None:
    """Take one model through every stage.

    Raises:
        StageFailedError: One failed on which the rest depends.
    """
    row = record.row
    with record.stage("build"):
        model, preprocessing = build(case)
    row["size"] = preprocessing.size[0]
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row["norms"] = norms_of(model)
    source = calib.open_source(
        "synthetic", samples=case.samples, batch_size=BATCH, preprocessing=preprocessing
    )
    images = torch.cat([batch.images for batch in source])
    three = torch.cat([images, images.flip(-1)])[:3]
    with record.stage("eager"), torch.no_grad():
        eager = logits_of(model)
        expected = {1: eager(three[:1]), 3: eager(three)}
        row["liveliness"] = vars(liveliness(model, three, eager))
    with record.stage("capture"):
        reference = capture(model, three[:2], model_id=case.key)
    del model, eager
    with record.stage("compare"), torch.no_grad():
        row["capture_error"] = {
            str(count): relative_error(reference.logits(three[:count]), logits)
            for count, logits in expected.items()
        }
    row.update(contents(reference))
    row["norms"]["batch_norms_left"] = sum(
        "batch_norm" in str(node.target) for node in reference.nodes_of_kind("call_function")
    )
    for label, scheme, recipe, files in SCHEMES:
        with contextlib.suppress(StageFailedError):
            figures = row["schemes"].setdefault(label, {})
            with record.stage(f"quantize {label}"):
                compressed = vitcompress.quantize(
                    reference, scheme=scheme, recipe=recipe, source=source
                )
            figures.update(quality(compressed, reference, images))
            if files:
                measure_files(record, label, compressed, images)


def measure_files(
    record: Record, label: str, compressed: vitcompress.CompressedModel, images: Tensor
) -> None:
    """Save, load and export a compressed model; one that fails does not stop the other."""
    figures = record.row["schemes"][label]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(StageFailedError):
            with record.stage(f"save {label}"):
                compressed.save(Path(folder) / "artefact")
            with record.stage(f"load {label}"), torch.no_grad():
                again = vitcompress.load(Path(folder) / "artefact")
                pairs = zip(
                    compressed.graph.module(images), again.graph.module(images), strict=True
                )
                figures["same_bits"] = all(torch.equal(ours, theirs) for ours, theirs in pairs)
        with contextlib.suppress(StageFailedError), record.stage(f"export {label}"):
            result = compressed.export_onnx(Path(folder) / "model.onnx", target="ort-cpu")
            figures["onnx"] = ExportEntry.of(result).model_dump(mode="json")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def norms_of(model: nn.Module) -> dict[str, int]:
    """Return how many norms a model has: with stored statistics, and others."""
    norms = [module for module in model.modules() if is_norm(module)]
    batch_norms = sum(map(is_batch_norm, norms))
    return {"batch_norms": batch_norms, "other_norms": len(norms) - batch_norms}


def contents(graph: CapturedGraph) -> dict[str, Any]:
    """Return what a float graph holds: sites by role, readers of sites by operation."""
    sites = enumerate_sites(graph).values()
    roles = Counter(str(site.role) for site in sites)
    readers = {site.reader: site.operation for site in sites}
    return {
        "roles": dict(roles),
        "operations": dict(Counter(readers.values())),
        "attentions": roles["probs"],
        "unlisted_products": unlisted_products(graph),
    }


def quality(
    compressed: vitcompress.CompressedModel, reference: CapturedGraph, images: Tensor
) -> dict[str, Any]:
    """Return coverage and noise of a quantized model."""
    report = compressed.report
    passes = {entry.name: entry for entry in report.passes}
    folded = passes["repq_vit"]
    return {
        **coverage(compressed.graph, passes["attach"].skipped),
        "norms_folded": folded.changed,
        "norms_found": folded.found,
        "norms_skipped": folded.skipped,
        "sqnr_db": report.evaluations[0].logits_sqnr_db,
        "varying_sqnr_db": varying_sqnr_db(compressed.graph, reference, images),
        "stored_ratio": report.size.ratio,
    }


def coverage(graph: CapturedGraph, skipped: dict[str, str]) -> dict[str, Any]:
    """Return how many linears, convolutions and operands of products are quantized, of all.

    A linear or convolution counts if both its input and its weight are; it is unexplained if
    it does not, and ``skipped`` (site to reason) does not say why.
    """
    edges: dict[fx.Node, list[Any]] = defaultdict(list)
    for site in enumerate_sites(graph).values():
        edges[site.reader].append(site)
    found: dict[str, Any] = {
        kind: {"quantized": 0, "found": 0, "reasons": {}, "unexplained": []}
        for kind in ("linears", "convs")
    }
    operands = []
    for sites in edges.values():
        kind = kind_of(sites[0].operation)
        if kind is None:
            operands += sites
            continue
        entry, name = found[kind], sites[0].module
        entry["found"] += 1
        left = [site.name for site in sites if site.quantizer is None]
        if len(sites) == 2 and not left:
            entry["quantized"] += 1
        elif left and all(site in skipped for site in left):
            entry["reasons"].update({site: skipped[site] for site in left})
        else:
            entry["unexplained"].append(name if left else f"{name}: its weight is computed")
    quantized = sum(site.quantizer is not None for site in operands)
    found["product_operands"] = {"quantized": quantized, "found": len(operands)}
    return found


def kind_of(operation: str) -> str | None:
    """Return what an operation is counted as; ``None`` for a product of activations."""
    if operation == "linear":
        return "linears"
    return "convs" if operation.startswith("conv") else None


@torch.no_grad()
def varying_sqnr_db(
    compressed: CapturedGraph, reference: CapturedGraph, images: Tensor
) -> float:
    """Return signal to noise of the logits, the signal being what varies between images.

    Random models answer every image much alike; what they answer to all would flatter them.
    """
    expected = reference.logits(images).double()
    noise = compressed.logits(images) - expected
    signal = expected - expected.mean(dim=0)
    return sqnr_db(float(signal.square().sum()), float(noise.square().sum()))


# Processes


def run_child(case: Backbone) -> None:
    """Measure one model, printing its row as it grows: the last line counts."""
    output = sys.stdout

    def emit(row: dict[str, Any]) -> None:
        print(json.dumps(row), file=output, flush=True)

    with contextlib.redirect_stdout(sys.stderr):  # libraries print, too
        record = Record(case, emit)
        with contextlib.suppress(StageFailedError):
            measure(case, record)
    emit(record.row)


def measure_apart(case: Backbone) -> dict[str, Any]:
    """Return the row of a model measured in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", case.key]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        text = printed if isinstance(printed, str) else printed.decode()
        return last_row(case, text, f"took longer than {TIMEOUT_SECONDS} s")
    stopped = ""
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        stopped = f"exit code {done.returncode}" + (f": {lines[-1]}" if lines else "")
    return last_row(case, done.stdout, stopped)


def last_row(case: Backbone, printed: str, stopped: str) -> dict[str, Any]:
    """Return the last whole row of a process's output, judged.

    Args:
        case: What it measured.
        printed: Its standard output.
        stopped: Why it ended early; empty if it did not.
    """
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    row = Record(case, lambda row: None).row
    for line in reversed(lines):
        with contextlib.suppress(json.JSONDecodeError):  # half a line of a killed process
            row = json.loads(line)
            break
    running = row.pop("running", "start")
    if stopped:
        row["failures"].append(
            {"stage": running, "type": "process", "message": stopped, "exit_code": 1}
        )
    found = problems(row)
    return {**row, "passes": not found, "problems": found, "notes": notes(row)}


def measure_all(cases: Iterable[Backbone], jobs: int, path: Path) -> None:
    with recording("backbones", path) as record, ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(measure_apart, case) for case in cases]):
            record(**done.result())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="names, by commas; default: all")
    parser.add_argument("--tier", type=int, choices=(0, 1, 2), help="only this tier")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--output", type=Path, default=results_file("backbones"))
    parser.add_argument("--resume", action="store_true", help="skip models in the output")
    parser.add_argument("--baseline", type=Path, help="fail where tier 1 got worse than here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(BACKBONES[arguments.child])
        return
    try:
        cases = select(filter(None, arguments.models.split(",")), arguments.tier)
        # Read first: the baseline may be the file that is written.
        baseline = read_rows(arguments.baseline) if arguments.baseline else {}
        resumes = arguments.resume and arguments.output.is_file()
        known = read_rows(arguments.output) if resumes else {}
    except (LookupError, OSError) as error:
        parser.error(str(error))
    measure_all([c for c in cases if c.key not in known], arguments.jobs, arguments.output)

    # Without cases nothing was written, and no file may be there.
    rows = read_rows(arguments.output) if cases else {}
    chosen = [rows[case.key] for case in cases]
    print(f"{sum(row['passes'] for row in chosen)} of {len(chosen)} models pass")
    asked = {case.key for case in cases}
    worse = regressions({key: row for key, row in baseline.items() if key in asked}, rows)
    if worse:
        raise SystemExit("\n".join(["passed before and does not now:", *worse]))


if __name__ == "__main__":
    main()
