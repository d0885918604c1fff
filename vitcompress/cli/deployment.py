"""Commands about a runtime: export, benchmark."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import calib
from vitcompress import api, terminal
from vitcompress.arguments import whole_numbers
from vitcompress.artifact.files import check_file_writable
from vitcompress.benchmark import DEFAULT_ROUNDS, RUNTIMES
from vitcompress.benchmark import benchmark as run_benchmark
from vitcompress.cli.application import app
from vitcompress.cli.options import (
    Json,
    write_json,
)
from vitcompress.export.onnx import TARGETS
from vitcompress.terminal import out

__all__ = ["benchmark", "export"]


@app.command()
def export(
    artefact: Annotated[Path, typer.Argument(help="Artefact directory")],
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write")],
    target: Annotated[str, typer.Option(help=" | ".join(TARGETS))] = "ort-cpu",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images in one inference; any number by default")
    ] = None,
    leftovers: Annotated[
        str,
        typer.Option(
            help="How float tables (position embeddings, class tokens) are stored: "
            "float32 | float16 | int8"
        ),
    ] = "float32",
    ir: Annotated[
        bool,
        typer.Option("--ir", help="Write OpenVINO's .xml and .bin as well (target openvino)"),
    ] = False,
    calib_: Annotated[
        str | None,
        typer.Option("--calib", help="Images to verify on; rendered ones by default"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file")] = False,
    json_: Json = None,
) -> None:
    """Write an ONNX file for a runtime, and verify that it runs as integers and agrees.

    ort-cpu is for onnxruntime on CPUs; openvino for OpenVINO on CPUs, which verifies it where
    it is installed; tensorrt and generic are checked in structure and in onnxruntime alone.
    """
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
    compressed.export_onnx(
        output,
        target=target,
        batch=batch,
        leftovers=leftovers,
        ir=ir,
        images=images,
        overwrite=overwrite,
    )
    entry = compressed.report.exports[-1]
    terminal.print_export(out, entry)
    for path in [output, *(output.with_suffix(e) for e in (".xml", ".bin") if ir)]:
        out.print(f"wrote {escape(str(path))}", soft_wrap=True)
    write_json(json_, entry)


@app.command()
def benchmark(
    paths: Annotated[list[Path], typer.Argument(help=".onnx files and artefact directories")],
    runtime: Annotated[str, typer.Option(help=" | ".join(RUNTIMES))] = "ort",
    threads: Annotated[str, typer.Option(help="Threads of each case, e.g. 1,2")] = "1",
    batch: Annotated[str, typer.Option(help="Images in one inference, e.g. 1,8")] = "1",
    repeats: Annotated[int, typer.Option(help="Rounds of each case")] = DEFAULT_ROUNDS,
    references: Annotated[
        bool, typer.Option(help="Measure float32, bfloat16 and dynamic INT8 forms as well")
    ] = True,
    json_: Json = None,
) -> None:
    """Time files in turns, beside the float32 network and onnxruntime's dynamic INT8.

    OpenVINO runs the float32 network in bfloat16 as well, where the processor has it.
    """
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
    write_json(json_, report)
