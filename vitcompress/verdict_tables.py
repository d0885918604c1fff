"""Tables of gates and comparisons."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vitcompress.compare import Change, Comparison, SiteChange
from vitcompress.gate import CellVerdict, GateReport, MetricVerdict
from vitcompress.gate.formats import difference_text, interval_text, value_text

__all__ = ["print_comparison", "print_gate", "print_update"]

#: Rows of sites that are printed; JSON has all.
MOST_SITES = 20

_COLOURS = {"regressed": "red", "improved": "yellow", "within noise": "yellow"}


def print_gate(console: Console, report: GateReport) -> None:
    """Print the verdict on each figure, and on all."""
    for model in dict.fromkeys(cell.model for cell in report.cells):
        _print_cells(console, model, [c for c in report.cells if c.model == model])
    for cell in report.cells:
        for metric in cell.metrics:
            if metric.verdict == "within noise":
                console.print(
                    f"[yellow]{escape(str(cell.name))}, {metric.metric}:[/yellow] moved "
                    f"farther than the tolerance of {metric.tolerance:g} pp, but "
                    f"{cell.images} images cannot tell it from chance; the interval is "
                    f"{escape(interval_text(metric))} pp",
                    soft_wrap=True,
                )
    for name, reason in report.unmatched.items():
        console.print(f"[red]{escape(name)}[/red] {escape(reason)}", soft_wrap=True)
    failed = sum(metric.failed for cell in report.cells for metric in cell.metrics)
    failed += len(report.unmatched)
    total = sum(len(cell.metrics) for cell in report.cells) + len(report.unmatched)
    console.print(
        f"[green]gate passed:[/green] {total} figures"
        if report.passed
        else f"[red]gate failed:[/red] {failed} of {total} figures"
    )
    if any(m.failed and m.verdict == "improved" for c in report.cells for m in c.metrics):
        console.print(
            "better than the baseline: record it with --update-baseline, or let it pass with "
            "--accept-improvement",
            soft_wrap=True,
        )


def _print_cells(console: Console, model: str, cells: Sequence[CellVerdict]) -> None:
    title = f"{escape(model)}, {cells[0].images} images"
    table = Table(title=title, title_justify="left")
    table.add_column("cell, metric ± tolerance", overflow="fold")
    for column in ("baseline", "now", "difference", "95 % interval", "p", "won/lost"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for cell in cells:
        seeds = f", {len(cell.seeds)} seeds" if len(cell.seeds) > 1 else ""
        table.add_row(f"[bold]{escape(f'{cell.scheme} {cell.recipe}{seeds}')}[/bold]")
        for metric in cell.metrics:
            name = f"  {metric.metric} ± {metric.tolerance:g}"
            table.add_row(name, *_figures(metric), _coloured(metric))
    console.print(table)


def _figures(metric: MetricVerdict) -> tuple[str, ...]:
    name = metric.metric
    return (
        value_text(name, metric.baseline),
        value_text(name, metric.value),
        difference_text(name, metric.difference),
        *(
            ("", "", "")
            if metric.p_value is None
            else (
                escape(interval_text(metric)),
                f"{metric.p_value:.2g}",
                f"{metric.gained}/{metric.lost}",
            )
        ),
    )


def _coloured(metric: MetricVerdict) -> str:
    colour = _COLOURS.get(metric.verdict, "green")
    if metric.verdict == "improved" and not metric.failed:
        colour = "green"
    return f"[{colour}]{metric.verdict}[/{colour}]"


def print_update(console: Console, path: str, done: Mapping[str, str]) -> None:
    """Print what was written into a baseline."""
    for name, what in done.items():
        console.print(f"{escape(name)}: {what}", soft_wrap=True)
    console.print(f"wrote {escape(path)}", soft_wrap=True)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print what differs between two results: conditions, recipe, size, sites, accuracy."""
    console.print(f"A: {escape(comparison.a)}\nB: {escape(comparison.b)}", soft_wrap=True)
    for title, changes in (
        ("conditions", comparison.protocol),
        ("recipe", comparison.recipe),
        ("size", comparison.size),
    ):
        _print_changes(console, title, changes)
    changed = comparison.changed_sites()
    console.print(f"{len(changed)} of {len(comparison.sites)} sites differ")
    if changed:
        _print_sites(console, changed[:MOST_SITES])
    if len(changed) > MOST_SITES:
        console.print(f"and {len(changed) - MOST_SITES} more; --json has all of them")
    for side, names in (("A", comparison.only_a), ("B", comparison.only_b)):
        if names:
            shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            console.print(
                f"only {side} has {len(names)} sites: {escape(shown)}", soft_wrap=True
            )
    for found in comparison.accuracy:
        interval = escape(f"[{found.low_pp:+.2f}, {found.high_pp:+.2f}]")
        console.print(
            f"{found.metric}: {found.a:.2f} % -> {found.b:.2f} % "
            f"({difference_text(found.metric, found.difference_pp)}, 95 % interval "
            f"{interval} pp, p {found.p_value:.2g}; won {found.gained}, lost {found.lost} "
            "images)",
            soft_wrap=True,
        )
    if comparison.not_paired is not None:
        console.print(
            f"[yellow]accuracy not compared:[/yellow] {escape(comparison.not_paired)}",
            soft_wrap=True,
        )


def _print_changes(console: Console, title: str, changes: Sequence[Change]) -> None:
    if not changes:
        console.print(f"{title}: the same")
        return
    table = Table(title=title, title_justify="left")
    for column in ("", "A", "B"):
        table.add_column(column, overflow="fold")
    for change in changes:
        sides = (change.a, change.b)
        table.add_row(escape(change.key), *(_shown(side) for side in sides))
    console.print(table)


def _shown(value: object) -> str:
    return "-" if value is None else escape(str(value))


def _print_sites(console: Console, sites: Sequence[SiteChange]) -> None:
    table = Table(title="sites that differ, largest loss first", title_justify="left")
    table.add_column("site", overflow="fold")
    table.add_column("format")
    for column in ("SQNR dB: A", "B", "B - A", "range: A", "B"):
        table.add_column(column, justify="right", no_wrap=True)
    for site in sites:
        specs = dict.fromkeys([site.spec_a or "float", site.spec_b or "float"])
        table.add_row(
            escape(site.site),
            escape(" -> ".join(specs)),
            *(_decibels(value) for value in (site.sqnr_db_a, site.sqnr_db_b)),
            "-" if site.sqnr_change_db is None else f"{site.sqnr_change_db:+.1f}",
            *(_extent(ends) for ends in (site.range_a, site.range_b)),
        )
    console.print(table)


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _extent(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.2f} .. {ends[1]:.2f}"
