"""Readable tables of reports, sites and figures."""

import sys
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vitcompress.graph import CapturedGraph, Role, enumerate_sites, unlisted_products
from vitcompress.graph.metadata import module_path
from vitcompress.graph.patterns import attentions, blocks, norm_linear_groups
from vitcompress.measure import SiteMeasurement
from vitcompress.passes.base import quantizers_of
from vitcompress.report import CompressionReport, EvaluationEntry, ExportEntry, SiteEntry
from vitcompress.speed import BenchmarkReport

__all__ = [
    "out",
    "print_benchmark",
    "print_evaluation",
    "print_export",
    "print_graph",
    "print_report",
]

#: Columns where the output is a file or a pipe, which has no width of its own.
PLAIN_WIDTH = 120

out = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)

#: A site is flagged when one channel's peak exceeds the next channel's this many times.
LONE_CHANNEL_FACTOR = 4.0


def print_report(console: Console, report: CompressionReport) -> None:
    """Print what was done, what was left, how good and how large."""
    table = Table(title="passes", title_justify="left")
    for column in (
        "pass",
        "changed",
        "of",
        "left alone",
        "float function moved",
        "s",
        "peak MB",
    ):
        table.add_column(column, justify="left" if column == "pass" else "right")
    for entry in report.passes:
        moved = "-" if entry.function_change is None else f"{entry.function_change:.1e}"
        table.add_row(
            entry.name,
            str(entry.changed),
            str(entry.found),
            str(len(entry.skipped)),
            moved,
            f"{entry.seconds:.1f}",
            _megabytes(entry.peak_memory_bytes),
        )
    for stage in report.stages:
        table.add_row(
            f"[dim]{stage.name}[/dim]",
            *[""] * 4,
            f"{stage.seconds:.1f}",
            _megabytes(stage.peak_memory_bytes),
        )
    console.print(table)
    _print_warnings(console, report)
    _print_coverage(console, report)
    _print_worst(console, report.worst_sites())
    size = report.size
    console.print(
        f"size: {size.stored_bytes / 1e6:.2f} MB of {size.float_bytes / 1e6:.2f} MB "
        f"({100 * size.ratio:.1f} %), {size.bits_per_weight:.2f} bits per stored number, "
        f"{size.quantized_weight_bits:.2f} per quantized weight; "
        f"{size.float_weights:,} numbers stay float, most in "
        + ", ".join(
            f"{name} ({count:,} B)" for name, count in size.largest_float_tensors.items()
        )
    )
    for evaluation in report.evaluations:
        print_evaluation(console, evaluation)
    for export in report.exports:
        print_export(console, export)


def _print_warnings(console: Console, report: CompressionReport) -> None:
    for entry in report.passes:
        for warning in entry.warnings[:3]:
            console.print(f"[yellow]{entry.name}:[/yellow] {escape(warning)}")
        if len(entry.warnings) > 3:
            console.print(
                f"[yellow]{entry.name}:[/yellow] {len(entry.warnings) - 3} more of this kind, "
                "all in report.json"
            )


def _print_coverage(console: Console, report: CompressionReport) -> None:
    table = Table(title="sites", title_justify="left")
    for column in ("role", "quantized", "of", "format", "mean SQNR dB", "least"):
        table.add_column(column, justify="left" if column in ("role", "format") else "right")
    roles = dict.fromkeys(site.role for site in report.sites)
    for role in roles:
        sites = [site for site in report.sites if site.role == role]
        done = [site for site in sites if site.spec is not None]
        noise = [s.sqnr_db for s in done if s.sqnr_db is not None and s.sqnr_db < float("inf")]
        formats = Counter(site.spec for site in done if site.spec is not None)
        table.add_row(
            role,
            str(len(done)),
            str(len(sites)),
            escape(", ".join(formats)) or "[dim]float[/dim]",
            f"{sum(noise) / len(noise):.1f}" if noise else "-",
            f"{min(noise):.1f}" if noise else "-",
        )
    console.print(table)


def _print_worst(console: Console, sites: Sequence[SiteEntry]) -> None:
    if not sites:
        return
    table = Table(title="noisiest activation sites", title_justify="left")
    table.add_column("site", overflow="fold")
    for column in ("SQNR dB", "range", "peak / rms"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("ruled by")
    for site in sites:
        table.add_row(
            escape(site.site),
            f"{site.sqnr_db:.1f}",
            f"{site.low:.2f} .. {site.high:.2f}",
            f"{site.peak_ratio:.0f}",
            _ruler(site.peak_channel, site.peak_ratio, site.runner_up_ratio),
        )
    console.print(table)


def _ruler(channel: int | None, peak: float | None, runner_up: float | None) -> str:
    """Return a remark where a single channel decides the range."""
    if channel is None or peak is None or runner_up is None:
        return ""
    if peak > LONE_CHANNEL_FACTOR * runner_up:
        return f"channel {channel} alone; next channel peaks at {runner_up:.0f}"
    return ""


def print_evaluation(
    console: Console, entry: EvaluationEntry, reference: str = "float"
) -> None:
    """Print one line of accuracy and agreement, and what it was compared with."""
    parts = [f"{entry.images} images ({escape(entry.data)}), {entry.execution}:"]
    if entry.top1_percent is not None:
        parts.append(f"top-1 [bold]{entry.top1_percent:.2f} %[/bold]")
    if entry.top5_percent is not None:
        parts.append(f"top-5 {entry.top5_percent:.2f} %")
    if entry.reference_top1_percent is not None:
        parts.append(
            f"({reference} {entry.reference_top1_percent:.2f} %, "
            f"drop {entry.top1_drop_pp:+.2f} pp)"
        )
    if entry.agreement_percent is not None:
        parts.append(f"agrees with {reference} on {entry.agreement_percent:.2f} %")
    if entry.mean_kl is not None:
        parts.append(f"mean KL {entry.mean_kl:.4f}")
    if entry.logits_sqnr_db is not None:
        parts.append(f"logits SQNR {entry.logits_sqnr_db:.1f} dB")
    console.print(" ".join(parts[:1]) + " " + ", ".join(parts[1:]))
    if entry.skipped:
        shown = ", ".join(f"{name} ({why})" for name, why in list(entry.skipped.items())[:3])
        console.print(f"[yellow]{len(entry.skipped)} files skipped:[/yellow] {escape(shown)}")


def print_export(console: Console, entry: ExportEntry) -> None:
    """Print what a runtime made of an exported file."""
    ran = f"{entry.execution} in" if not entry.not_executed else "checked in"
    console.print(
        f"{entry.target}: {entry.size_bytes / 1e6:.2f} MB, opset {entry.opset}, "
        f"{'any batch' if entry.batch is None else f'batch {entry.batch}'}, "
        f"{ran} {entry.runtime}; integer linears "
        f"[bold]{entry.integer_linears} of {entry.linears}[/bold]; agrees on "
        f"{entry.top1_agreement_percent:.1f} % of {entry.images} images, "
        f"cosine {entry.cosine:.4f}"
    )
    if entry.not_executed:
        console.print(f"[yellow]not executed here:[/yellow] {escape(entry.not_executed)}")
    largest = list(entry.largest_leftovers.items())[:3]
    console.print(
        f"packed weights {entry.packed_bytes:,} B, their parameters "
        f"{entry.parameter_bytes:,} B, float leftovers {entry.leftover_bytes:,} B, most in "
        + ", ".join(f"{escape(name)} ({count:,} B)" for name, count in largest)
    )
    if entry.leftovers != "float32":
        console.print(
            f"leftover tables in {entry.leftovers}: outputs agree with float32 tables to "
            f"cosine {entry.leftover_cosine:.4f}"
        )
    for name, reason in list(entry.float_linears.items())[:10]:
        console.print(f"  [yellow]float:[/yellow] {escape(name)}: {escape(reason)}")
    if entry.fused_attention or entry.unfused_attention:
        cores = entry.fused_attention + len(entry.unfused_attention)
        console.print(f"attention: {entry.fused_attention} of {cores} cores fused")
    done = ", ".join(f"{name} {count}" for name, count in entry.rewrites.items() if count)
    if done:
        console.print(f"rewritten: {done}")
    for name, reason in list(entry.unfused_attention.items())[:10]:
        console.print(f"  not fused: {escape(name)}: {escape(reason)}")


def print_benchmark(console: Console, report: BenchmarkReport) -> None:
    """Print a table for each case, and what the figures hold for."""
    for threads, batch, entries in report.cases():
        title = f"{_counted(threads, 'thread')}, batch {batch}, {entries[0].runtime}"
        table = Table(title=title, title_justify="left")
        table.add_column("file", overflow="fold")
        for column in ("MB", "wall ms", "IQR", "CPU ms", "images/s"):
            table.add_column(column, justify="right", no_wrap=True)
        references = (
            ("float32", report.float32),
            ("bf16", report.bfloat16),
            ("dyn. INT8", report.dynamic_int8),
        )
        for kind, found in references:
            if found is not None:
                table.add_column(f"x {kind}", justify="right", no_wrap=True)
        table.add_column("integer products", justify="right")
        for entry in entries:
            ratios = (
                entry.speedup_over_float32,
                entry.speedup_over_bfloat16,
                entry.speedup_over_dynamic_int8,
            )
            table.add_row(
                escape(entry.name),
                f"{entry.size_bytes / 1e6:.2f}",
                f"{entry.median_wall_ms:.3g}",
                f"{entry.iqr_wall_ms:.2g}",
                f"{entry.median_cpu_ms:.3g}",
                f"{entry.images_per_second:.1f}",
                *(f"{ratio:.2f}" for ratio in ratios if ratio is not None),
                f"{entry.integer_products} of {entry.integer_products + entry.float_products}",
            )
        console.print(table)
    if report.float32 is None:
        console.print("[yellow]no ratios: no float32 reference was measured[/yellow]")
    if report.no_bfloat16:
        console.print(f"no bfloat16 row: {report.no_bfloat16}", soft_wrap=True)
    first = report.entries[0]
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    console.print(
        f"medians of {_counted(first.rounds, 'round')} in turns; x is how many times faster, "
        "paired by round. Ratios hold for this machine: "
        f"{escape(report.processor)}, {_counted(report.processors, 'processor')}, "
        f"{report.system}; vitcompress {report.vitcompress}, {versions}",
        soft_wrap=True,
        highlight=False,
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def print_graph(
    console: Console,
    graph: CapturedGraph,
    measurements: dict[str, SiteMeasurement] | None = None,
) -> None:
    """Print the sites of a graph, what is recognised in it, and what is not."""
    sites = enumerate_sites(graph)
    table = Table(title=f"sites of {escape(graph.provenance.model)}", title_justify="left")
    columns = ["site", "role", "operation", "shape", "quantizer"]
    if measurements:
        columns += ["range", "rms", "peak / rms", "SQNR dB", "ruled by"]
    for column in columns:
        table.add_column(column, overflow="fold")
    quantizers = quantizers_of(graph)
    for site in sites.values():
        shape = "x".join("B" if extent is None else str(extent) for extent in site.shape)
        spec = "-" if site.quantizer is None else quantizers[site.quantizer].spec.describe()
        row = [escape(site.name), str(site.role), site.operation, shape, spec]
        found = (measurements or {}).get(site.name)
        if found is not None:
            row += [
                f"{found.low:.2f} .. {found.high:.2f}",
                f"{found.rms:.3f}",
                f"{found.peak_ratio:.0f}",
                "-" if found.sqnr_db is None else f"{found.sqnr_db:.1f}",
                _ruler(found.peak_channel, found.peak_ratio, found.runner_up_ratio),
            ]
        table.add_row(*row)
    console.print(table)
    counts = Counter(site.role for site in sites.values())
    console.print(
        f"{len(sites)} sites: "
        + ", ".join(f"{count} {role}" for role, count in counts.items())
    )
    console.print(
        f"{len(list(attentions(graph)))} attention cores, {len(blocks(graph))} blocks, "
        f"{sum(t.numel() for t in graph.tensors().values()):,} stored numbers"
    )
    groups, rejected = norm_linear_groups(graph)
    console.print(f"{len(groups)} of {len(groups) + len(rejected)} norms fold into linears")
    for norm, reason in rejected:
        console.print(f"  not {escape(module_path(norm).path or norm.name)}: {escape(reason)}")
    others = [site for site in sites.values() if site.role is Role.OTHER]
    if others:
        console.print(f"[yellow]{len(others)} sites have no recognised role[/yellow]:")
        for site in others[:20]:
            origin = module_path(site.reader)
            console.print(f"  {escape(site.name)} ({site.operation}) {escape(origin.source)}")
    unlisted = unlisted_products(graph)
    for name, reason in unlisted.items():
        console.print(f"[yellow]stays float:[/yellow] {escape(name)}: {escape(reason)}")
    if not others and not unlisted:
        console.print("every site has a recognised role")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f}"
