"""Compression of vision transformers after training.

import vitcompress, calib

q = vitcompress.quantize(model, bits=8, source=calib.open_source("images/", samples=32))
q.save("out/")
q.export_onnx("model.onnx")
"""

from vitcompress.analyze import analyze
from vitcompress.api import CompressedModel, export_onnx, load, quantize
from vitcompress.benchmark import benchmark
from vitcompress.errors import (
    ArtifactError,
    ConfigError,
    ExportError,
    InputError,
    PassError,
    UnsupportedModelError,
    VitcompressError,
)
from vitcompress.evaluate import evaluate
from vitcompress.graph import capture
from vitcompress.models import load_model
from vitcompress.recipe import Recipe
from vitcompress.sweep import sweep

__all__ = [
    "ArtifactError",
    "CompressedModel",
    "ConfigError",
    "ExportError",
    "InputError",
    "PassError",
    "Recipe",
    "UnsupportedModelError",
    "VitcompressError",
    "analyze",
    "benchmark",
    "capture",
    "evaluate",
    "export_onnx",
    "load",
    "load_model",
    "quantize",
    "sweep",
]
