"""Options that several commands share, and the file that `--json` writes."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from vitcompress.artifact import write_file

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


def write_json(path: Path | None, entry: BaseModel) -> None:
    """Write figures as JSON, whole or not at all; nothing where the user named no file."""
    write_text(path, entry.model_dump_json(indent=1) + "\n")


def write_text(path: Path | None, text: str) -> None:
    """Write text, whole or not at all; nothing where the user named no file."""
    if path is not None:
        write_file(path, lambda draft: _write(draft, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
