"""Sweeps: one model under every scheme, recipe and seed of a grid, cell by cell."""

from vitcompress.sweep.records import FailedCell, GridCell, Sweep, SweepIndex, read_sweep
from vitcompress.sweep.run import sweep

__all__ = [
    "FailedCell",
    "GridCell",
    "Sweep",
    "SweepIndex",
    "read_sweep",
    "sweep",
]
