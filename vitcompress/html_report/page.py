"""The page of a sweep: one HTML text with its style and drawings inside."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vitcompress.analyze import Analysis
from vitcompress.html_report import figures
from vitcompress.html_report.content import (
    CellFigures,
    Table,
    cell_figures,
    harm_table,
    left_alone,
    shares_table,
    sites_table,
    worst_sites,
    worst_table,
)
from vitcompress.html_report.drawing import shown_name
from vitcompress.html_report.plain import failures_table, provenance_table
from vitcompress.sweep import Sweep

__all__ = ["render"]


@dataclass(frozen=True)
class Figure:
    """A drawing with the table behind it.

    Attributes:
        title: Heading.
        note: How to read it.
        svg: The drawing.
        table: Its numbers.
    """

    title: str
    note: str
    svg: Markup
    table: Table


@dataclass(frozen=True)
class CellPage:
    """What the page says of one recipe and scheme."""

    label: str
    summary: str
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]
    recipe: str


def render(sweep: Sweep, analyses: Sequence[Analysis] = ()) -> str:
    """Return the page of a sweep with at least one result.

    Raises:
        InputError: Results do not belong together, or some images have no label.
    """
    cells = cell_figures(sweep)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown_name
    failed = failures_table(sweep)
    return environment.get_template("page.html").render(
        model=sweep.index.model,
        evaluation=sweep.index.evaluation,
        seeds=sweep.index.seeds,
        curves=_curves(cells, sweep),
        harm=[_harm(analysis, number) for number, analysis in enumerate(analyses)],
        cells=[_cell_page(cell, number) for number, cell in enumerate(cells)],
        failed=failed if failed.rows else None,
        provenance=provenance_table(sweep),
    )


def _curves(cells: list[CellFigures], sweep: Sweep) -> tuple[Figure, ...]:
    table = shares_table(cells, sweep)
    images = len(sweep.index.evaluation.ids)
    note = (
        f"Marks are means over seeds, bars reach from the least to the greatest seed. "
        f"{images} images leave an uncertainty of their own, which the table gives."
    )
    return (
        Figure(
            "Accuracy against bit-width",
            note,
            Markup(figures.accuracy_by_scheme(cells, sweep)),
            table,
        ),
        Figure(
            "Accuracy against size",
            "The dashed line is the Pareto front: nothing is both smaller and better.",
            Markup(figures.accuracy_by_size(cells, sweep)),
            table,
        ),
        Figure(
            "Bit allocation",
            "Every site from the input on the left to the head; weights above activations.",
            Markup(figures.bit_strips(cells)),
            _bits_table(cells),
        ),
    )


def _bits_table(cells: list[CellFigures]) -> Table:
    rows = []
    for cell in cells:
        for what, stored in (("weights", True), ("activations", False)):
            sites = [s for s in cell.report.sites if (s.role == "weight") is stored]
            counts: dict[str, int] = {}
            for site in sites:
                bits = "float" if site.bits is None else f"{site.bits} bits"
                counts[bits] = counts.get(bits, 0) + 1
            shown = ", ".join(f"{n} of {b}" for b, n in sorted(counts.items()))
            rows.append((cell.name.recipe, cell.name.scheme, what, shown))
    return Table("Sites by width", ("recipe", "scheme", "what", "sites"), tuple(rows))


def _harm(analysis: Analysis, number: int) -> Figure:
    what = (
        "Each unit quantized alone"
        if analysis.mode == "only"
        else "Everything quantized but one unit; the less is left, the more harm it did"
    )
    missing = len(analysis.not_measured)
    left = f"; not measured: {missing}" if missing else ""
    return Figure(
        f"{analysis.recipe}, {analysis.by} by {analysis.by}",
        f"{what}; {len(analysis.images.ids)} images{left}. All quantized: KL "
        f"{analysis.all_on.mean_kl:.4f}.",
        Markup(figures.harm_bars(analysis, f"harm{number}")),
        harm_table(analysis),
    )


def _cell_page(cell: CellFigures, number: int) -> CellPage:
    report, slug = cell.report, f"cell{number}"
    shown = [
        Figure(
            "Noise of every site",
            f"Seed {cell.seeds[0]}; weights and activations in the order of the network.",
            Markup(figures.noise_bars(report, f"{slug}-noise")),
            sites_table(report),
        )
    ]
    if worst_sites(report):
        shown.append(
            Figure(
                "Ranges of the noisiest activations",
                "From the least to the greatest value; dotted lines are one root mean square "
                "to each side of 0. A bar that reaches far beyond is ruled by outliers.",
                Markup(figures.range_plot(report, f"{slug}-ranges")),
                worst_table(report),
            )
        )
    top1 = "" if cell.top1 is None else f"top-1 {cell.top1.mean:.2f} %, "
    return CellPage(
        label=cell.label,
        summary=f"{top1}agrees on {cell.agreement.mean:.2f} %, {cell.size_bytes / 1e6:.2f} MB",
        figures=tuple(shown),
        tables=(left_alone(report),),
        recipe=cell.result.origin.resolved_recipe,
    )
