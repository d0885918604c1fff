"""What the page of a sweep says, as figures and tables of plain text; no drawing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vitcompress.analyze import Analysis, AnalysisEntry
from vitcompress.numerics.paired import mean_interval
from vitcompress.recipe import Scheme
from vitcompress.report import CompressionReport, SiteEntry
from vitcompress.result import Result
from vitcompress.results import CellName, cells_of, image_outcomes
from vitcompress.sweep import Sweep

__all__ = [
    "CellFigures",
    "Share",
    "Table",
    "cell_figures",
    "harm_table",
    "left_alone",
    "metric_of",
    "pareto_front",
    "shares_table",
    "sites_table",
    "worst_sites",
    "worst_table",
    "worst_units",
]

WORST = 8
UNITS = 20


@dataclass(frozen=True)
class Table:
    """Rows of text under headings.

    Attributes:
        caption: What the table is, for people and screen readers.
        columns: Headings.
        rows: One text for each column.
        numeric: Positions of the columns that hold numbers.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = field(default=frozenset())


@dataclass(frozen=True)
class Share:
    """A share of images in percent.

    Attributes:
        mean: Over seeds.
        seeds: Of each seed.
        low: Lower end of the 95 % interval over images.
        high: Upper end.
    """

    mean: float
    seeds: tuple[float, ...]
    low: float
    high: float


@dataclass(frozen=True)
class CellFigures:
    """One recipe and scheme of the sweep.

    Attributes:
        name: Model, scheme and recipe.
        seeds: In order.
        top1: ``None`` without labels.
        agreement: With the float model.
        kl: Mean KL divergence from the float model, nats.
        size_bytes: Mean over seeds.
        bits_per_weight: Of every stored number, mean over seeds.
        latency_ratio: ``None`` unless every seed has one.
        report: Of the first seed; sites are those of one calibration.
        result: Of the first seed.
    """

    name: CellName
    seeds: tuple[int, ...]
    top1: Share | None
    agreement: Share
    kl: float
    size_bytes: float
    bits_per_weight: float
    latency_ratio: float | None
    report: CompressionReport
    result: Result

    @property
    def label(self) -> str:
        """Scheme and recipe."""
        return f"{self.name.scheme} {self.name.recipe}"


def cell_figures(sweep: Sweep) -> list[CellFigures]:
    """Return the cells of a sweep that have results, recipe by recipe, wide schemes first.

    Raises:
        InputError: Results do not belong together, or some images have no label.
    """
    found = [
        _figures(name, group)
        for name, group in cells_of(tuple(sweep.results.values())).items()
    ]
    recipes = list(dict.fromkeys(cell.name.recipe for cell in found))
    return sorted(found, key=lambda c: (recipes.index(c.name.recipe), *_width(c.name.scheme)))


def _figures(name: CellName, group: Sequence[Result]) -> CellFigures:
    ratios = [result.latency_ratio for result in group]
    known = [ratio for ratio in ratios if ratio is not None]
    agreement = _share(group, "agreement")
    assert agreement is not None  # needs no labels
    return CellFigures(
        name=name,
        seeds=tuple(result.origin.seed for result in group),
        top1=_share(group, "top1"),
        agreement=agreement,
        kl=float(np.mean([result.outcomes.kl for result in group])),
        size_bytes=float(np.mean([result.report.size.stored_bytes for result in group])),
        bits_per_weight=float(
            np.mean([result.report.size.bits_per_weight for result in group])
        ),
        latency_ratio=float(np.mean(known)) if len(known) == len(ratios) else None,
        report=group[0].report,
        result=group[0],
    )


def _share(group: Sequence[Result], metric: str) -> Share | None:
    rows = [image_outcomes(result, metric) for result in group]
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return None
    outcomes = np.stack(known)
    low, high = mean_interval(outcomes)
    seeds = tuple(100.0 * float(row.mean()) for row in outcomes)
    return Share(float(np.mean(seeds)), seeds, low, high)


def _width(scheme: str) -> tuple[int, int]:
    """Return a key that puts wide schemes first."""
    bits = Scheme.parse(scheme)
    return -(bits.weight_bits + bits.activation_bits), -bits.weight_bits


def schemes_of(cells: Sequence[CellFigures]) -> list[str]:
    """Return the schemes, wide ones first."""
    return sorted(dict.fromkeys(cell.name.scheme for cell in cells), key=_width)


def metric_of(cells: Sequence[CellFigures]) -> str:
    """Return ``top1`` where all cells have labels, else ``agreement``."""
    return "top1" if all(cell.top1 is not None for cell in cells) else "agreement"


def share_of(cell: CellFigures, metric: str) -> Share:
    """Return a cell's share for a metric of :func:`metric_of`."""
    found = cell.top1 if metric == "top1" else cell.agreement
    assert found is not None
    return found


def pareto_front(cells: Sequence[CellFigures], metric: str) -> list[CellFigures]:
    """Return the cells that none beats in both size and accuracy, small ones first."""
    front: list[CellFigures] = []
    for cell in sorted(cells, key=lambda c: (c.size_bytes, -share_of(c, metric).mean)):
        if not front or share_of(cell, metric).mean > share_of(front[-1], metric).mean:
            front.append(cell)
    return front


# Tables


def shares_table(cells: Sequence[CellFigures], sweep: Sweep) -> Table:
    """Return the figures of every cell, the float model first."""
    metric = metric_of(cells)
    front = {cell.name for cell in pareto_front(cells, metric)}
    float_mb = f"{sweep.index.float_bytes / 1e6:.2f}"
    rows = [("float", "-", float_top1(sweep), "", "", float_mb, "32.00", "1.00", "")]
    for cell in cells:
        top1 = cell.top1
        rows.append(
            (
                cell.name.recipe,
                cell.name.scheme,
                "-" if top1 is None else _with_seeds(top1),
                "-" if top1 is None else f"{top1.low:.1f} to {top1.high:.1f}",
                _with_seeds(cell.agreement),
                f"{cell.size_bytes / 1e6:.2f}",
                f"{cell.bits_per_weight:.2f}",
                "-" if cell.latency_ratio is None else f"{cell.latency_ratio:.2f}",
                "yes" if cell.name in front else "",
            )
        )
    return Table(
        "Every cell: mean over seeds, with the least and the greatest seed in brackets",
        (
            *("recipe", "scheme", "top-1 %", "95 % interval over images"),
            *("agrees with float %", "MB", "bits per stored number"),
            *("times faster", "Pareto front"),
        ),
        tuple(rows),
        frozenset({2, 3, 4, 5, 6, 7}),
    )


def float_top1(sweep: Sweep) -> str:
    """Return the float model's accuracy, or a dash without labels."""
    value = float_share(sweep)
    return "-" if value is None else f"{value:.2f}"


def float_share(sweep: Sweep) -> float | None:
    """Return the float model's top-1 in percent; ``None`` unless every image has a label."""
    reference = sweep.index.reference
    if None in reference.labels:
        return None
    right = np.array(reference.predictions) == np.array(reference.labels)
    return 100.0 * float(right.mean())


def _with_seeds(share: Share) -> str:
    if len(share.seeds) == 1:
        return f"{share.mean:.2f}"
    return f"{share.mean:.2f} ({min(share.seeds):.2f} to {max(share.seeds):.2f})"


def sites_table(report: CompressionReport) -> Table:
    """Return format, noise and range of every site."""
    rows = tuple(
        (
            site.site,
            site.role,
            site.spec or "float",
            "-" if site.sqnr_db is None else f"{site.sqnr_db:.1f}",
            _extent(site),
        )
        for site in report.sites
    )
    return Table(
        "Every site in the order of the network",
        ("site", "role", "format", "SQNR dB", "least and greatest value"),
        rows,
        frozenset({3, 4}),
    )


def harm_table(analysis: Analysis) -> Table:
    """Return every unit that was measured, in the order of the analysis."""
    rows = tuple(
        (
            entry.unit,
            entry.level,
            ", ".join(entry.formats),
            f"{entry.distance.mean_kl:.3g}",
            f"{entry.distance.logits_sqnr_db:.1f}",
            f"{entry.distance.agreement_percent:.2f}",
        )
        for entry in analysis.entries
    )
    return Table(
        "Every unit that was measured, most harmful first",
        ("unit", "level", "formats", "mean KL", "logits SQNR dB", "agrees with float %"),
        rows,
        frozenset({3, 4, 5}),
    )


def worst_units(analysis: Analysis) -> list[AnalysisEntry]:
    """Return the units with most to say of the finest level measured, the first ones first.

    Quantized alone, those far from the float model did the harm; left in float alone, those
    that brought the model near to it did.
    """
    levels = [entry.level for entry in analysis.entries]
    finest = next((n for n in ("site", "layer", "block") if n in levels), None)
    return [entry for entry in analysis.entries if entry.level == finest][:UNITS]


def worst_sites(report: CompressionReport) -> list[SiteEntry]:
    """Return the noisiest quantized activations whose range was measured."""
    sites = report.worst_sites(len(report.sites))
    return [s for s in sites if s.low is not None and s.high is not None and s.rms][:WORST]


def worst_table(report: CompressionReport) -> Table:
    """Return noise and range of the noisiest activations."""
    rows = tuple(
        (
            site.site,
            f"{site.sqnr_db:.1f}",
            _extent(site),
            f"{site.rms:.3g}",
            "-" if site.peak_ratio is None else f"{site.peak_ratio:.1f}",
            "-" if site.peak_channel is None else str(site.peak_channel),
        )
        for site in worst_sites(report)
    )
    return Table(
        "The noisiest activations",
        (
            *("site", "SQNR dB", "least and greatest value", "root mean square"),
            *("peak over root mean square", "channel of the peak"),
        ),
        rows,
        frozenset({1, 2, 3, 4, 5}),
    )


def _extent(site: SiteEntry) -> str:
    if site.low is None or site.high is None:
        return "-"
    return f"{site.low:.3g} to {site.high:.3g}"


def left_alone(report: CompressionReport) -> Table:
    """Return what stays float, with the reason where a pass gave one."""
    reasons: dict[str, list[str]] = {}
    for step in report.passes:
        for place, reason in step.skipped.items():
            reasons.setdefault(place, []).append(f"{step.name}: {reason}")
    rows = [
        (site.site, site.role, "; ".join(reasons.pop(site.site, ["no rule matches it"])))
        for site in report.sites
        if site.spec is None
    ]
    quantized = {site.site for site in report.sites if site.spec is not None}
    rows += [
        (place, "left by a pass", "; ".join(found))
        for place, found in reasons.items()
        if place not in quantized
    ]
    rows += [
        (name, "stored tensor", f"float, {count:,} bytes")
        for name, count in report.size.largest_float_tensors.items()
    ]
    return Table(
        "What was not quantized, and the largest tensors that stay float",
        ("place", "role", "reason"),
        tuple(rows),
    )
