"""Render the recorded rows of the backbone matrix as one page of tables.

python benchmarks/draw_backbones.py docs/backbones.md
"""

import argparse
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from backbone_rows import (
    JUDGED,
    LEAST_SQNR_DB,
    MOST_CAPTURE_ERROR,
    MOST_CAPTURE_SECONDS,
    Row,
    read_rows,
)
from backbones import BACKBONES
from harness import RESULTS

#: Characters of one problem in the table.
LONGEST_VERDICT = 54
TIERS = {
    1: "Tier 1: must pass every column",
    2: "Tier 2: the rest of the families",
    0: "Tier 0: tiny test models",
}
COLUMNS = {
    "model": "as its library registers it; Hugging Face models have their default "
    "configuration with 1,000 classes (`vit`, `deit` and `dinov2` 4 layers of 12)",
    "size": "parameters and edge of the image",
    "linears": "linear layers of which input and weight are quantized, of all (`deploy`)",
    "convs": "the same for convolutions",
    "products": "operands of products of activations that are quantized, of all (`repq_vit`); "
    "`+ n` are products that are no sites and stay float",
    "norms": "batch norms folded at capture of those in the model (BN), and LayerNorms that "
    "took up the quantizer of their readers of those found (LN)",
    "capture error": "largest difference from eager relative to the largest logit, the worse "
    f"of batch 1 and batch 3; at most {MOST_CAPTURE_ERROR:.0e}",
    "W8A8 dB": "signal to noise of the logits, `deploy`, on the calibration images; at least "
    f"{LEAST_SQNR_DB:.0f}. In brackets the same for what varies between images alone: "
    "a random model answers all images much alike",
    "W4A8 dB": "the same at W4A8",
    "repq_vit dB": "the same for `repq_vit` at W8A8, products of attention quantized too; "
    "simulated",
    "same bits": "whether the artefact, loaded again, gives equal outputs (W8A8, W4A8)",
    "ONNX integer": "linears that run on integers in onnxruntime, of those quantized, and the "
    "same for convolutions (W8A8, and W4A8 where it differs)",
    "agree %": "images of 16 to which torch and onnxruntime give the same class (W8A8, W4A8)",
    "capture s": f"seconds of capture; at most {MOST_CAPTURE_SECONDS:.0f}",
    "quantize s": "seconds of `deploy` at W8A8, calibration and measurements included",
    "export s": "seconds of the W8A8 export, verification included",
    "peak MB": "largest resident memory of the process in any stage",
    "result": "`passes`, or what does not; the full reasons are below",
}
WEIGHTS = """\
Weights are random. A fresh network would hide errors: heads, LayerScales and gammas of 0 or
1e-6 let nothing through, and where weights are small the biases drown the image. So every
parameter is given a spread, by structure: gammas of norms U(0.5, 1.5), betas N(0, 0.3);
running means N(0, 0.3), running variances U(0.5, 2); weights of a small gain (root mean square
times the root of the inputs) are scaled to gain 1, and those of zeros drawn so; biases moved
by N(0, 0.1); constant vectors such as LayerScales, temperatures and gates U(0.3, 1), or within
20 % of their value above 1; tables of zeros, which hold positions and attention biases,
N(0, 0.3); tokens of zeros N(0, 0.1). Some deep networks of gain 1 multiply every disturbance;
for them the gain is lowered (0.7, 0.5, ... 0) until a disturbance of every weight by a
hundredth leaves the float logits at 26 dB. Seeds are fixed. What random weights cannot tell is
accuracy."""


def cells(row: Row) -> list[str]:
    """Return the cells of a row, in the order of ``COLUMNS``; empty where it has no figure."""
    schemes = row["schemes"]
    judged, narrow, products = (schemes.get(n, {}) for n in (JUDGED, "W4A8", "repq_vit"))
    seconds, peaks = row["seconds"], row["peak_bytes"].values()
    errors = row.get("capture_error", {}).values()
    failed = {failure["stage"] for failure in row["failures"]}
    times = [
        "" if stage in failed or stage not in seconds else f"{seconds[stage]:.1f}"
        for stage in ("capture", f"quantize {JUDGED}", f"export {JUDGED}")
    ]
    return [
        row["model"],
        f"{row['parameters'] / 1e6:.1f} M, {row['size']}" if "size" in row else "",
        share(judged.get("linears")),
        share(judged.get("convs")),
        _with_unlisted(share(products.get("product_operands")), row),
        _norms(row),
        f"{max(errors):.0e}" if errors else "",
        *(_noise(scheme) for scheme in (judged, narrow, products)),
        _both(_answer(scheme.get("same_bits")) for scheme in (judged, narrow)),
        _both(_integer(scheme) for scheme in (judged, narrow)),
        _both(_agreement(scheme.get("onnx")) for scheme in (judged, narrow)),
        *times,
        f"{max(peaks) / 1e6:.0f}" if peaks else "",
        result(row),
    ]


def share(entry: Mapping[str, Any] | None) -> str:
    """Return ``quantized/found``."""
    return "" if entry is None else f"{entry['quantized']}/{entry['found']}"


def result(row: Row) -> str:
    """Return the verdict in a few words; the reasons have a section of their own."""
    if row["passes"]:
        words = "refused, as expected" if row["refused"] else "passes"
        return f"{words}; see notes" if row["notes"] else words
    return "; ".join(dict.fromkeys(_short(problem) for problem in row["problems"]))


def _short(problem: str) -> str:
    """Return a problem without its message: ``stage: type``, or its first words."""
    words = " ".join(problem.split()).partition(", expected")[0]
    if len(words) <= LONGEST_VERDICT:
        return words
    parts = words.split(": ")
    stage_and_type = ": ".join(parts[:2])
    short = stage_and_type if len(stage_and_type) <= LONGEST_VERDICT else parts[0]
    return textwrap.shorten(short, LONGEST_VERDICT, placeholder=" ...")


def _with_unlisted(text: str, row: Row) -> str:
    count = len(row.get("unlisted_products", ()))
    return f"{text} + {count}" if text and count else text


def _norms(row: Row) -> str:
    norms, scheme = row.get("norms", {}), row["schemes"].get(JUDGED, {})
    parts = []
    if norms.get("batch_norms") and "batch_norms_left" in norms:
        found = norms["batch_norms"]
        parts.append(f"BN {found - norms['batch_norms_left']}/{found}")
    if scheme.get("norms_found"):
        parts.append(f"LN {scheme['norms_folded']}/{scheme['norms_found']}")
    return ", ".join(parts)


def _noise(scheme: Mapping[str, Any]) -> str:
    if "sqnr_db" not in scheme:
        return ""
    return f"{scheme['sqnr_db']:.1f} ({scheme['varying_sqnr_db']:.1f})"


def _answer(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _integer(scheme: Mapping[str, Any]) -> str:
    onnx = scheme.get("onnx")
    if onnx is None:
        return ""
    integer = sum(count for op, count in onnx["integer_ops"].items() if "Conv" in op)
    linears = f"{onnx['integer_linears']}/{onnx['linears']}"
    return f"{linears}, convs {integer}/{scheme['convs']['quantized']}"


def _agreement(onnx: Mapping[str, Any] | None) -> str:
    return "" if onnx is None else f"{onnx['top1_agreement_percent']:.0f}"


def _both(values: Iterable[str]) -> str:
    """Return the values of both schemes, once where they are equal."""
    first, second = values
    return first if first == second else f"{first or 'none'}; {second or 'none'}"


# The page


def render(rows: Sequence[Row], source: str, missing: Sequence[str] = ()) -> str:
    """Return the page for these rows.

    Args:
        rows: One for each model, in order.
        source: Name of the file they come from.
        missing: Models of the matrix that have no row.
    """
    lines = ["# Backbones", "", *_opening(rows, source), ""]
    for tier, title in TIERS.items():
        chosen = [row for row in rows if row["tier"] == tier]
        if chosen:
            passing = sum(row["passes"] for row in chosen)
            lines += [f"## {title}", "", f"{passing} of {len(chosen)} pass.", ""]
            lines += [*_table(chosen), ""]
    if missing:
        lines += [
            "## Without a row",
            "",
            *(f"- {model}: not measured" for model in missing),
            "",
        ]
    lines += _section("What does not pass", rows, lambda row: row["problems"])
    lines += _section("Linears and convolutions that stay float", rows, _reasons)
    lines += _section("Notes", rows, lambda row: row["notes"])
    return "\n".join(lines).rstrip() + "\n"


def _opening(rows: Sequence[Row], source: str) -> list[str]:
    versions = {name: v for row in rows for name, v in row["versions"].items()}
    stamps = [sorted({str(row[name]) for row in rows}) for name in ("date", "processor")]
    threads = sorted({row["threads"] for row in rows})
    samples = sorted({row["samples"] for row in rows})
    return [
        "Does every backbone go through every stage: capture, quantization, artefact, export?",
        "This page is generated. It comes from",
        "",
        "```",
        "python benchmarks/bench_backbones.py",
        "python benchmarks/draw_backbones.py docs/backbones.md",
        "```",
        "",
        f"with the lines in `benchmarks/results/{source}` ({', '.join(stamps[0])}; "
        f"{', '.join(stamps[1])}; threads: {_listed(threads)}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}). "
        f"Each model ran in a process of its own, on {_listed(samples)} rendered images.",
        "",
        WEIGHTS,
        "",
        "| column | meaning |",
        "|---|---|",
        *(f"| {name} | {meaning} |" for name, meaning in COLUMNS.items()),
    ]


def _listed(values: Sequence[Any]) -> str:
    return " or ".join(map(str, values))


def _table(rows: Sequence[Row]) -> list[str]:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(_escaped(cell) or " " for cell in cells(row)) + " |")
    return lines


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _reasons(row: Row) -> list[str]:
    scheme = row["schemes"].get(JUDGED, {})
    found = []
    for kind in ("linears", "convs"):
        reasons = Counter(scheme.get(kind, {}).get("reasons", {}).values())
        found += [f"{count} edges of {kind}: {reason}" for reason, count in reasons.items()]
    return found


def _section(
    title: str, rows: Sequence[Row], texts: Callable[[Row], Sequence[str]]
) -> list[str]:
    found = [(row["model"], text) for row in rows for text in texts(row)]
    if not found:
        return []
    return [
        f"## {title}",
        "",
        *(f"- {model}: {' '.join(text.split())}" for model, text in found),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--results", type=Path, help="rows; default: the newest results")
    arguments = parser.parse_args()
    path = arguments.results or max(RESULTS.glob("backbones-*.jsonl"), default=None)
    if path is None:
        parser.error(f"{RESULTS} holds no rows; run bench_backbones.py first")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    # By model, so that two runs in which models end in another order give the same page.
    rows = sorted(read_rows(path).values(), key=lambda row: row["model"])
    measured = {row["model"] for row in rows}
    missing = [model for model in BACKBONES if model not in measured]
    arguments.out.write_text(render(rows, path.name, missing), encoding="utf-8")


if __name__ == "__main__":
    main()
