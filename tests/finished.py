"""Finished models for tests: quantized from graphs that were captured already."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from vitcompress import api
from vitcompress.api import CompressedModel
from vitcompress.calibration import CalibrationSource
from vitcompress.graph import CapturedGraph
from vitcompress.recipe import available_recipes

#: The tiny model as the command line is told of it: a factory of plain PyTorch.
TINY = ("tiny:tiny_vit", "--image-size", "32")


def quantized(
    graph: CapturedGraph, source: CalibrationSource, **settings: Any
) -> CompressedModel:
    """Return what ``vitcompress.quantize`` makes of a graph, without the time of a capture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "capture", lambda *_, **__: graph)
        return api.quantize(nn.Identity(), source=source, **settings)


def one_step(recipe: str) -> list[str]:
    """Return overrides under which a recipe that trains takes a single step."""
    passes = yaml.safe_load(available_recipes()[recipe].read_text())["passes"]
    return [
        f"passes.{i}.iterations=1" for i, step in enumerate(passes) if "iterations" in step
    ]


def edit_json(folder: Path, name: str, edit: Callable[[Any], None]) -> None:
    """Change a JSON file of an artefact, and its digest with it, as a forger would."""
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))
    if name != "manifest.json":
        renew_digest(folder, name)


def renew_digest(folder: Path, name: str) -> None:
    """Make the manifest of an artefact agree with a file of it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    manifest["files"][name] = {"sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
