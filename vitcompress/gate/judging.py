"""Results against a baseline: regressed, within noise, within tolerance, or improved.

A paired metric has moved when it is farther from its value than the tolerance and the exact
test of the same images says that chance would rarely do that; see ``numerics.paired``. Figures
without images, size and latency, have moved when they are outside the tolerance. An
improvement fails too unless it is accepted: a better figure that nobody writes down hides the
next loss.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from vitcompress.errors import InputError
from vitcompress.gate.baseline import (
    PAIRED,
    Baseline,
    Cell,
    Limit,
    ModelEntry,
    unpack_bits,
)
from vitcompress.numerics.paired import paired_difference
from vitcompress.result import Result
from vitcompress.results import CellName, cells_of, figure_of, image_outcomes

__all__ = [
    "CellVerdict",
    "GateReport",
    "MetricVerdict",
    "judge",
    "missing_figure",
]

#: Better is less.
_LESS_IS_BETTER = ("size",)

Verdict = Literal["regressed", "improved", "within noise", "within tolerance"]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MetricVerdict(_Entry):
    """One figure of a cell beside its baseline.

    Attributes:
        metric: One of ``results.METRICS``.
        baseline: Over the seeds, in the unit of ``results.UNITS``.
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
        unmatched: Cells without a result or without a limit, with what to do; each fails.
    """

    schema_version: int = 1
    passed: bool
    cells: tuple[CellVerdict, ...]
    unmatched: dict[str, str]


def judge(
    results: Sequence[Result],
    baseline: Baseline,
    *,
    missing: Mapping[str, str] | None = None,
    accept_improvement: bool = False,
    complete: bool = True,
) -> GateReport:
    """Return the verdict on results.

    Args:
        results: Cells of a sweep, or one.
        baseline: What they are held to.
        missing: Cells that were asked for and have no result, with the reason.
        accept_improvement: Let figures pass that are better than the tolerance allows.
        complete: Whether every cell of the baseline needs a result.

    Raises:
        InputError: There is nothing to judge, results and baseline are not of the same model
            or images, or a figure that the baseline limits was not measured.
    """
    if not results and not missing:
        raise InputError("gate: no results; sweep at least one cell")
    measured, limited = cells_of(results), baseline.cells()
    verdicts: list[CellVerdict] = []
    unmatched: dict[str, str] = dict(missing or {})
    for name, group in measured.items():
        if name not in limited:
            unmatched[str(name)] = "is not in the baseline; --update-baseline adds it"
            continue
        _check_same(name, group, baseline.models[name.model], limited[name])
        seeds = [result.origin.seed for result in group]
        if seeds != sorted(limited[name].seeds):
            unmatched[str(name)] = (
                f"has seeds {seeds}, but {sorted(limited[name].seeds)} in the baseline; sweep "
                "the same seeds, or --update-baseline"
            )
            continue
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
    for result in group:
        if result.execution != cell.execution:
            raise InputError(
                f"{name}: outcomes were {result.execution}, those of the baseline "
                f"{cell.execution}; compare like with like"
            )


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
            raise InputError(
                f"{name}: the baseline limits {metric}, but {missing_figure(metric)}"
            )
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


def missing_figure(metric: str) -> str:
    """Return why a figure is not there, and what to do."""
    if metric == "top1":
        return "none of the images has a label; evaluate on labelled ones"
    return "a result has not measured it; measure it, or delete the key from the baseline"


def _short(digest: str) -> str:
    return digest[:12]
