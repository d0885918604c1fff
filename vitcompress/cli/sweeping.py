"""Commands about many results: sweep."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vitcompress import api
from vitcompress.arguments import (
    calibration_spec,
    command_line,
    load_float,
    say,
    with_preprocessing,
)
from vitcompress.cli.application import app
from vitcompress.cli.options import (
    Arch,
    Batch,
    Classes,
    Crop,
    EvalSamples,
    ImageSize,
    Interpolation,
    Mean,
    Model,
    Samples,
    Std,
    Trust,
)
from vitcompress.errors import StoppedError
from vitcompress.result import Result
from vitcompress.sweep import Sweep
from vitcompress.sweep import sweep as run_sweep
from vitcompress.sweep.engines import ENGINES
from vitcompress.sweep.grid import parse_schemes, parse_seeds, planned_recipes
from vitcompress.terminal import out

__all__ = ["print_sweep", "sweep"]

#: Some cells of a sweep failed; the others are there.
EXIT_CELLS_FAILED = 4


@app.command()
def sweep(
    model: Model,
    schemes: Annotated[str, typer.Option(help="Widths, e.g. W8A8,W6A6,W4A8,W4A4")],
    eval_: Annotated[
        str, typer.Option("--eval", help="Images to evaluate on; labelled for accuracy")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Directory of the sweep; resumed if it exists"),
    ],
    recipes: Annotated[str, typer.Option(help="Recipe names or YAML files")] = "deploy",
    seeds: Annotated[
        str, typer.Option(help="E.g. 0..2 or 0,3: of recipes and of calibration images")
    ] = "0",
    calib_: Annotated[
        str | None, typer.Option("--calib", help="Calibration images, as for quantize")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Most cells at a time; one per processor by default"),
    ] = None,
    engine: Annotated[str, typer.Option(help=" | ".join(ENGINES))] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster, e.g. auto or HOST:6379")
    ] = None,
    arch: Arch = None,
    num_classes: Classes = None,
    image_size: ImageSize = None,
    crop_fraction: Crop = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    samples: Samples = api.DEFAULT_SAMPLES,
    eval_samples: EvalSamples = None,
    batch_size: Batch = 32,
    trust_input: Trust = False,
) -> None:
    """Quantize and evaluate under every scheme, recipe and seed; finished cells are kept."""
    # Slips in the grid are told before anything is opened.
    planned_recipes(recipes, parse_schemes(schemes), parse_seeds(seeds))
    loaded = with_preprocessing(
        load_float(model, arch, trust_input, num_classes, image_size),
        crop_fraction,
        interpolation,
        mean,
        std,
    )
    say("model", loaded.source)
    say("preprocessing", loaded.preprocessing.describe())
    try:
        found = run_sweep(
            loaded,
            output,
            schemes=schemes,
            recipes=recipes,
            evaluation=eval_,
            seeds=seeds,
            calibration=calibration_spec(calib_),
            samples=samples,
            eval_samples=eval_samples,
            batch_size=batch_size,
            jobs=jobs,
            engine=engine,
            address=address,
            command=command_line(),
            say=lambda line: out.print(escape(line), soft_wrap=True, highlight=False),
        )
    except KeyboardInterrupt as interrupt:
        raise StoppedError(
            f"interrupted; finished cells are kept in {output}: the same command goes on"
        ) from interrupt
    print_sweep(out, found)
    if found.failures:
        raise typer.Exit(EXIT_CELLS_FAILED)


def print_sweep(console: Console, sweep: Sweep) -> None:
    """Print scheme by recipe: means over seeds, and what failed."""
    index = sweep.index
    count = len(index.evaluation.ids)
    seeds = ", ".join(str(seed) for seed in index.seeds)
    table = Table(
        title=f"{escape(index.model)}: {count} images, seeds {seeds}, simulated",
        title_justify="left",
    )
    for column in ("recipe", "scheme"):
        table.add_column(column)
    for column in ("top-1 %", "agrees with float %", "MB", "cells"):
        table.add_column(column, justify="right", no_wrap=True)
    accuracy = _accuracy(index.reference.predictions, index.reference.labels)
    table.add_row("float", "-", _mean([accuracy]), "", f"{index.float_bytes / 1e6:.2f}", "")
    for recipe in index.recipes:
        for scheme in index.schemes:
            keys = [c.key for c in index.cells if (c.recipe, c.scheme) == (recipe, scheme)]
            if not keys:
                continue  # a word that stands for another recipe at this width
            results = [sweep.results[key] for key in keys if key in sweep.results]
            table.add_row(
                escape(recipe), scheme, *_figures(results), f"{len(results)}/{len(keys)}"
            )
    console.print(table)
    if len(index.seeds) > 1:
        console.print("mean ± standard deviation over seeds")
    for cell in index.cells:
        if cell.key in sweep.failures:
            reason = sweep.failures[cell.key].splitlines()[0]
            console.print(
                f"[red]failed:[/red] {escape(cell.recipe)} {cell.scheme} seed {cell.seed}: "
                f"{escape(reason)} [dim](failed/{cell.key[:12]}...json)[/dim]",
                soft_wrap=True,
                highlight=False,
            )


def _figures(results: Sequence[Result]) -> tuple[str, str, str]:
    outcomes = [result.outcomes for result in results]
    top1 = [_accuracy(o.predictions, o.labels) for o in outcomes]
    agreement = [_accuracy(o.predictions, o.reference_predictions) for o in outcomes]
    sizes = [result.report.size.stored_bytes / 1e6 for result in results]
    return _mean(top1), _mean(agreement), f"{statistics.mean(sizes):.2f}" if sizes else "-"


def _accuracy(found: Sequence[int], expected: Sequence[int | None]) -> float | None:
    """Return the share of equal entries in percent; ``None`` where one is not known."""
    if None in expected:
        return None
    return 100 * statistics.mean(a == b for a, b in zip(found, expected, strict=True))


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{spread}"
