"""What other programs read of a verdict."""

import json
import xml.etree.ElementTree as ET

import pytest
from results import make_result

from vitcompress.gate import judge, read_baseline, to_junit, to_markdown, update_baseline

NASTY = "a|b<script>`x`*_&\x00\x1b[31m"


@pytest.fixture
def report_of(tmp_path):
    def report_of(before, after):
        path = tmp_path / "baseline.yaml"
        update_baseline(path, before)
        return judge(after, read_baseline(path))

    return report_of


@pytest.fixture
def mixed(report_of):
    """One cell that lost, one that did not move, and one without a result."""
    schemes = ("W8A8", "W4A4", "W3A3")
    return report_of(
        [make_result(scheme=scheme, wrong=range(4)) for scheme in schemes],
        [make_result(scheme="W8A8", wrong=range(4)), make_result(wrong=range(40))],
    )


def test_json_has_every_figure(mixed):
    content = json.loads(mixed.model_dump_json())

    assert (content["passed"], content["schema_version"]) == (False, 1)
    lost = content["cells"][1]["metrics"][0]
    assert (lost["metric"], lost["verdict"], lost["lost"]) == ("top1", "regressed", 36)
    assert (lost["baseline"], lost["value"]) == (pytest.approx(98.0), 80.0)


def test_junit_counts_and_names_what_failed(mixed):
    root = ET.fromstring(to_junit(mixed))
    (suite,) = root

    assert suite.attrib == {
        "name": "vitcompress gate",
        "tests": "7",
        "failures": "3",
        "errors": "0",
    }
    failed = {
        (case.get("classname"), case.get("name")): case.find("failure")
        for case in suite
        if case.find("failure") is not None
    }
    assert list(failed) == [
        ("toy / W4A4 / repq_vit", "top1"),
        ("toy / W4A4 / repq_vit", "agreement"),
        ("toy / W3A3 / repq_vit", "cell"),
    ]
    message = failed["toy / W4A4 / repq_vit", "top1"].get("message")
    assert message.startswith(
        "regressed: 98.00 % -> 80.00 % (-18.00 pp, tolerance 1.00 pp; 95 %"
    )
    assert message.endswith("images won 0, lost 36)")


def test_markdown_has_a_row_for_each_figure(mixed):
    text = to_markdown(mixed)
    rows = [line for line in text.splitlines() if line.startswith("| toy")]

    assert text.startswith("### ❌ vitcompress gate failed: 3 to look at\n")
    assert len(rows) == 6
    assert rows[3].startswith(
        r"| toy / W4A4 / repq\_vit | top1 | 98.00 % | 80.00 % | -18.00 pp |"
    )
    assert rows[3].endswith("| ❌ **regressed** |")
    assert rows[2].endswith(
        "| size | 4,000 B | 4,000 B | ±0 B | - | - | ✅ within tolerance |"
    )
    assert r"- ❌ toy / W3A3 / repq\_vit has no result" in text


def test_passed_gate_says_so(report_of):
    report = report_of([make_result()], [make_result()])

    assert to_markdown(report).startswith("### ✅ vitcompress gate passed\n")
    assert 'failures="0"' in to_junit(report)


def test_names_are_escaped(report_of):
    report = report_of(
        [make_result(recipe=NASTY), make_result(recipe=f"{NASTY}2")],
        [make_result(recipe=NASTY)],
    )

    text, root = to_markdown(report), ET.fromstring(to_junit(report))

    rows = [line for line in text.splitlines() if line.startswith("| toy")]
    assert [row.replace(r"\|", "").count("|") for row in rows] == [9, 9, 9]
    assert "<script>" not in text.replace(r"\<script\>", "")
    assert "a|b<script>" in root[0][0].get("classname")
