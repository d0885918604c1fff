"""The results of a sweep together: read, grouped into cells, and their figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitcompress.errors import InputError
from vitcompress.result import Result, read_result
from vitcompress.sweep import read_sweep

__all__ = [
    "METRICS",
    "UNITS",
    "CellName",
    "Results",
    "cells_of",
    "figure_of",
    "image_outcomes",
    "read_results",
]

#: Figures of a cell, in the order in which they are shown.
METRICS = ("top1", "agreement", "size", "latency_ratio")
#: Units of a figure, and of a difference of two.
UNITS = {
    "top1": ("%", "pp"),
    "agreement": ("%", "pp"),
    "size": ("B", "B"),
    "latency_ratio": ("x", "x"),
}


class CellName(NamedTuple):
    """What names a cell of a sweep, its seeds together."""

    model: str
    scheme: str
    recipe: str

    def __str__(self) -> str:
        return f"{self.model} / {self.scheme} / {self.recipe}"


@dataclass(frozen=True)
class Results:
    """What a directory of a sweep, or one file, gives.

    Attributes:
        found: In the order of the sweep.
        missing: Cells of the sweep that have no result, by name, with the reason.
    """

    found: tuple[Result, ...]
    missing: dict[str, str] = field(default_factory=dict)


def read_results(path: Path) -> Results:
    """Return the results of a sweep's directory, or the one of a file.

    Cells of earlier sweeps into the same directory, which its index does not name, stay out.

    Raises:
        InputError: There is none, or one is damaged.
    """
    if not path.is_dir():
        return Results((read_result(path),))
    sweep = read_sweep(path)
    missing: dict[str, str] = {}
    for cell in sweep.index.cells:
        if cell.key not in sweep.results:
            error = sweep.failures.get(cell.key)
            reason = "was not computed" if error is None else f"failed: {_last_line(error)}"
            missing[f"{cell.scheme} / {cell.recipe}, seed {cell.seed}"] = (
                f"{reason}; sweep again"
            )
    return Results(tuple(sweep.results.values()), missing)


def _last_line(error: str) -> str:
    """Return what an error says; of a traceback, its last line."""
    return error.strip().rpartition("\n")[2]


# Which results belong together


def cells_of(results: Sequence[Result]) -> dict[CellName, tuple[Result, ...]]:
    """Return the results of each cell in the order of their seeds.

    Raises:
        InputError: One is there twice or is about no image, or results of one model are about
            different weights or images.
    """
    groups: dict[CellName, dict[int, Result]] = {}
    first: dict[str, Result] = {}
    for result in results:
        origin = result.origin
        name = CellName(origin.model, origin.scheme, origin.recipe)
        known = first.setdefault(origin.model, result)
        if not origin.evaluation.ids:
            raise InputError(f"{name}, seed {origin.seed}: was evaluated on no image")
        if origin.model_digest != known.origin.model_digest:
            raise InputError(
                f"{name}, seed {origin.seed}: model digest {_short(origin.model_digest)}, but "
                f"{_short(known.origin.model_digest)} in another result of {origin.model}; "
                "give two models two names"
            )
        own, other = origin.evaluation, known.origin.evaluation
        if own.digest != other.digest:
            raise InputError(
                f"{name}, seed {origin.seed}: evaluated on {own.source} "
                f"({_short(own.digest)}), other results of {origin.model} on {other.source} "
                f"({_short(other.digest)}): not paired; evaluate all on the same images"
            )
        seeds = groups.setdefault(name, {})
        if seeds and result.execution != next(iter(seeds.values())).execution:
            raise InputError(f"{name}: some outcomes are simulated, some executed")
        if origin.seed in seeds:
            raise InputError(
                f"{name}: two results of seed {origin.seed}; gate one sweep at a time"
            )
        seeds[origin.seed] = result
    return {
        name: tuple(seeds[seed] for seed in sorted(seeds)) for name, seeds in groups.items()
    }


# Figures


def image_outcomes(result: Result, metric: str) -> NDArray[np.bool_] | None:
    """Return whether each image counts as right, ``[N]``; ``None`` without any label.

    Args:
        result: One cell and seed.
        metric: ``top1`` or ``agreement``.

    Raises:
        InputError: Some images have labels and some have none.
    """
    outcomes, ids = result.outcomes, result.origin.evaluation.ids
    predictions = np.array(outcomes.predictions)
    if metric == "agreement":
        return np.asarray(predictions == np.array(outcomes.reference_predictions))
    unknown = [name for name, label in zip(ids, outcomes.labels, strict=True) if label is None]
    if len(unknown) == len(ids):
        return None
    if unknown:
        raise InputError(
            f"{_seed_name(result)}: {len(unknown)} of {len(ids)} images have no label, first "
            f"'{unknown[0]}'; label all of them or none"
        )
    return np.asarray(predictions == np.array(outcomes.labels))


def figure_of(group: Sequence[Result], metric: str) -> float | None:
    """Return a figure over the seeds of a cell; ``None`` if it was not measured.

    Args:
        group: The results of a cell.
        metric: One of ``METRICS``.

    Raises:
        InputError: Some images have labels and some have none.
    """
    if metric in ("top1", "agreement"):
        rows = [image_outcomes(result, metric) for result in group]
        found = [row for row in rows if row is not None]
        return 100.0 * float(np.mean(found)) if len(found) == len(rows) else None
    values: list[float | None] = (
        [float(result.report.size.stored_bytes) for result in group]
        if metric == "size"
        else [result.latency_ratio for result in group]
    )
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _seed_name(result: Result) -> str:
    origin = result.origin
    return f"{CellName(origin.model, origin.scheme, origin.recipe)}, seed {origin.seed}"


def _short(digest: str) -> str:
    return digest[:12]
