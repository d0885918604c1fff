"""Commands about results: gate, compare, report."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from vitcompress import verdict_tables
from vitcompress.analyze import read_analysis
from vitcompress.artifact.files import check_file_writable
from vitcompress.cli.application import app
from vitcompress.cli.options import Json, write_json, write_text
from vitcompress.compare import compare as compare_results
from vitcompress.errors import ConfigError
from vitcompress.gate import judge, read_baseline, to_junit, to_markdown, update_baseline
from vitcompress.html_report import write_report
from vitcompress.results import read_results
from vitcompress.sweep import read_sweep
from vitcompress.terminal import out

__all__ = ["compare", "gate", "report"]

EXIT_GATE = 3


@app.command()
def gate(
    result: Annotated[Path, typer.Argument(help="Directory of a sweep, or one result file")],
    baseline: Annotated[Path, typer.Option(help="YAML of accepted figures")],
    accept_improvement: Annotated[
        bool, typer.Option(help="Pass what is better than the tolerance allows")
    ] = False,
    update_baseline_: Annotated[
        bool,
        typer.Option("--update-baseline", help="Write the results' figures into the baseline"),
    ] = False,
    json_: Json = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write a Markdown summary to this file")
    ] = None,
) -> None:
    """Hold results to accepted figures; exit code 3 if one has moved."""
    files = (json_, junit, markdown)
    if update_baseline_ and (accept_improvement or any(files)):
        raise ConfigError(
            "--update-baseline judges nothing; leave out --accept-improvement, --json, "
            "--junit and --markdown"
        )
    for path in files:
        if path is not None:
            check_file_writable(path)
    results = read_results(result)
    if update_baseline_:
        done = update_baseline(baseline, results.found)
        verdict_tables.print_update(out, str(baseline), {**results.missing, **done})
        return
    report = judge(
        results.found,
        read_baseline(baseline),
        missing=results.missing,
        accept_improvement=accept_improvement,
        complete=result.is_dir(),
    )
    verdict_tables.print_gate(out, report)
    write_json(json_, report)
    write_text(junit, to_junit(report))
    write_text(markdown, to_markdown(report))
    if not report.passed:
        raise typer.Exit(EXIT_GATE)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Result file or artefact directory")],
    b: Annotated[Path, typer.Argument(help="What is compared with it")],
    json_: Json = None,
) -> None:
    """Explain the difference between two results site by site."""
    if json_ is not None:
        check_file_writable(json_)
    comparison = compare_results(a, b)
    verdict_tables.print_comparison(out, comparison)
    write_json(json_, comparison)


@app.command()
def report(
    sweep: Annotated[Path, typer.Argument(help="Directory of a sweep")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML page to write")],
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables as Markdown to this file")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write a line for each cell and seed to this file")
    ] = None,
    analysis: Annotated[
        list[Path] | None,
        typer.Option(help="JSON file of vitcompress analyze to show as well; repeatable"),
    ] = None,
) -> None:
    """Draw a sweep: one page that needs nothing else."""
    for path in (output, markdown, csv):
        if path is not None:
            check_file_writable(path)
    analyses = [read_analysis(path) for path in analysis or ()]
    write_report(read_sweep(sweep), output, markdown=markdown, csv=csv, analyses=analyses)
    out.print(f"wrote {escape(str(output))}", soft_wrap=True)
