"""Commands about a model: quantize, inspect, evaluate."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import calib
from vitcompress import api, terminal
from vitcompress.arguments import (
    calibration_source,
    chosen_scheme,
    command_line,
    default_output,
    load_float,
    overridden,
    predictor_of,
    say,
    with_preprocessing,
)
from vitcompress.artifact import is_artifact
from vitcompress.artifact.files import check_writable
from vitcompress.cli.application import app
from vitcompress.cli.options import (
    Arch,
    Batch,
    Classes,
    Crop,
    Eval,
    EvalSamples,
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
from vitcompress.effort import EFFORTS, effort_named, resolve_recipe
from vitcompress.evaluate import evaluate
from vitcompress.measure import measure_activations
from vitcompress.terminal import out

__all__ = ["evaluate_command", "inspect", "quantize"]


@app.command()
def quantize(
    model: Model,
    bits: Annotated[int | None, typer.Option(help="Weight bits; activations take 8")] = None,
    scheme: Annotated[str | None, typer.Option(help="Both widths, e.g. W4A4")] = None,
    w_bits: Annotated[int | None, typer.Option(help="Weight bits")] = None,
    a_bits: Annotated[int | None, typer.Option(help="Activation bits")] = None,
    effort: Annotated[
        str | None,
        typer.Option(help="; ".join(f"{n}: {e.description}" for n, e in EFFORTS.items())),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe name or YAML file, instead of --effort")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="passes.1.method=minmax; repeatable")
    ] = None,
    arch: Arch = None,
    num_classes: Classes = None,
    image_size: ImageSize = None,
    crop_fraction: Crop = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    calib_: Annotated[
        str | None,
        typer.Option(
            "--calib", help="Calibration images: folder, .csv, .npy, .npz, .safetensors, .tar"
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"Calibration images; those of the effort, or {api.DEFAULT_SAMPLES}"
        ),
    ] = None,
    seed: Seed = 0,
    batch_size: Batch = 32,
    eval_: Eval = None,
    eval_samples: EvalSamples = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Artefact directory to write")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier artefact")] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Keep finished blocks of a reconstruction here, and go on from them"
        ),
    ] = None,
    trust_input: Trust = False,
) -> None:
    """Quantize a model, evaluate it, and save the artefact."""
    chosen = resolve_recipe(
        bits=bits,
        scheme=chosen_scheme(bits, scheme, w_bits, a_bits),
        effort=effort,
        recipe=recipe,
        overrides=set_ or (),
    )
    if samples is None:
        samples = api.DEFAULT_SAMPLES if recipe else effort_named(effort or "fast").samples
    destination = output or default_output(model, chosen)
    check_writable(destination, overwrite=overwrite)
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
    say("preprocessing", loaded.preprocessing.describe())
    say("scheme", f"{chosen.scheme}, recipe {chosen.name}: {chosen.description}")
    say("calibration", source.describe())
    compressed = api.quantize(loaded, recipe=chosen, source=source, checkpoint=checkpoint)
    protocol = compressed.report.protocol.model_copy(update={"command": command_line()})
    compressed.report = compressed.report.model_copy(update={"protocol": protocol})
    if source.skipped:
        names = ", ".join(f"{s.id} ({s.reason})" for s in source.skipped[:3])
        out.print(
            f"[yellow]{len(source.skipped)} calibration files skipped:[/yellow] "
            f"{escape(names)}"
        )
    if evaluation is not None:
        entry = evaluate(compressed, evaluation, reference=loaded.module)
        compressed.report = compressed.report.model_copy(
            update={"evaluations": (*compressed.report.evaluations, entry)}
        )
    compressed.save(destination, overwrite=overwrite)
    terminal.print_report(out, compressed.report)
    out.print(f"saved to {escape(str(destination))}", soft_wrap=True)
    out.print(
        f"next: vitcompress export {escape(str(destination))} --target ort-cpu -o model.onnx",
        soft_wrap=True,
    )


@app.command()
def inspect(
    model: Model,
    arch: Arch = None,
    num_classes: Classes = None,
    image_size: ImageSize = None,
    calib_: Annotated[
        str | None, typer.Option("--calib", help="Show ranges on these images")
    ] = None,
    samples: Samples = api.DEFAULT_SAMPLES,
    seed: Seed = 0,
    batch_size: Batch = 32,
    trust_input: Trust = False,
) -> None:
    """Show the sites of a model or artefact, their roles, and what is not recognised."""
    if is_artifact(Path(model)):
        compressed = api.load(model)
        graph, preprocessing = compressed.graph, compressed.preprocessing
    else:
        loaded = load_float(model, arch, trust_input, num_classes, image_size)
        say("model", loaded.source)
        graph, preprocessing = api.capture_model(loaded), loaded.preprocessing
    measurements = None
    if calib_ is not None:
        source = calib.open_source(
            calib_,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
            preprocessing=preprocessing,
        )
        measurements = measure_activations(graph, source)
    terminal.print_graph(out, graph, measurements)
    if is_artifact(Path(model)):
        terminal.print_report(out, compressed.report)


@app.command("evaluate")
def evaluate_command(
    model: Annotated[
        str, typer.Argument(help="Artefact directory, .onnx file or float model")
    ],
    eval_: Annotated[str, typer.Option("--eval", help="Labelled images")],
    reference: Annotated[
        str | None, typer.Option(help="Float model or artefact to compare with")
    ] = None,
    arch: Arch = None,
    num_classes: Classes = None,
    image_size: ImageSize = None,
    crop_fraction: Crop = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    eval_samples: EvalSamples = None,
    batch_size: Batch = 32,
    trust_input: Trust = False,
    json_: Json = None,
) -> None:
    """Measure accuracy of an artefact, an ONNX file or a float model."""
    predictor, preprocessing, execution = predictor_of(
        model, arch, trust_input, num_classes, image_size
    )
    preprocessing = overridden(preprocessing, crop_fraction, interpolation, mean, std)
    source = calib.open_source(
        eval_, samples=eval_samples, batch_size=batch_size, preprocessing=preprocessing
    )
    say("preprocessing", preprocessing.describe())
    compare, kind = None, "float"
    if reference is not None:
        compare, _, kind = predictor_of(reference, arch, trust_input, num_classes, image_size)
    entry = evaluate(predictor, source, reference=compare)
    entry = entry.model_copy(update={"execution": execution})
    if not entry.labelled:
        out.print("[yellow]these images have no labels: no accuracy[/yellow]")
    terminal.print_evaluation(out, entry, "float" if kind == "float" else "reference")
    write_json(json_, entry)
