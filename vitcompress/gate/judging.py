"""Results against a baseline: regressed, within noise, within tolerance, or improved.

A paired metric has moved when it is farther from its value than the tolerance and the exact
test of the same images says that chance would rarely do that; see ``numerics.paired``. Figures
without images, size and latency, have moved when they are outside the tolerance. An
improvement fails too unless it is accepted: a better figure that nobody writes down hides the
next loss.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from vitcompress.errors import InputError
from vitcompress.gate.baseline import (
    PAIRED,
    Baseline,
    Cell,
    CellName,
    Limit,
    ModelEntry,
    unpack_bits,
)
from vitcompress.numerics.paired import paired_difference
from vitcompress.result import Result

__all__ = [
    "UNITS",
    "CellVerdict",
    "GateReport",
    "MetricVerdict",
    "cells_of",
    "figure_of",
    "image_outcomes",
    "judge",
    "missing",
]

#: Units of a figure, and of a difference of two.
UNITS = {
    "top1": ("%", "pp"),
    "agreement": ("%", "pp"),
    "size": ("B", "B"),
    "latency_ratio": ("x", "x"),
}
#: Better is less.
_LESS_IS_BETTER = ("size",)

Verdict = Literal["regressed", "improved", "within noise", "within tolerance"]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MetricVerdict(_Entry):
    """One figure of a cell beside its baseline.

    Attributes:
        metric: One of ``baseline.METRICS``.
        baseline: Over the seeds, in the unit of ``UNITS``.
        value: The same now.
        difference: ``value`` less ``baseline``.
        tolerance: How far it may move.
        low: Lower end of the 95 % interval of the difference; ``None`` where there are no
            images to judge by, as for all that follow.
        high: Upper end.
        p_value: Chance of such a difference if nothing had changed.
        gained: Images that are right in more seeds than before.
        lost: Images that are right in fewer.
        verdict: ``within tolerance`` says that it moved no farther than allowed,
            ``within noise`` that it did, and that these images cannot tell it from chance.
        failed: Whether the gate fails by it.
    """

    metric: str
    baseline: float
    value: float
    difference: float
    tolerance: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    gained: int | None = None
    lost: int | None = None
    verdict: Verdict
    failed: bool


class CellVerdict(_Entry):
    """The figures of one model, scheme and recipe over its seeds."""

    model: str
    scheme: str
    recipe: str
    seeds: tuple[int, ...]
    images: int
    metrics: tuple[MetricVerdict, ...]

    @property
    def name(self) -> CellName:
        """What names the cell."""
        return CellName(self.model, self.scheme, self.recipe)


class GateReport(_Entry):
    """The gate's answer.

    Attributes:
        schema_version: Version of this layout.
        passed: Whether nothing failed.
        cells: Every cell that could be judged.
        unmatched: Cells that are on one side alone, with what to do; each fails the gate.
    """

    schema_version: int = 1
    passed: bool
    cells: tuple[CellVerdict, ...]
    unmatched: dict[str, str]


def judge(
    results: Sequence[Result],
    baseline: Baseline,
    *,
    accept_improvement: bool = False,
    complete: bool = True,
) -> GateReport:
    """Return the verdict on results.

    Args:
        results: Cells of a sweep, or one.
        baseline: What they are held to.
        accept_improvement: Let figures pass that are better than the tolerance allows.
        complete: Whether every cell of the baseline needs a result.

    Raises:
        InputError: Results and baseline are not of the same model, images or seeds, or a
            figure that the baseline limits was not measured.
    """
    measured, limited = cells_of(results), baseline.cells()
    verdicts: list[CellVerdict] = []
    unmatched: dict[str, str] = {}
    for name, group in measured.items():
        if name not in limited:
            unmatched[str(name)] = "is not in the baseline; --update-baseline adds it"
            continue
        _check_same(name, group, baseline.models[name.model], limited[name])
        verdicts.append(
            _judge_cell(
                name,
                group,
                limited[name],
                images=baseline.models[name.model].images.count,
                accept_improvement=accept_improvement,
            )
        )
    if complete:
        for name in limited:
            if name not in measured:
                unmatched[str(name)] = (
                    "has no result; sweep it again, or delete it from the baseline"
                )
    failed = bool(unmatched) or any(m.failed for cell in verdicts for m in cell.metrics)
    return GateReport(passed=not failed, cells=tuple(verdicts), unmatched=unmatched)


# Which results belong together


def cells_of(results: Sequence[Result]) -> dict[CellName, tuple[Result, ...]]:
    """Return the results of each cell in the order of their seeds.

    Raises:
        InputError: There is none, one is there twice, or results of one model are about
            different weights, images or labels.
    """
    if not results:
        raise InputError("gate: no results; sweep at least one cell")
    groups: dict[CellName, dict[int, Result]] = {}
    first: dict[str, Result] = {}
    for result in results:
        origin = result.origin
        name = CellName(origin.model, origin.scheme, origin.recipe)
        known = first.setdefault(origin.model, result)
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
        if origin.seed in seeds:
            raise InputError(
                f"{name}: two results of seed {origin.seed}; gate one sweep at a time"
            )
        seeds[origin.seed] = result
    return {
        name: tuple(seeds[seed] for seed in sorted(seeds)) for name, seeds in groups.items()
    }


def _check_same(
    name: CellName, group: Sequence[Result], entry: ModelEntry, cell: Cell
) -> None:
    """Check that results and baseline can be compared image by image.

    Raises:
        InputError: They cannot.
    """
    origin = group[0].origin
    pairs = {
        "of another model": (entry.digest, origin.model_digest),
        "about other images": (entry.images.digest, origin.evaluation.digest),
    }
    for what, (expected, found) in pairs.items():
        if expected != found:
            raise InputError(
                f"{name}: the baseline is {what}: digest {_short(expected)}, found "
                f"{_short(found)}; not paired. If the change is meant, --update-baseline"
            )
    if entry.images.count != len(origin.evaluation.ids):
        raise InputError(
            f"{name}: the baseline has {entry.images.count} images, "
            f"the result {len(origin.evaluation.ids)}; not paired"
        )
    seeds = [result.origin.seed for result in group]
    if seeds != sorted(cell.seeds):
        raise InputError(
            f"{name}: seeds {seeds}, but {sorted(cell.seeds)} in the baseline; "
            "sweep the same seeds, or --update-baseline"
        )
    for result in group:
        if result.execution != cell.execution:
            raise InputError(
                f"{name}: outcomes were {result.execution}, those of the baseline "
                f"{cell.execution}; compare like with like"
            )


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
        metric: One of ``baseline.METRICS``.

    Raises:
        InputError: Some images have labels and some have none.
    """
    if metric in PAIRED:
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


def _judge_cell(
    name: CellName,
    group: Sequence[Result],
    cell: Cell,
    *,
    images: int,
    accept_improvement: bool,
) -> CellVerdict:
    metrics = []
    for metric, limit in cell.limits.items():
        value = figure_of(group, metric)
        if value is None:
            raise InputError(f"{name}: the baseline limits {metric}, but {missing(metric)}")
        if metric in PAIRED:
            figures, significant = _paired_figures(metric, value, group, cell, images)
        else:
            figures = {"baseline": limit.value, "difference": value - limit.value}
            significant = True
        verdict = _verdict(metric, limit, figures["difference"], significant)
        metrics.append(
            MetricVerdict(
                metric=metric,
                value=value,
                tolerance=limit.tolerance,
                verdict=verdict,
                failed=verdict == "regressed"
                or (verdict == "improved" and not accept_improvement),
                **figures,
            )
        )
    seeds = tuple(result.origin.seed for result in group)
    return CellVerdict(**name._asdict(), seeds=seeds, images=images, metrics=tuple(metrics))


def _paired_figures(
    metric: str, value: float, group: Sequence[Result], cell: Cell, images: int
) -> tuple[dict[str, Any], bool]:
    """Return fields of a verdict, and whether chance is no likely reason."""
    before = [
        unpack_bits(getattr(bits, PAIRED[metric]), images)
        for _, bits in sorted(cell.seeds.items())
    ]
    after = [row for row in (image_outcomes(r, metric) for r in group) if row is not None]
    found = paired_difference(np.stack(before), np.stack(after))
    return {
        # The file's figure is rounded; the images are not.
        "baseline": value - found.difference_pp,
        "difference": found.difference_pp,
        "low": found.low_pp,
        "high": found.high_pp,
        "p_value": found.p_value,
        "gained": found.gained,
        "lost": found.lost,
    }, found.significant


def _verdict(metric: str, limit: Limit, difference: float, significant: bool) -> Verdict:
    # Differences of decimals are not exact; what is on the limit is within it.
    if abs(difference) <= limit.tolerance * (1 + 1e-9) + 1e-9:
        return "within tolerance"
    if not significant:
        return "within noise"
    better = difference < 0 if metric in _LESS_IS_BETTER else difference > 0
    return "improved" if better else "regressed"


def missing(metric: str) -> str:
    """Return why a figure is not there, and what to do."""
    if metric == "top1":
        return "none of the images has a label; evaluate on labelled ones"
    return "a result has not measured it; measure it, or delete the key from the baseline"


def _seed_name(result: Result) -> str:
    origin = result.origin
    return f"{CellName(origin.model, origin.scheme, origin.recipe)}, seed {origin.seed}"


def _short(digest: str) -> str:
    return digest[:12]
