"""What does each change to a file for onnxruntime bring?

One network with random weights (they serve for time), quantized once with float attention and
once with integer attention, is written in many ways: as captured, with each change alone, with
all, and with all but one. All files take turns in one run.

    python benchmarks/bench_rewrites.py --model deit_small_patch16_224 --rounds 15
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import timm
import torch
from backbones import randomise
from harness import recording

import calib
import vitcompress
from vitcompress.benchmark import benchmark
from vitcompress.export.onnx import TARGETS
from vitcompress.export.onnx.float_model import export_float_onnx
from vitcompress.export.onnx.targets import Target
from vitcompress.graph import capture

FULL = TARGETS["ort-cpu"]
PLAIN = replace(FULL, linear="matmul", attention="products", rewrites=(), residual="add")
PATCHES = ("linear_patches", "simplify_moves")
ROWS = ("separate_projections", "keep_needed_rows")


def variants() -> Iterator[tuple[str, Target, str]]:
    """Yield the name, the spelling and the recipe of each file."""
    yield "none", PLAIN, "deploy"
    yield "integer product alone", replace(PLAIN, linear="integer"), "deploy"
    yield "fused attention alone", replace(PLAIN, attention="fused"), "deploy"
    yield "linear patches alone", replace(PLAIN, rewrites=PATCHES), "deploy"
    yield "separate projections alone", replace(PLAIN, rewrites=ROWS[:1]), "deploy"
    yield "needed rows (separate projections)", replace(PLAIN, rewrites=ROWS), "deploy"
    yield "sums in front of norms alone", replace(PLAIN, residual="sum"), "deploy"
    yield "all", FULL, "deploy"
    yield "all but needed rows", replace(FULL, rewrites=(*PATCHES, ROWS[0])), "deploy"
    yield "all, integer attention", FULL, "integer_attention"
    yield "all, integer attention, W4A8", FULL, "integer_attention-w4a8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", default="1,8")
    arguments = parser.parse_args()

    model = randomise(timm.create_model(arguments.model))
    prepared = calib.Preprocessing(size=(224, 224))
    source = calib.open_source("synthetic", samples=8, preprocessing=prepared)
    graph = capture(model, torch.zeros(2, 3, 224, 224), model_id=arguments.model)
    with tempfile.TemporaryDirectory() as folder, recording("rewrites") as record:
        paths = {"float32": Path(folder) / "float32.onnx"}
        export_float_onnx(graph, paths["float32"])
        models = {}
        for number, (name, target, recipe) in enumerate(variants()):
            if recipe not in models:
                models[recipe] = vitcompress.quantize(graph, recipe=recipe, source=source)
            paths[name] = Path(folder) / f"{number}.onnx"
            with mock.patch.dict(TARGETS, {target.name: target}):
                models[recipe].export_onnx(paths[name])
        report = benchmark(
            list(paths.values()),
            batches=tuple(map(int, arguments.batch.split(","))),
            rounds=arguments.rounds,
        )
        names = {str(path): name for name, path in paths.items()}
        for entry in report.entries:
            record(
                model=arguments.model,
                variant=names.get(entry.name, entry.role),
                batch=entry.batch,
                threads=entry.threads,
                size_bytes=entry.size_bytes,
                median_wall_ms=round(entry.median_wall_ms, 3),
                iqr_wall_ms=round(entry.iqr_wall_ms, 3),
                speedup_over_float32=entry.speedup_over_float32,
                speedup_over_dynamic_int8=entry.speedup_over_dynamic_int8,
                integer_products=entry.integer_products,
                float_products=entry.float_products,
            )


if __name__ == "__main__":
    main()
