"""How much memory and time does block reconstruction take, and does memory grow with depth?

Networks of several depths are cut from one real model: its first blocks and its head. Left
out: accuracy, which `bench_accuracy.py` measures.

    python benchmarks/bench_reconstruction.py --depths 4,8,12 --samples 1000 --iterations 20
"""

import argparse

import torch
from harness import calibration, load_asset, recording

from vitcompress.engine import run_recipe
from vitcompress.graph import capture
from vitcompress.recipe import Scheme, load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny")
    parser.add_argument("--recipe", default="balanced_narrow")
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--depths", default="4,8,12")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()

    recipe = load_recipe(
        arguments.recipe, scheme=Scheme.parse(arguments.scheme), overrides=arguments.set
    )
    place = next(i for i, step in enumerate(recipe.passes) if step.name == "reconstruct")
    settings = [*arguments.set, f"passes.{place}.iterations={arguments.iterations}"]
    recipe = load_recipe(
        arguments.recipe, scheme=Scheme.parse(arguments.scheme), overrides=settings
    )
    with recording("reconstruction") as record:
        for depth in map(int, arguments.depths.split(",")):
            loaded = load_asset(arguments.model)
            loaded.module.blocks = loaded.module.blocks[:depth]
            source = calibration(loaded, seed=0, samples=arguments.samples, batch_size=32)
            graph = capture(loaded.module, torch.zeros(2, 3, 224, 224), model_id=loaded.name)
            _, records = run_recipe(recipe, graph, source)
            found = records[place]
            blocks = found.report.details["blocks"]
            record(
                model=arguments.model,
                recipe=recipe.label,
                depth=depth,
                samples=arguments.samples,
                iterations=arguments.iterations,
                seconds=round(found.seconds, 1),
                seconds_by_block={path: b["seconds"] for path, b in blocks.items()},
                peak_memory_mb=round(found.peak_memory_bytes / 2**20),
                peak_memory_mb_by_pass={
                    r.name: round(r.peak_memory_bytes / 2**20) for r in records
                },
            )


if __name__ == "__main__":
    main()
