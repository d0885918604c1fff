"""Drawings as SVG for a page: text and colours follow the page, identifiers stay apart.

Colours are written by number and replaced by the page's own variables, so that one drawing
serves light and dark; text stays text.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "AXIS",
    "BITS",
    "GRID",
    "PAPER",
    "SERIES",
    "TEXT",
    "axes",
    "drawing",
    "shown_name",
    "to_svg",
]

#: Placeholders: colours that nothing else uses, and what the page puts in their place.
TEXT, GRID, AXIS, PAPER = "#010203", "#010204", "#010205", "#010206"
SERIES = tuple(f"#0102{number:02x}" for number in range(0x10, 0x16))
BITS: dict[int | None, str] = {
    bits: f"#0102{0x20 + (bits or 0):02x}" for bits in (None, 2, 3, 4, 5, 6, 7, 8)
}
_VARIABLES = {
    TEXT: "currentColor",
    GRID: "var(--grid)",
    AXIS: "var(--axis)",
    PAPER: "var(--paper)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)},
    **{colour: f"var(--bits-{bits or 'float'})" for bits, colour in BITS.items()},
}

#: Points; on a phone a drawing is about as wide as this.
WIDTH = 330
_SETTINGS: dict[Any, Any] = {
    "axes.edgecolor": AXIS,
    "axes.labelcolor": TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "vitcompress",
    "text.color": TEXT,
    "text.parse_math": False,
    "xtick.color": GRID,
    "xtick.labelcolor": TEXT,
    "ytick.color": GRID,
    "ytick.labelcolor": TEXT,
}
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@contextmanager
def drawing(height: float) -> Iterator[Figure]:
    """Give a figure of the usual width to draw on.

    Args:
        height: Points.
    """
    # Names may hold characters that no font here has; browsers have more.
    with warnings.catch_warnings(), mpl.rc_context(_SETTINGS):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


def axes(figure: Figure, **settings: Any) -> Axes:
    """Return axes with a quiet grid behind the data."""
    made: Axes = figure.add_subplot(**settings)
    made.set_axisbelow(True)
    made.tick_params(length=0)
    return made


def shown_name(name: str) -> str:
    """Return a name without characters that XML and terminals cannot hold."""
    return _UNPRINTABLE.sub("\ufffd", name)


def to_svg(figure: Figure, slug: str, title: str, description: str) -> str:
    """Return a drawing as an ``svg`` element.

    Args:
        figure: Drawn within :func:`drawing`.
        slug: Put in front of every identifier, since a page has several drawings.
        title: Short name, for screen readers.
        description: What it shows, for screen readers.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for unwanted in (r"<metadata>.*?</metadata>", r"<style[^>]*>.*?</style>", r"<!--.*?-->"):
        text = re.sub(unwanted, "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{slug}-', text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{slug}-", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    opening = (
        f'<svg role="img" viewBox="{box[1]}" aria-labelledby="{slug}-title {slug}-about">'
        f'<title id="{slug}-title">{_escaped(title)}</title>'
        f'<desc id="{slug}-about">{_escaped(description)}</desc>'
    )
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)
    # A page's own SVG needs no namespaces: `href` alone means the same.
    return text.replace("xlink:href", "href").strip()


def _escaped(text: str) -> str:
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(character, entity)
    return text
