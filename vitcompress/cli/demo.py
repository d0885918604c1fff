"""The embedded demo."""

from pathlib import Path
from typing import Annotated

import typer

from vitcompress.cli.application import app
from vitcompress.terminal import out

__all__ = ["demo"]


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep artefacts and ONNX files here")
    ] = None,
) -> None:
    """Quantize the embedded digits model, export it, run it in onnxruntime, print a table."""
    from vitcompress.demo.run import run_demo

    run_demo(out, output)
