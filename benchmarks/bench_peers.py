"""Beside the peers: speed and accuracy of one network's quantized forms, in one run.

Ours for onnxruntime (float and integer attention, W8A8 and W4A8) and for OpenVINO;
onnxruntime's own static and dynamic quantizers; NNCF's post-training quantization of the
OpenVINO model; neural-compressor where it still takes ONNX. All calibrate on the same images.
Peers that are not installed are left out, with the reason.

    python benchmarks/bench_peers.py --models deit_small,vit_tiny --batch 1,8
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from backbones import randomise
from harness import calibration, evaluation, load_asset, recording

import calib
import vitcompress
from vitcompress.evaluate import Replay, evaluate, onnx_predictor
from vitcompress.export.onnx.float_model import export_float_onnx, quantize_dynamically
from vitcompress.export.onnx.stopwatch import time_files
from vitcompress.graph import CapturedGraph, capture
from vitcompress.speed import interquartile_range, speedup

#: Name of ours, recipe with scheme, target.
OURS = {
    "ort": {
        "ours deploy W8A8": ("deploy-w8a8", "ort-cpu"),
        "ours integer_attention W8A8": ("integer_attention-w8a8", "ort-cpu"),
        "ours fast W8A8": ("fast-w8a8", "ort-cpu"),
        "ours fast W4A8": ("fast-w4a8", "ort-cpu"),
    },
    "openvino": {
        "ours deploy_symmetric_weights W8A8": ("deploy_symmetric_weights-w8a8", "openvino"),
        "ours deploy_symmetric_weights W4A8": (
            "deploy_symmetric_weights-w4a8",
            "openvino",
        ),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="deit_small,vit_tiny")
    parser.add_argument("--runtimes", default="ort,openvino")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--images", type=int, default=1000, help="evaluation images; 0 for none"
    )
    arguments = parser.parse_args()

    started = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - started:.0f} s: {what}", flush=True)

    for reason in missing():
        print(f"left out: {reason}")
    with recording("peers") as record, tempfile.TemporaryDirectory() as folder:
        for model in arguments.models.split(","):
            graph, source, images = network(model, arguments.images)
            known = None if images is None else float_logits(graph, images)
            for runtime in arguments.runtimes.split(","):
                if runtime == "openvino" and importlib.util.find_spec("openvino") is None:
                    continue
                place = Path(folder) / f"{model}-{runtime}"
                place.mkdir()
                files: dict[str, Path] = {}
                for name, path in written(graph, source, runtime, place):
                    files[name] = path
                    say(f"{model}, {runtime}: {name} is written")
                accuracy: dict[str, Mapping[str, Any]] = {}
                if images is not None and known is not None:
                    for name, path in files.items():
                        accuracy[name] = measured(path, known, images, runtime)
                        say(f"{model}, {runtime}: {name} is evaluated")
                for batch in map(int, arguments.batch.split(",")):
                    timed = time_files(
                        files,
                        (batch, *graph.input_shape),
                        runtime=runtime,
                        threads=arguments.threads,
                        rounds=arguments.rounds,
                        seed=0,
                    )
                    say(f"{model}, {runtime}: batch {batch} is timed")
                    samples = timed.samples()
                    walls = {n: found.wall_ms for n, found in samples.items()}
                    for name, path in files.items():
                        record(
                            model=model,
                            runtime=timed.runtime,
                            file=name,
                            batch=batch,
                            threads=arguments.threads,
                            bytes=size_of(path),
                            median_ms=round(float(np.median(walls[name])), 3),
                            iqr_ms=round(interquartile_range(walls[name]), 3),
                            cpu_ms=round(float(np.median(samples[name].cpu_ms)), 3),
                            speedup={
                                other: round(speedup(walls[other], walls[name]), 3)
                                for other in files
                                if not other.startswith("ours") and other != name
                            },
                            **accuracy.get(name, {}),
                        )


def missing() -> Iterator[str]:
    """Yield the peers that are not there."""
    for module, peer in (("openvino", "OpenVINO"), ("nncf", "NNCF")):
        if importlib.util.find_spec(module) is None:
            yield f"{peer} is not installed"
    if importlib.util.find_spec("neural_compressor") is None:
        yield "neural-compressor is not installed"
    else:
        yield "neural-compressor: its ONNX quantizers left the package with version 3"


def network(
    model: str, count: int
) -> tuple[CapturedGraph, calib.Source, calib.TensorSource | None]:
    """Return a float graph, calibration images, and labelled ones for the real model."""
    if model.endswith("tiny"):
        loaded = load_asset(model)
        graph = capture(loaded.module, torch.zeros(2, 3, 224, 224), model_id=loaded.name)
        images = evaluation(loaded, count) if count else None
        return graph, calibration(loaded, seed=0), images
    module = randomise(timm.create_model(f"{model}_patch16_224"))
    prepared = calib.Preprocessing(size=(224, 224))
    source = calib.open_source("synthetic", samples=8, preprocessing=prepared)
    return capture(module, torch.zeros(2, 3, 224, 224), model_id=model), source, None


def written(
    graph: CapturedGraph, source: calib.Source, runtime: str, folder: Path
) -> Iterator[tuple[str, Path]]:
    """Write every form of a network; yield names and files, the float32 network first."""
    plain = folder / "float32.onnx"
    export_float_onnx(graph, plain)
    yield "float32", plain
    batches = [batch.images.numpy() for batch in source]
    if runtime == "ort":
        dynamic = folder / "dynamic.onnx"
        quantize_dynamically(plain, dynamic)
        yield "onnxruntime dynamic", dynamic
        yield "onnxruntime static", statically(plain, folder / "static.onnx", batches)
    elif importlib.util.find_spec("nncf") is not None:
        yield "NNCF", by_nncf(plain, folder / "nncf.xml", batches)
    for number, (name, (recipe, target)) in enumerate(OURS[runtime].items()):
        path = folder / f"ours-{number}.onnx"
        compressed = vitcompress.quantize(graph, recipe=recipe, source=source)
        compressed.export_onnx(path, target=target)
        yield name, path


def statically(source: Path, path: Path, batches: list[np.ndarray]) -> Path:
    """Quantize as onnxruntime's guide says: preprocess, then QDQ, one scale per channel."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter([{"images": row[None]} for batch in batches for row in batch])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(prepared, path, Reader(), per_channel=True)
    return path


def by_nncf(source: Path, path: Path, batches: list[np.ndarray]) -> Path:
    """Quantize with NNCF's defaults for transformers."""
    import nncf
    import openvino

    rows = [row[None] for batch in batches for row in batch]
    model = openvino.Core().read_model(source)
    quantized = nncf.quantize(
        model,
        nncf.Dataset(rows),
        subset_size=len(rows),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    openvino.save_model(quantized, path, compress_to_fp16=False)
    return path


@torch.no_grad()
def float_logits(graph: CapturedGraph, images: calib.TensorSource) -> torch.Tensor:
    return torch.cat([graph.logits(batch.images) for batch in images])


def measured(
    path: Path, known: torch.Tensor, images: calib.TensorSource, runtime: str
) -> Mapping[str, Any]:
    """Return accuracy, and agreement with the float model in torch."""
    predict = onnx_predictor(path) if runtime == "ort" else openvino_predictor(path)
    entry = evaluate(predict, images, reference=Replay(known), execution="executed")
    return {
        "top1_percent": entry.top1_percent,
        "float_top1_percent": entry.reference_top1_percent,
        "agreement_percent": entry.agreement_percent,
    }


def openvino_predictor(path: Path) -> Any:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda images: torch.from_numpy(np.array(compiled(images.numpy())[0]))


def size_of(path: Path) -> int:
    """Return the bytes of a file, and of the weights beside it."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" else 0)


if __name__ == "__main__":
    main()
