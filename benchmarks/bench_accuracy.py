"""How accurate is each recipe at each width on the two real models?

Simulated in torch, and with ``--onnx`` executed in onnxruntime on all images as well: file
size, integer coverage, agreement. Left out: speed.

    python benchmarks/bench_accuracy.py --recipes repq_vit_paper,repq_vit --schemes W8A8,W4A4
"""

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from harness import calibration, evaluation, load_asset, recording

import calib
from vitcompress.engine import run_recipe
from vitcompress.evaluate import Predictor, Replay, evaluate, onnx_predictor
from vitcompress.export.onnx import export_onnx
from vitcompress.graph import CapturedGraph, capture
from vitcompress.recipe import Scheme, load_recipe
from vitcompress.report import ExportEntry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="vit_tiny,deit_tiny")
    parser.add_argument("--recipes", default="repq_vit_paper,repq_vit,deploy")
    parser.add_argument("--schemes", default="W8A8,W6A6,W4A8,W4A4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=32, help="calibration images")
    parser.add_argument("--onnx", action="store_true", help="export and run every image")
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()

    with recording("accuracy") as record:
        for name in arguments.models.split(","):
            loaded = load_asset(name)
            images = evaluation(loaded)
            reference = capture(
                loaded.module, torch.zeros(2, 3, 224, 224), model_id=loaded.name
            )
            eager, known = logits(loaded.module, images), logits(reference.logits, images)
            record(
                model=name,
                recipe="float",
                eager_top1_percent=evaluate(Replay(eager), images).top1_percent,
                captured_top1_percent=evaluate(Replay(known), images).top1_percent,
            )
            for recipe_name in arguments.recipes.split(","):
                for scheme in arguments.schemes.split(","):
                    recipe = load_recipe(
                        recipe_name, scheme=Scheme.parse(scheme), overrides=arguments.set
                    )
                    for seed in map(int, arguments.seeds.split(",")):
                        source = calibration(
                            loaded, seed=seed, samples=arguments.samples, batch_size=32
                        )
                        graph, records = run_recipe(recipe, reference, source)
                        found = logits(graph.logits, images)
                        entry = evaluate(Replay(found), images, reference=Replay(known))
                        figures = {
                            "model": name,
                            "recipe": recipe_name,
                            "scheme": scheme,
                            "seed": seed,
                            "samples": arguments.samples,
                            "overrides": arguments.set,
                            "top1_percent": entry.top1_percent,
                            "float_top1_percent": entry.reference_top1_percent,
                            "agreement_percent": entry.agreement_percent,
                            "logits_sqnr_db": round(entry.logits_sqnr_db or 0.0, 2),
                            "seconds": round(sum(r.seconds for r in records), 1),
                        }
                        if arguments.onnx:
                            figures.update(executed(graph, found, source, images))
                        record(**figures)


@torch.no_grad()
def logits(model: Predictor, images: Iterable[calib.Batch]) -> torch.Tensor:
    """Return the logits of all images, ``[N, O]``."""
    return torch.cat([model(batch.images) for batch in images])


def executed(
    graph: CapturedGraph, simulated: torch.Tensor, source: calib.Source, images: calib.Source
) -> dict[str, object]:
    """Return what the exported file scores on every image."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        batch = next(iter(source)).images
        entry = ExportEntry.of(export_onnx(graph, path, batch[:16], target="ort-cpu"))
        result = evaluate(onnx_predictor(path), images, reference=Replay(simulated))
    return {
        "onnx_bytes": entry.size_bytes,
        "integer_linears": entry.integer_linears,
        "linears": entry.linears,
        "onnx_top1_percent": result.top1_percent,
        "onnx_agreement_percent": result.agreement_percent,
    }


if __name__ == "__main__":
    main()
