"""Commands about one quantization, place by place: analyze."""

from collections import Counter
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import calib
from vitcompress import api
from vitcompress.analyze import Analysis
from vitcompress.analyze import analyze as run_analysis
from vitcompress.analyze.records import Level, Mode
from vitcompress.analyze.run import check_settings
from vitcompress.arguments import (
    calibration_source,
    command_line,
    load_float,
    say,
    with_preprocessing,
)
from vitcompress.artifact.files import check_file_writable
from vitcompress.cli.application import app
from vitcompress.cli.options import (
    Arch,
    Batch,
    Classes,
    Crop,
    ImageSize,
    Interpolation,
    Json,
    Mean,
    Model,
    Samples,
    Seed,
    Std,
    Trust,
    write_json,
)
from vitcompress.effort import resolve_recipe
from vitcompress.terminal import out

__all__ = ["analyze", "print_analysis"]

#: Units printed of each level; all of them are in the file of ``--json``.
SHOWN = 20
DEFAULT_EVAL_SAMPLES = 64


@app.command()
def analyze(
    model: Model,
    bits: Annotated[int | None, typer.Option(help="Weight bits; activations take 8")] = None,
    scheme: Annotated[str | None, typer.Option(help="Both widths, e.g. W4A4")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe name or YAML file")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="passes.1.method=minmax; repeatable")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="only: one unit quantized; except: all but one")
    ] = "only",
    by: Annotated[str, typer.Option(help="site | layer | block")] = "site",
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds to measure in: blocks first, then the worst in detail"),
    ] = None,
    arch: Arch = None,
    num_classes: Classes = None,
    image_size: ImageSize = None,
    crop_fraction: Crop = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    calib_: Annotated[
        str | None, typer.Option("--calib", help="Calibration images, as for quantize")
    ] = None,
    samples: Samples = api.DEFAULT_SAMPLES,
    seed: Seed = 0,
    batch_size: Batch = 32,
    eval_: Annotated[
        str | None,
        typer.Option("--eval", help="Images to measure on; the calibration images by default"),
    ] = None,
    eval_samples: Annotated[
        int, typer.Option(min=1, help="Of those, this many")
    ] = DEFAULT_EVAL_SAMPLES,
    trust_input: Trust = False,
    json_: Json = None,
) -> None:
    """Find out which site, layer or block of a quantized model costs most."""
    chosen = resolve_recipe(bits=bits, scheme=scheme, recipe=recipe, overrides=set_ or ())
    check_settings(mode, by, budget)
    if json_ is not None:
        check_file_writable(json_)
    loaded = with_preprocessing(
        load_float(model, arch, trust_input, num_classes, image_size),
        crop_fraction,
        interpolation,
        mean,
        std,
    )
    source = calibration_source(calib_, samples, seed, batch_size, loaded.preprocessing)
    evaluation = None
    if eval_ is not None:
        evaluation = calib.open_source(
            eval_,
            samples=eval_samples,
            batch_size=batch_size,
            preprocessing=loaded.preprocessing,
        )
    say("model", loaded.source)
    say("scheme", f"{chosen.scheme}, recipe {chosen.name}: {chosen.description}")
    say("calibration", source.describe())
    analysis = run_analysis(
        loaded,
        recipe=chosen,
        source=source,
        evaluation=evaluation,
        mode=cast(Mode, mode),
        by=cast(Level, by),
        budget=budget,
        command=command_line(),
    )
    print_analysis(out, analysis)
    write_json(json_, analysis)


def print_analysis(console: Console, analysis: Analysis) -> None:
    """Print the most harmful units of each level that was measured, and what was not."""
    what = (
        "quantized alone" if analysis.mode == "only" else "left in float, the rest quantized"
    )
    counts = Counter(entry.level for entry in analysis.entries)
    for level, count in counts.items():
        table = Table(title=f"{level}s {what}, most harmful first", title_justify="left")
        table.add_column(level, overflow="fold")
        table.add_column("format", overflow="fold")
        for column in ("mean KL", "logits SQNR dB", "place", "agrees %"):
            table.add_column(column, justify="right", no_wrap=True)
        for entry in [e for e in analysis.entries if e.level == level][:SHOWN]:
            distance = entry.distance
            table.add_row(
                escape(entry.unit),
                escape(", ".join(entry.formats)),
                f"{distance.mean_kl:.4f}",
                f"{distance.logits_sqnr_db:.1f}",
                str(entry.sqnr_rank),
                f"{distance.agreement_percent:.1f}",
            )
        console.print(table)
        if count > SHOWN:
            console.print(f"{count - SHOWN} more {level}s, less harmful")
    console.print("ordered by KL; place: by signal-to-noise ratio of the logits")
    for name, distance in (("all", analysis.all_on), ("no", analysis.all_off)):
        console.print(
            f"{name} quantizers on: mean KL {distance.mean_kl:.4f}, logits SQNR "
            f"{distance.logits_sqnr_db:.1f} dB, agrees on {distance.agreement_percent:.1f} %"
        )
    console.print(
        f"{len(analysis.images.ids)} images ({escape(analysis.images.source)}), "
        f"{len(analysis.entries)} units in {analysis.seconds:.1f} s",
        soft_wrap=True,
    )
    if analysis.not_measured:
        missing = len(analysis.not_measured)
        console.print(
            f"[yellow]{missing} of {missing + counts[analysis.by]} {analysis.by}s not "
            f"measured[/yellow] within {analysis.budget_seconds:g} s",
            soft_wrap=True,
        )
