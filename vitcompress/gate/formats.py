"""A gate's answer for machines that read it: JUnit XML, and Markdown as GitHub shows it."""

import re
import xml.etree.ElementTree as ET

from vitcompress.gate.judging import CellVerdict, GateReport, MetricVerdict
from vitcompress.results import UNITS

__all__ = [
    "difference_text",
    "interval_text",
    "sentence",
    "to_junit",
    "to_markdown",
    "value_text",
]

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SIGNS = {"regressed": "❌", "improved": "⬆️", "within noise": "〰️", "within tolerance": "✅"}


def to_junit(report: GateReport) -> str:
    """Return JUnit XML: a case for each metric of a cell, and one for each unmatched cell."""
    suite = ET.Element("testsuite", name="vitcompress gate")
    for cell in report.cells:
        for metric in cell.metrics:
            case = ET.SubElement(
                suite, "testcase", classname=_xml(str(cell.name)), name=metric.metric, time="0"
            )
            text = _xml(sentence(metric))
            if metric.failed:
                ET.SubElement(case, "failure", message=text, type=metric.verdict)
            else:
                ET.SubElement(case, "system-out").text = text
    for name, reason in report.unmatched.items():
        case = ET.SubElement(suite, "testcase", classname=_xml(name), name="cell", time="0")
        ET.SubElement(case, "failure", message=_xml(f"{name} {reason}"), type="unmatched")
    failures = len(suite.findall("testcase/failure"))
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(failures))
    suite.set("errors", "0")
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def to_markdown(report: GateReport) -> str:
    """Return a summary with one table in GitHub's flavour."""
    failed = sum(metric.failed for cell in report.cells for metric in cell.metrics)
    failed += len(report.unmatched)
    verdict = "passed" if report.passed else f"failed: {failed} to look at"
    lines = [
        f"### {'✅' if report.passed else '❌'} vitcompress gate {verdict}",
        "",
        "| cell | metric | baseline | now | difference | 95 % interval | p | verdict |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    lines += [_row(cell, metric) for cell in report.cells for metric in cell.metrics]
    if report.unmatched:
        lines += ["", *(f"- ❌ {_md(f'{n} {why}')}" for n, why in report.unmatched.items())]
    lines += [
        "",
        "Paired over the same images; p is exact (McNemar; with several seeds, flipped signs "
        "of each image's gain). Size and latency are judged by tolerance alone.",
    ]
    return "\n".join(lines) + "\n"


def _row(cell: CellVerdict, metric: MetricVerdict) -> str:
    p = "-" if metric.p_value is None else f"{metric.p_value:.2g}"
    verdict = f"**{metric.verdict}**" if metric.failed else metric.verdict
    parts = [
        _md(str(cell.name)),
        metric.metric,
        value_text(metric.metric, metric.baseline),
        value_text(metric.metric, metric.value),
        difference_text(metric.metric, metric.difference),
        interval_text(metric) or "-",
        p,
        f"{_SIGNS[metric.verdict]} {verdict}",
    ]
    return f"| {' | '.join(parts)} |"


# Words


def sentence(metric: MetricVerdict) -> str:
    """Return a verdict as one sentence."""
    name = metric.metric
    text = (
        f"{metric.verdict}: {value_text(name, metric.baseline)} -> "
        f"{value_text(name, metric.value)} ({difference_text(name, metric.difference)}, "
        f"tolerance {_plain(name, metric.tolerance)} {UNITS[name][1]}"
    )
    if metric.p_value is not None:
        text += (
            f"; 95 % interval {interval_text(metric)}, p {metric.p_value:.2g}, images won "
            f"{metric.gained}, lost {metric.lost}"
        )
    return f"{text})"


def value_text(metric: str, value: float) -> str:
    """Return a figure with its unit."""
    return f"{_plain(metric, value)} {UNITS[metric][0]}"


def difference_text(metric: str, value: float) -> str:
    """Return a signed difference with its unit."""
    sign = "+" if value > 0 else "-" if value < 0 else "±"
    return f"{sign}{_plain(metric, abs(value))} {UNITS[metric][1]}"


def interval_text(metric: MetricVerdict) -> str:
    """Return an interval of the difference; empty where there is none."""
    if metric.low is None or metric.high is None:
        return ""
    return f"[{metric.low:+.2f}, {metric.high:+.2f}]"


def _plain(metric: str, value: float) -> str:
    return f"{value:,.0f}" if metric == "size" else f"{value:.2f}"


def _md(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_\[\]<>#|~&])", r"\\\1", " ".join(text.split()))


def _xml(text: str) -> str:
    """Return text without characters that XML cannot hold."""
    return _NO_XML.sub("\ufffd", text)
