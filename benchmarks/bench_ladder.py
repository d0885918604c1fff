"""Does each rung of the ladder bring what it costs? Same images, same granularity.

Rungs: rounding to nearest; the fold of RepQ-ViT; behind it GPTQ or ERQ; searched ranges,
AdaLog and massive activations diverted (`fast`); every block trained, by squared error and by
the loss of LS-ViT. Left out: speed, export.

    python benchmarks/bench_ladder.py --models deit_tiny --rungs nearest,repq,gptq,erq
"""

import argparse
from typing import Any

import torch
from bench_accuracy import logits
from harness import calibration, evaluation, load_asset, recording

from vitcompress.engine import run_recipe
from vitcompress.evaluate import Replay, evaluate
from vitcompress.graph import capture
from vitcompress.recipe import Recipe, Scheme, load_recipe

#: What RepQ-ViT's recipe lacks behind its fold.
CLOSED_FORM: dict[str, list[dict[str, Any]]] = {
    "repq": [],
    "gptq": [{"pass": "gptq"}],
    "erq": [{"pass": "erq"}],
    # What the two differ by: ERQ's first step alone, and with the other's rounding behind it.
    "ridge": [{"pass": "erq", "round_weights": False}],
    "ridge_gptq": [{"pass": "erq", "round_weights": False}, {"pass": "gptq"}],
}
#: Recipes, and settings of them.
RECIPES: dict[str, tuple[str, list[str]]] = {
    "fast": ("fast_narrow", []),
    "mse": ("balanced_narrow", ["passes.6.loss=mse"]),
    "least_squares": ("balanced_narrow", []),
}
RUNGS = ("nearest", *CLOSED_FORM, *RECIPES)


def recipe_of(rung: str, scheme: Scheme) -> Recipe:
    """Return the recipe of a rung."""
    if rung in RECIPES:
        name, settings = RECIPES[rung]
        return load_recipe(name, scheme=scheme, overrides=settings)
    base = load_recipe("repq_vit", scheme=scheme).to_dict()
    attach, calibrate, fold, *end = base["passes"]
    if rung == "nearest":
        for rule in attach["rules"]:
            if "norm_output" in rule["roles"]:
                rule["granularity"] = "per_tensor"
        return Recipe.from_dict({**base, "passes": [attach, calibrate, *end]})
    return Recipe.from_dict(
        {**base, "passes": [attach, calibrate, fold, *CLOSED_FORM[rung], *end]}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="deit_tiny,vit_tiny")
    parser.add_argument("--rungs", default=",".join(RUNGS))
    parser.add_argument("--scheme", default="W4A4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--images", type=int, default=1000)
    arguments = parser.parse_args()

    scheme = Scheme.parse(arguments.scheme)
    with recording("ladder") as record:
        for name in arguments.models.split(","):
            loaded = load_asset(name)
            images = evaluation(loaded, arguments.images)
            reference = capture(
                loaded.module, torch.zeros(2, 3, 224, 224), model_id=loaded.name
            )
            known = logits(reference.logits, images)
            for rung in arguments.rungs.split(","):
                recipe = recipe_of(rung, scheme)
                for seed in map(int, arguments.seeds.split(",")):
                    source = calibration(
                        loaded, seed=seed, samples=arguments.samples, batch_size=32
                    )
                    graph, records = run_recipe(recipe, reference, source)
                    found = Replay(logits(graph.logits, images))
                    entry = evaluate(found, images, reference=Replay(known))
                    record(
                        model=name,
                        rung=rung,
                        scheme=str(scheme),
                        seed=seed,
                        samples=arguments.samples,
                        images=arguments.images,
                        top1_percent=entry.top1_percent,
                        float_top1_percent=entry.reference_top1_percent,
                        agreement_percent=entry.agreement_percent,
                        mean_kl=entry.mean_kl,
                        seconds=round(sum(r.seconds for r in records), 1),
                    )


if __name__ == "__main__":
    main()
