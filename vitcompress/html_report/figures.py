"""The figures of the page: accuracy curves, noise, ranges and bits of sites."""

import math
import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, NullFormatter

from vitcompress.analyze import Analysis
from vitcompress.html_report.content import (
    CellFigures,
    float_share,
    metric_of,
    pareto_front,
    schemes_of,
    share_of,
    worst_sites,
    worst_units,
)
from vitcompress.html_report.drawing import (
    AXIS,
    BITS,
    PAPER,
    SERIES,
    TEXT,
    axes,
    drawing,
    shown_name,
    to_svg,
)
from vitcompress.report import CompressionReport, SiteEntry
from vitcompress.sweep import Sweep

__all__ = [
    "accuracy_by_scheme",
    "accuracy_by_size",
    "bit_strips",
    "harm_bars",
    "noise_bars",
    "range_plot",
]

LABELS = {"top1": "top-1 accuracy, %", "agreement": "agreement with float, %"}
MARKERS = "osD^vPX"
LONGEST_NAME = 44


def accuracy_by_scheme(cells: Sequence[CellFigures], sweep: Sweep) -> str:
    """Return accuracy against bit-width, a line for each recipe."""
    schemes, metric = schemes_of(cells), metric_of(cells)
    with drawing(230) as figure:
        plot = axes(figure)
        _float_line(plot, sweep, metric)
        for number, recipe in enumerate(_recipes(cells)):
            own = [cell for cell in cells if cell.name.recipe == recipe]
            # Lines of several recipes stand side by side, so that their bars do not overlap.
            shift = 0.06 * (number - (len(_recipes(cells)) - 1) / 2)
            places = [schemes.index(cell.name.scheme) + shift for cell in own]
            _series(plot, places, own, metric, number, recipe, line="-")
        plot.set_xticks(range(len(schemes)), schemes)
        plot.set_xlim(-0.4, len(schemes) - 0.6)
        plot.set_ylabel(LABELS[metric])
        plot.grid(axis="y")
        plot.legend(loc="best")
        return to_svg(
            figure,
            "by-scheme",
            "Accuracy against bit-width",
            "One line for each recipe, wide schemes on the left; bars reach from the least to "
            "the greatest seed. The table below has the numbers.",
        )


def accuracy_by_size(cells: Sequence[CellFigures], sweep: Sweep) -> str:
    """Return accuracy against size, with the Pareto front."""
    metric = metric_of(cells)
    with drawing(250) as figure:
        plot = axes(figure)
        _float_line(plot, sweep, metric)
        for number, recipe in enumerate(_recipes(cells)):
            own = [cell for cell in cells if cell.name.recipe == recipe]
            sizes = [cell.size_bytes / 1e6 for cell in own]
            _series(plot, sizes, own, metric, number, recipe, line="none")
        front = pareto_front(cells, metric)
        plot.plot(
            [cell.size_bytes / 1e6 for cell in front],
            [share_of(cell, metric).mean for cell in front],
            color=TEXT,
            linestyle="--",
            linewidth=1.0,
            drawstyle="steps-post",
            label="Pareto front",
            zorder=1,
        )
        for cell in front:
            plot.annotate(
                cell.name.scheme,
                (cell.size_bytes / 1e6, share_of(cell, metric).mean),
                textcoords="offset points",
                xytext=(4, -11),
                fontsize=9,
            )
        _size_axis(plot, [cell.size_bytes / 1e6 for cell in cells])
        plot.set_ylabel(LABELS[metric])
        plot.grid(axis="y")
        plot.legend(loc="best")
        return to_svg(
            figure,
            "by-size",
            "Accuracy against size",
            "One mark for each recipe and scheme; the dashed line joins those that none beats "
            "in both. The table below has the numbers.",
        )


def _recipes(cells: Sequence[CellFigures]) -> list[str]:
    return list(dict.fromkeys(cell.name.recipe for cell in cells))


def _series(
    plot: Axes,
    places: Sequence[float],
    cells: Sequence[CellFigures],
    metric: str,
    number: int,
    recipe: str,
    *,
    line: str,
) -> None:
    shares = [share_of(cell, metric) for cell in cells]
    means = [share.mean for share in shares]
    plot.errorbar(
        places,
        means,
        yerr=[
            [share.mean - min(share.seeds) for share in shares],
            [max(share.seeds) - share.mean for share in shares],
        ],
        color=SERIES[number % len(SERIES)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        linestyle=line,
        linewidth=1.6,
        elinewidth=1.2,
        capsize=2.5,
        label=_short(recipe),
    )


def _float_line(plot: Axes, sweep: Sweep, metric: str) -> None:
    value = float_share(sweep) if metric == "top1" else None
    if value is not None:
        plot.axhline(value, color=TEXT, linewidth=0.8, linestyle=":", label="float")


def _size_axis(plot: Axes, sizes: Sequence[float]) -> None:
    least, greatest = min(sizes), max(sizes)
    plot.set_xscale("log")
    plot.set_xlim(least / 1.15, greatest * 1.25)
    steps = [m * 10.0**e for e in range(-4, 6) for m in (1, 1.5, 2, 3, 4, 5, 6, 8)]
    ticks = [step for step in steps if least / 1.15 <= step <= greatest * 1.25]
    plot.xaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 7)]))
    plot.xaxis.set_minor_locator(FixedLocator([]))
    plot.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    plot.xaxis.set_minor_formatter(NullFormatter())
    plot.set_xlabel("size, MB")


# Sites


def noise_bars(report: CompressionReport, slug: str) -> str:
    """Return the signal-to-noise ratio of every quantized site in the network's order."""
    sites = report.sites
    with drawing(210) as figure:
        plot = axes(figure)
        for number, (label, stored) in enumerate((("weights", True), ("activations", False))):
            chosen = [
                (place, site.sqnr_db)
                for place, site in enumerate(sites)
                if site.sqnr_db is not None
                and math.isfinite(site.sqnr_db)
                and (site.role == "weight") is stored
            ]
            plot.bar(
                [place for place, _ in chosen],
                [noise for _, noise in chosen],
                width=0.9,
                color=SERIES[number],
                label=label,
            )
        _site_axis(plot, sites)
        plot.set_ylabel("SQNR, dB")
        plot.grid(axis="y")
        plot.legend(loc="upper right", ncols=2, bbox_to_anchor=(1.0, 1.14))
        return to_svg(
            figure,
            slug,
            "Signal to quantization noise of every site",
            "One bar for each quantized weight and activation in the order of the network; "
            "low bars are noisy. The table below has the numbers.",
        )


def bit_strips(cells: Sequence[CellFigures]) -> str:
    """Return the bits of every site, two strips for each cell: weights and activations."""
    with drawing(38 * len(cells) + 44) as figure:
        plot = axes(figure)
        for number, cell in enumerate(cells):
            sites = cell.report.sites
            _strip(plot, [s for s in sites if s.role == "weight"], -number - 0.24)
            _strip(plot, [s for s in sites if s.role != "weight"], -number - 0.46)
            plot.text(0, -number, _short(cell.label), fontsize=9, va="bottom")
        plot.set_xlim(0, 1)
        plot.set_ylim(-len(cells) + 0.5, 0.5)
        plot.set_axis_off()
        used = {site.bits for cell in cells for site in cell.report.sites}
        known = sorted(bits for bits in used if bits is not None)
        patches = [Patch(facecolor=BITS[b], label=f"{b} bits") for b in known]
        if None in used:
            patches.append(Patch(facecolor=BITS[None], label="float"))
        figure.legend(handles=patches, loc="outside lower center", ncols=4)
        return to_svg(
            figure,
            "bits",
            "Bits of every site",
            "Two strips for each recipe and scheme, weights and activations, from the input "
            "of the network on the left to its head. The table below counts them.",
        )


def _strip(plot: Axes, sites: Sequence[SiteEntry], bottom: float) -> None:
    width = 1.0 / max(len(sites), 1)
    for place, site in enumerate(sites):
        colour = BITS[site.bits]
        plot.add_patch(
            Rectangle((place * width, bottom), width, 0.2, facecolor=colour, linewidth=0)
        )


def range_plot(report: CompressionReport, slug: str) -> str:
    """Return the ranges of the noisiest activations in multiples of their root mean square."""
    sites = worst_sites(report)
    with drawing(31 * len(sites) + 44) as figure:
        plot = axes(figure)
        for number, site in enumerate(sites):
            assert site.low is not None
            assert site.high is not None
            assert site.rms
            low, high = site.low / site.rms, site.high / site.rms
            plot.barh(-number, high - low, left=low, height=0.3, color=SERIES[0])
            name = f"{_short(site.site)}, {site.sqnr_db:.1f} dB"
            plot.text(
                0.0,
                -number + 0.24,
                name,
                fontsize=9,
                transform=plot.get_yaxis_transform(),
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
            )
        plot.set_xscale("symlog", linthresh=2.0, linscale=1.0)
        plot.set_ylim(-len(sites) + 0.6, 0.7)
        plot.set_yticks([])
        plot.spines["left"].set_visible(False)
        plot.axvline(0.0, color=AXIS, linewidth=0.8)
        for end in (-1.0, 1.0):
            plot.axvline(end, color=TEXT, linewidth=0.8, linestyle=":")
        plot.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        plot.set_xlabel("multiples of the root mean square")
        return to_svg(
            figure,
            slug,
            "Ranges of the noisiest activations",
            "A bar from the least to the greatest value of each, in multiples of its root "
            "mean square; dotted lines stand at one to each side. Long bars are ruled by "
            "outliers. The table below has the numbers.",
        )


def harm_bars(analysis: Analysis, slug: str) -> str:
    """Return the KL divergence that the most harmful units cause, or leave when spared."""
    entries = worst_units(analysis)
    with drawing(26 * len(entries) + 44) as figure:
        plot = axes(figure)
        for number, entry in enumerate(entries):
            plot.barh(-number, entry.distance.mean_kl, height=0.34, color=SERIES[0])
            plot.text(
                0.0,
                -number + 0.25,
                _short(entry.unit),
                fontsize=9,
                transform=plot.get_yaxis_transform(),
            )
        plot.set_ylim(-len(entries) + 0.6, 0.9)
        plot.set_yticks([])
        plot.spines["left"].set_visible(False)
        plot.set_xlabel("mean KL divergence from the float model, nats")
        return to_svg(
            figure,
            slug,
            "Harm of the most harmful units",
            "One bar for each unit, most harmful first. The table below has all of them.",
        )


def _site_axis(plot: Axes, sites: Sequence[SiteEntry]) -> None:
    """Mark where blocks begin."""
    starts: dict[str, int] = {}
    for place, site in enumerate(sites):
        numbers = [part for part in re.split(r"[.:]", site.site) if part.isdigit()]
        if numbers:
            starts.setdefault(".".join(numbers[:2]), place)
    step = math.ceil(len(starts) / 12) if starts else 1
    chosen = list(starts.items())[::step]
    plot.set_xticks([place for _, place in chosen], [name for name, _ in chosen])
    plot.set_xlim(-1, len(sites))
    plot.set_xlabel("block" if starts else "sites in order")


def _short(name: str) -> str:
    name = shown_name(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."
