"""What every benchmark shares: real models and images, and one JSON line for each case."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import calib
from vitcompress.benchmark import processor_name
from vitcompress.models import LoadedModel, load_model

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("VITCOMPRESS_ASSETS", ROOT.parent / "shared" / "assets"))
RESULTS = Path(__file__).resolve().parent / "results"
LIBRARIES = ("torch", "timm", "torchvision", "transformers", "onnx", "onnxruntime", "numpy")


def load_asset(name: str) -> LoadedModel:
    """Return one of the two real models, e.g. ``vit_tiny``."""
    path = ASSETS / "models" / f"{name}_patch16_224.safetensors"
    loaded = load_model(path, arch=f"timm/{name}_patch16_224")
    if not name.startswith("deit"):
        return loaded
    # The published protocol of DeiT keeps 0.875 of the edge; the library's default is 0.9.
    fields = {**loaded.preprocessing.to_dict(), "crop_fraction": 0.875}
    return LoadedModel(
        loaded.module,
        loaded.name,
        calib.Preprocessing.from_dict(fields),
        loaded.num_classes,
        loaded.source,
        loaded.digest,
    )


def calibration(
    loaded: LoadedModel, *, seed: int, samples: int = 32, batch_size: int | None = None
) -> calib.Source:
    """Return the calibration images of a seed, as the assets' README defines them."""
    return calib.open_source(
        ASSETS / "images" / "train",
        samples=samples,
        seed=seed,
        batch_size=batch_size or samples,
        preprocessing=loaded.preprocessing,
    )


def evaluation(loaded: LoadedModel, images: int | None = None) -> calib.TensorSource:
    """Return the labelled images, decoded once and kept in memory."""
    source = calib.open_source(
        ASSETS / "images" / "eval" / "labels.csv",
        samples=images,
        batch_size=50,
        preprocessing=loaded.preprocessing,
    )
    batches = list(source)
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    return calib.TensorSource(torch.cat([b.images for b in batches]), labels, batch_size=50)


def environment() -> dict[str, Any]:
    """Return versions and machine, as every result line carries them."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def results_file(name: str) -> Path:
    """Return the file that takes the results of today."""
    return RESULTS / f"{name}-{datetime.now(UTC).date().isoformat()}.jsonl"


@contextmanager
def recording(name: str, path: Path | None = None) -> Iterator[Any]:
    """Yield a function that prints a result and adds it to a file of JSON lines.

    Args:
        name: The file is ``results/<name>-<date>.jsonl``.
        path: Another file.
    """
    path = path or results_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = environment()
    with path.open("a", encoding="utf-8") as file:

        def record(**figures: Any) -> None:
            print(json.dumps(figures), flush=True)
            file.write(json.dumps({**figures, **shared}) + "\n")
            file.flush()

        yield record
