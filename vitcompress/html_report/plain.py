"""The report without drawings: Markdown to read, CSV to compute with."""

import csv
import io
import re

import numpy as np

from vitcompress.html_report.content import Table, cell_figures, shares_table
from vitcompress.result import Result
from vitcompress.results import image_outcomes
from vitcompress.sweep import Sweep

__all__ = ["failures_table", "provenance_table", "to_csv", "to_markdown"]

_COLUMNS = (
    *("model", "recipe", "scheme", "seed", "execution", "images", "top1_percent"),
    *("agreement_percent", "mean_kl", "stored_bytes", "float_bytes", "bits_per_weight"),
    *("latency_ratio", "seconds", "model_digest", "evaluation_digest", "calibration_digest"),
)


def to_csv(sweep: Sweep) -> str:
    """Return a line for each cell and seed that has a result."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for result in sweep.results.values():
        writer.writerow(_line(result))
    return buffer.getvalue()


def _line(result: Result) -> list[object]:
    origin, size = result.origin, result.report.size
    top1, agreement = (image_outcomes(result, metric) for metric in ("top1", "agreement"))
    assert agreement is not None
    return [
        *(_text(origin.model), _text(origin.recipe), origin.scheme, origin.seed),
        *(result.execution, len(origin.evaluation.ids)),
        "" if top1 is None else round(100.0 * float(top1.mean()), 4),
        round(100.0 * float(agreement.mean()), 4),
        round(float(np.mean(result.outcomes.kl)), 6),
        *(size.stored_bytes, size.float_bytes, size.bits_per_weight),
        "" if result.latency_ratio is None else result.latency_ratio,
        *(result.seconds, origin.model_digest),
        *(origin.evaluation.digest, origin.calibration.digest),
    ]


def _text(name: str) -> str:
    """Return a name that no spreadsheet takes for a formula."""
    return f"'{name}" if name[:1] in ("=", "+", "-", "@", "\t", "\r") else name


def to_markdown(sweep: Sweep) -> str:
    """Return the tables of the report.

    Raises:
        InputError: Results do not belong together, or some images have no label.
    """
    index = sweep.index
    parts = [
        f"# {_md(index.model)}: accuracy against bit-width",
        f"{len(index.evaluation.ids)} images ({_md(index.evaluation.source)}), seeds "
        f"{', '.join(map(str, index.seeds))}, simulated quantization.",
        _table(shares_table(cell_figures(sweep), sweep)),
    ]
    if len(sweep.results) < len(index.cells):
        parts += ["## Cells without a result", _table(failures_table(sweep))]
    parts += ["## Protocol and provenance", _table(provenance_table(sweep))]
    return "\n\n".join(parts) + "\n"


def failures_table(sweep: Sweep) -> Table:
    """Return the cells that were asked for and have no result, with the reason."""
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for cell in sweep.index.cells:
        if cell.key not in sweep.results:
            reason = sweep.failures.get(cell.key, "not computed yet").strip()
            name = cell.recipe, cell.scheme, reason.rpartition("\n")[2]
            seeds.setdefault(name, []).append(str(cell.seed))
    rows = tuple(
        (recipe, scheme, ", ".join(found), reason)
        for (recipe, scheme, reason), found in seeds.items()
    )
    columns = ("recipe", "scheme", "seeds", "reason")
    return Table("Cells that were asked for and have no result", columns, rows)


def provenance_table(sweep: Sweep) -> Table:
    """Return what decides the figures: model, images, seeds, versions, command."""
    index = sweep.index
    rows = [
        ("model", index.model),
        ("model digest", index.model_digest),
        ("evaluation images", f"{len(index.evaluation.ids)}: {index.evaluation.source}"),
        ("evaluation digest", index.evaluation.digest),
        ("seeds", ", ".join(map(str, index.seeds))),
    ]
    origins = [result.origin for result in sweep.results.values()]
    for origin in {o.seed: o for o in origins}.values():
        images = origin.calibration
        rows += [
            (f"calibration, seed {origin.seed}", images.source),
            (f"calibration digest, seed {origin.seed}", images.digest),
        ]
    reports = [result.report for result in sweep.results.values()]
    for report in reports[:1]:
        rows.append(("preprocessing", str(report.protocol.preprocessing)))
    rows += [
        (f"version of {k}", v) for k, v in (origins[0].versions if origins else {}).items()
    ]
    if index.command is not None:
        rows.append(("command", index.command))
    return Table("What decides the figures", ("what", "value"), tuple(rows))


def _table(table: Table) -> str:
    sides = ("--:" if n in table.numeric else "---" for n in range(len(table.columns)))
    lines = [
        f"| {' | '.join(table.columns)} |",
        f"|{'|'.join(sides)}|",
        *(f"| {' | '.join(_md(text) for text in row)} |" for row in table.rows),
    ]
    return "\n".join(lines)


def _md(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_\[\]<>#|~&])", r"\\\1", " ".join(text.split()))
