"""A sweep as one page that needs nothing else, and as Markdown and CSV."""

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from vitcompress.analyze import Analysis
from vitcompress.artifact import write_file
from vitcompress.errors import ConfigError, InputError
from vitcompress.html_report.plain import to_csv, to_markdown
from vitcompress.sweep import Sweep

__all__ = ["to_csv", "to_html", "to_markdown", "write_report"]

_LIBRARIES = ("matplotlib", "jinja2")


def write_report(
    sweep: Sweep,
    output: Path,
    *,
    markdown: Path | None = None,
    csv: Path | None = None,
    analyses: Sequence[Analysis] = (),
) -> None:
    """Write the report of a sweep; each file whole or not at all.

    Args:
        sweep: As it stands; cells that are missing are named.
        output: HTML page.
        markdown: The same tables as Markdown, if wanted.
        csv: The figures of every cell and seed, if wanted.
        analyses: Of the same model, to be shown on the page.

    Raises:
        ConfigError: The libraries that draw are not installed, or a file cannot be written.
        InputError: There is no result, or results and analyses do not belong together.
    """
    text = to_html(sweep, analyses)
    texts = {output: text}
    if markdown is not None:
        texts[markdown] = to_markdown(sweep)
    if csv is not None:
        texts[csv] = to_csv(sweep)
    for path, content in texts.items():
        write_file(path, partial(_write, content))


def to_html(sweep: Sweep, analyses: Sequence[Analysis] = ()) -> str:
    """Return the page.

    Raises:
        ConfigError: The libraries that draw are not installed.
        InputError: There is no result, or results and analyses do not belong together.
    """
    absent = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"report: {' and '.join(absent)} not installed; pip install 'vitcompress[report]'"
        )
    if not sweep.results:
        raise InputError(f"{sweep.folder}: has no results yet; sweep at least one cell")
    for analysis in analyses:
        if analysis.model_digest != sweep.index.model_digest:
            raise InputError(
                f"the analysis of {analysis.model}, {analysis.recipe} is about another model "
                f"(digest {analysis.model_digest[:12]}, expected "
                f"{sweep.index.model_digest[:12]}); analyze the model of the sweep"
            )
    from vitcompress.html_report.page import render

    return render(sweep, analyses)


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
