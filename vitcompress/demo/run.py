"""The demo: the whole road from a float model to verified files, on embedded data."""

import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save

import calib
from vitcompress.api import quantize
from vitcompress.artifact.files import check_writable
from vitcompress.demo import load_digits, load_model
from vitcompress.errors import ExportError
from vitcompress.evaluate import evaluate, onnx_predictor
from vitcompress.graph import capture

__all__ = ["run_demo"]

#: Scheme of each row. Narrow activations run as narrow integers nowhere: in 8-bit containers
#: where they are evenly spaced, as floats where the recipe gives them a logarithm.
ROWS = ("W8A8", "W4A8", "W4A4")


def run_demo(console: Console, output: Path | None) -> None:
    """Quantize the digits model at several widths, export, run and print a table.

    Args:
        console: Where to print.
        output: Directory for artefacts and ONNX files; a temporary one if not given.

    Raises:
        ConfigError: The directory cannot be written.
        ExportError: A file fails verification.
    """
    started = time.perf_counter()
    if output is not None:
        for scheme in ROWS:
            check_writable(output / scheme.lower(), overwrite=True)
    # Tensors this small gain nothing from a second thread, and lose much on a busy machine.
    torch.set_num_threads(1)
    model = load_model()
    source = calib.TensorSource(*load_digits("train"), samples=128, seed=0)
    held_out = calib.TensorSource(*load_digits("test"), batch_size=200)
    baseline = evaluate(model, held_out, execution="float")
    float_bytes = len(save(model.state_dict()))
    reference = capture(model, next(iter(source)).images, model_id="vitcompress/digits_vit")
    table = Table(title="embedded digits model, 600 held-out images", title_justify="left")
    for column in (
        "scheme",
        "recipe",
        "file kB",
        "top-1 %",
        "onnxruntime %",
        "agree %",
        "integer",
    ):
        table.add_column(column, justify="left" if column in ("scheme", "recipe") else "right")
    table.add_row(
        "float", "-", f"{float_bytes / 1e3:.0f}", f"{baseline.top1_percent:.2f}", *"---"
    )
    with tempfile.TemporaryDirectory(prefix="vitcompress-demo-") as temporary:
        folder = output or Path(temporary)
        for scheme in ROWS:
            compressed = quantize(reference, scheme=scheme, source=source)
            compressed.save(folder / scheme.lower(), overwrite=True)
            path = folder / f"{scheme.lower()}.onnx"
            images = torch.cat([batch.images for batch in source])
            result = compressed.export_onnx(path, images=images)
            simulated = evaluate(compressed, held_out)
            executed = evaluate(
                onnx_predictor(path), held_out, reference=compressed, execution="executed"
            )
            found = result.verification
            table.add_row(
                scheme,
                compressed.recipe.name,
                f"{result.size_bytes / 1e3:.0f}",
                f"{simulated.top1_percent:.2f}",
                f"{executed.top1_percent:.2f}",
                f"{executed.agreement_percent:.2f}",
                f"{found.integer_linears} of {found.linears}",
            )
            # Activations of 8 bits are promised to run as integers throughout.
            promised = compressed.recipe.scheme.activation_bits == 8
            if promised and found.integer_linears != found.linears:
                raise ExportError(f"{path.name}: float linears: {found.float_linears}")
    console.print(table)
    console.print(
        "top-1: simulated in torch; onnxruntime: the exported file; agree: both name the same "
        "digit; integer: linears that ran as integer products"
    )
    where = f"; files in {output}" if output else ""
    console.print(f"done in {time.perf_counter() - started:.1f} s{where}")
