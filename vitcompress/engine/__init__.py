"""Running passes over a graph, and data through it."""

from vitcompress.engine.checkpoint import Checkpoint
from vitcompress.engine.local import LocalEngine
from vitcompress.engine.pipeline import PassRecord, run_recipe

__all__ = ["Checkpoint", "LocalEngine", "PassRecord", "run_recipe"]
