"""How long do calibration, RepQ-ViT and freezing take, and how much memory?

Each repeat is a fresh process: capture is timed apart, images are decoded beforehand,
evaluation is left out. Prints the median over repeats.

    python benchmarks/bench_calibration.py --recipe repq_vit_paper --scheme W4A4 --repeats 5
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from harness import calibration, load_asset, recording


def measure(model: str, recipe_name: str, scheme: str) -> dict[str, float]:
    """Return seconds and peak bytes of one run in this process."""
    import torch

    import calib
    from vitcompress.engine import run_recipe
    from vitcompress.engine.memory import PeakMemory
    from vitcompress.graph import capture
    from vitcompress.recipe import Scheme, load_recipe

    loaded = load_asset(model)
    images = torch.cat([batch.images for batch in calibration(loaded, seed=0)])
    source = calib.TensorSource(images, batch_size=32)
    recipe = load_recipe(recipe_name, scheme=Scheme.parse(scheme))
    started = time.perf_counter()
    with PeakMemory() as capture_memory:
        reference = capture(loaded.module, images[:2], model_id=loaded.name)
    captured = time.perf_counter()
    with PeakMemory() as memory:
        run_recipe(recipe, reference, source)
    return {
        "capture_seconds": captured - started,
        "compress_seconds": time.perf_counter() - captured,
        "capture_peak_bytes": capture_memory.peak_bytes,
        "compress_peak_bytes": memory.peak_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny")
    parser.add_argument("--recipe", default="repq_vit_paper")
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="measure here, print one line")
    arguments = parser.parse_args()
    case = (arguments.model, arguments.recipe, arguments.scheme)
    if arguments.once:
        print(json.dumps(measure(*case)))
        return
    command = [sys.executable, __file__, "--once"]
    command += ["--model", case[0], "--recipe", case[1], "--scheme", case[2]]
    runs = []
    for _ in range(arguments.repeats):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    with recording("calibration") as record:
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        spread = {
            f"{key}_range": [min(r[key] for r in runs), max(r[key] for r in runs)]
            for key in ("capture_seconds", "compress_seconds")
        }
        record(
            model=case[0],
            recipe=case[1],
            scheme=case[2],
            repeats=arguments.repeats,
            **{key: round(value, 3) for key, value in medians.items()},
            **spread,
        )


if __name__ == "__main__":
    main()
