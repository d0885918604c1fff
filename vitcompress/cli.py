"""The command line: arguments in, printed tables out. ``vitcompress.api`` does the work."""

import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import calib
from vitcompress import api, terminal
from vitcompress.arguments import (
    calibration_source,
    chosen_scheme,
    default_output,
    load_float,
    overridden,
    predictor_of,
    say,
    whole_numbers,
    with_preprocessing,
)
from vitcompress.artifact import is_artifact, write_file
from vitcompress.artifact.files import check_file_writable, check_writable
from vitcompress.benchmark import DEFAULT_ROUNDS, RUNTIMES
from vitcompress.benchmark import benchmark as run_benchmark
from vitcompress.errors import VitcompressError
from vitcompress.evaluate import evaluate
from vitcompress.export.onnx import TARGETS
from vitcompress.measure import measure_activations
from vitcompress.recipe import available_recipes, load_recipe
from vitcompress.terminal import out

__all__ = ["app", "main"]

EXIT_INTERNAL, EXIT_USAGE, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 5, 130

app = typer.Typer(
    name="vitcompress",
    help="Make vision transformers small and fast after training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
err = Console(stderr=True)

# Options that several commands share.

Model = Annotated[
    str, typer.Argument(help="Weights file, timm/NAME, or package.module:factory")
]
Arch = Annotated[
    str | None,
    typer.Option(
        help="timm/NAME, torchvision/NAME, hf/ID, hf/config.json, package.module:factory"
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-input", help="Open files that run code when opened")
]
Classes = Annotated[
    int | None, typer.Option(help="Number of classes, if the weights do not tell")
]
ImageSize = Annotated[int | None, typer.Option(help="Input height and width in pixels")]
Crop = Annotated[float | None, typer.Option(help="Share of the resized edge that is kept")]
Interpolation = Annotated[str | None, typer.Option(help="bicubic, bilinear, lanczos, nearest")]
Mean = Annotated[str | None, typer.Option(help="Per-channel mean, e.g. 0.5,0.5,0.5")]
Std = Annotated[str | None, typer.Option(help="Per-channel standard deviation")]
Samples = Annotated[int, typer.Option(min=1, help="Calibration images")]
Seed = Annotated[int, typer.Option(min=0, help="Chooses the calibration images")]
Eval = Annotated[str | None, typer.Option("--eval", help="Labelled images to evaluate on")]
EvalSamples = Annotated[
    int | None, typer.Option(min=1, help="Evaluate on this many; all by default")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file")]
Batch = Annotated[int, typer.Option(min=1, help="Images in a batch")]


@app.command()
def quantize(
    model: Model,
    bits: Annotated[int | None, typer.Option(help="Weight bits; activations take 8")] = None,
    scheme: Annotated[str | None, typer.Option(help="Both widths, e.g. W4A4")] = None,
    w_bits: Annotated[int | None, typer.Option(help="Weight bits")] = None,
    a_bits: Annotated[int | None, typer.Option(help="Activation bits")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe name or YAML file")] = None,
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
    samples: Samples = api.DEFAULT_SAMPLES,
    seed: Seed = 0,
    batch_size: Batch = 32,
    eval_: Eval = None,
    eval_samples: EvalSamples = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Artefact directory to write")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier artefact")] = False,
    trust_input: Trust = False,
) -> None:
    """Quantize a model, evaluate it, and save the artefact."""
    chosen = api.resolve_recipe(
        bits=bits,
        scheme=chosen_scheme(bits, scheme, w_bits, a_bits),
        recipe=recipe,
        overrides=set_ or (),
    )
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
    compressed = api.quantize(loaded, recipe=chosen, source=source)
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
    compare = None
    if reference is not None:
        compare, _, _ = predictor_of(reference, arch, trust_input, num_classes, image_size)
    entry = evaluate(predictor, source, reference=compare)
    entry = entry.model_copy(update={"execution": execution})
    if not entry.labelled:
        out.print("[yellow]these images have no labels: no accuracy[/yellow]")
    terminal.print_evaluation(out, entry)
    if json_ is not None:
        write_file(json_, lambda path: _write(path, entry))


@app.command()
def export(
    artefact: Annotated[Path, typer.Argument(help="Artefact directory")],
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write")],
    target: Annotated[str, typer.Option(help=" | ".join(TARGETS))] = "ort-cpu",
    calib_: Annotated[
        str | None,
        typer.Option("--calib", help="Images to verify on; rendered ones by default"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file")] = False,
    json_: Json = None,
) -> None:
    """Write an ONNX file for a runtime, and verify that it runs as integers and agrees."""
    compressed = api.load(artefact)
    images = None
    if calib_ is not None:
        source = calib.open_source(
            calib_,
            samples=api.VERIFY_IMAGES,
            batch_size=api.VERIFY_IMAGES,
            preprocessing=compressed.preprocessing,
        )
        images = next(iter(source)).images
    compressed.export_onnx(output, target=target, images=images, overwrite=overwrite)
    entry = compressed.report.exports[-1]
    terminal.print_export(out, entry)
    out.print(f"wrote {escape(str(output))}", soft_wrap=True)
    if json_ is not None:
        write_file(json_, lambda path: _write(path, entry))


@app.command()
def benchmark(
    paths: Annotated[list[Path], typer.Argument(help=".onnx files and artefact directories")],
    runtime: Annotated[str, typer.Option(help=" | ".join(RUNTIMES))] = "ort",
    threads: Annotated[str, typer.Option(help="Threads of each case, e.g. 1,2")] = "1",
    batch: Annotated[str, typer.Option(help="Images in one inference, e.g. 1,8")] = "1",
    repeats: Annotated[int, typer.Option(help="Rounds of each case")] = DEFAULT_ROUNDS,
    references: Annotated[
        bool, typer.Option(help="Measure float32 and dynamic INT8 forms as well")
    ] = True,
    json_: Json = None,
) -> None:
    """Time files in turns, beside the float32 network and onnxruntime's dynamic INT8."""
    if json_ is not None:
        check_file_writable(json_)
    report = run_benchmark(
        paths,
        runtime=runtime,
        threads=whole_numbers("--threads", threads),
        batches=whole_numbers("--batch", batch),
        rounds=repeats,
        references=references,
    )
    terminal.print_benchmark(out, report)
    if json_ is not None:
        write_file(json_, lambda path: _write(path, report))


@recipes_app.command("list")
def recipes_list() -> None:
    """List the shipped recipes."""
    table = Table()
    for column in ("name", "scheme", "passes", "what it is"):
        table.add_column(column)
    for name in available_recipes():
        recipe = load_recipe(name)
        steps = " > ".join(step.name for step in recipe.passes)
        table.add_row(name, str(recipe.scheme), steps, recipe.description)
    out.print(table)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="Recipe name, name-wNaM, or YAML file")],
    scheme: Annotated[str | None, typer.Option(help="Widths that w and a stand for")] = None,
) -> None:
    """Print a recipe with every default written out."""
    recipe = api.resolve_recipe(scheme=scheme, recipe=name)
    typer.echo(recipe.to_yaml(), nl=False)


@recipes_app.command("validate")
def recipes_validate(file: Annotated[str, typer.Argument(help="YAML file")]) -> None:
    """Check a recipe without loading a model."""
    recipe = load_recipe(file if file.endswith((".yaml", ".yml")) else Path(file))
    out.print(
        f"{escape(file)}: valid; {recipe.label}, {len(recipe.passes)} passes", soft_wrap=True
    )


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep artefacts and ONNX files here")
    ] = None,
) -> None:
    """Quantize the embedded digits model, export it, run it in onnxruntime, print a table."""
    from vitcompress.demo.run import run_demo

    run_demo(out, output)


def _write(path: Path, entry: BaseModel) -> None:
    path.write_text(entry.model_dump_json(indent=1) + "\n", encoding="utf-8")


# Errors to exit codes


def main() -> None:
    """Run the command line and exit with the documented code."""
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(_run())


def _run() -> int:
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:  # the command line library has met the interrupt
            return _fail("interrupted; nothing was written", EXIT_INTERRUPTED)
        return end.code if isinstance(end.code, int) else EXIT_USAGE
    except VitcompressError as error:
        return _fail(str(error), error.exit_code)
    except calib.SourceError as error:
        return _fail(str(error), EXIT_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone; writing to it again at exit would raise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        traceback.print_exc()
        return _fail(
            f"internal error ({type(error).__name__}); please report it with the lines above",
            EXIT_INTERNAL,
        )
    return 0


def _fail(message: str, code: int) -> int:
    err.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True, highlight=False)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
