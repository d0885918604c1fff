"""Gate, compare and report as commands."""

import json
import xml.etree.ElementTree as ET

import pytest
from results import make_result, make_sites, write_sweep

from vitcompress.gate import update_baseline


@pytest.fixture
def sweep(tmp_path):
    """A sweep of two cells, and the baseline that it makes."""
    results = [make_result(scheme=scheme, wrong=range(9)) for scheme in ("W8A8", "W4A4")]
    update_baseline(tmp_path / "baseline.yaml", results)
    return write_sweep(tmp_path / "sweep", results)


@pytest.fixture
def lost(tmp_path, sweep):
    """The same sweep after a change that cost accuracy at W4A4."""
    results = [make_result(scheme="W8A8", wrong=range(9)), make_result(wrong=range(40))]
    return write_sweep(tmp_path / "lost", results)


def test_gate_passes_what_did_not_move(vitcompress, sweep):
    found = vitcompress("gate", "sweep", "--baseline", "baseline.yaml")

    assert found.code == 0
    assert "toy, 200 images" in found.out
    assert "gate passed: 6 figures" in found.out


def test_gate_fails_with_code_3_and_tells_everyone(vitcompress, lost, tmp_path):
    found = vitcompress(
        *("gate", "lost", "--baseline", "baseline.yaml", "--json", "out/gate.json"),
        *("--junit", "out/gate.xml", "--markdown", "out/gate.md"),
    )

    assert found.code == 3
    assert "gate failed: 2 of 6 figures" in found.out
    assert "regressed" in found.out
    assert json.loads((tmp_path / "out/gate.json").read_text())["passed"] is False
    assert ET.parse(tmp_path / "out/gate.xml").getroot()[0].get("failures") == "2"
    assert "❌ vitcompress gate failed" in (tmp_path / "out/gate.md").read_text()


def test_noise_beyond_the_tolerance_is_said(vitcompress, sweep, tmp_path):
    write_sweep(tmp_path / "noisy", [make_result(scheme="W8A8", wrong=range(12))])

    found = vitcompress(
        "gate", next((tmp_path / "noisy/cells").iterdir()), "--baseline", "baseline.yaml"
    )

    assert found.code == 0
    assert "within noise" in found.out
    assert (
        "moved farther than the tolerance of 1 pp, but 200 images cannot tell it from chance; "
        "the interval is [-3.65, +0.67] pp" in found.out
    )


def test_improvement_fails_until_it_is_accepted_or_recorded(vitcompress, sweep, tmp_path):
    results = [make_result(scheme=scheme, size_bytes=3999) for scheme in ("W8A8", "W4A4")]
    write_sweep(tmp_path / "better", results)
    arguments = ("gate", "better", "--baseline", "baseline.yaml")

    first = vitcompress(*arguments)
    accepted = vitcompress(*arguments, "--accept-improvement")
    recorded = vitcompress(*arguments, "--update-baseline")
    last = vitcompress(*arguments)

    assert (first.code, accepted.code, recorded.code, last.code) == (3, 0, 0, 0)
    assert "record it with --update-baseline, or let it pass" in first.out
    assert "toy / W8A8 / repq_vit: changed" in recorded.out
    assert "wrote baseline.yaml" in recorded.out


def test_missing_cells_fail_by_name(vitcompress, sweep):
    key = make_result(wrong=range(9)).origin.key()
    (sweep / "cells" / f"{key}.json").unlink()

    found = vitcompress("gate", "sweep", "--baseline", "baseline.yaml")

    assert found.code == 3
    assert "W4A4 / repq_vit, seed 0 was not computed; sweep again" in found.out
    assert "toy / W4A4 / repq_vit has no result" in found.out


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (2, ("sweep",), "Missing option '--baseline'"),
        (2, ("sweep", "--baseline", "none.yaml"), "file is missing; --update-baseline"),
        (5, ("nowhere", "--baseline", "baseline.yaml"), "nowhere: file is missing"),
        (5, ("baseline.yaml", "--baseline", "baseline.yaml"), "is it a result of a sweep?"),
        (2, ("sweep", "--baseline", "baseline.yaml", "--json", "."), "is a directory"),
        (2, ("sweep", "--baseline", "sweep", "--update-baseline"), "sweep: cannot be read"),
        (
            2,
            ("sweep", "--baseline", "baseline.yaml", "--update-baseline", "--json", "x"),
            "--update-baseline judges nothing; leave out",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(vitcompress, sweep, code, arguments, words):
    found = vitcompress("gate", *arguments)

    assert found.code == code
    assert words in found.err
    assert "Traceback" not in found.err


def test_compare_explains_and_writes_json(vitcompress, tmp_path):
    sites = make_sites(blocks_1_fc2_input=-9.0)
    (tmp_path / "a.json").write_text(make_result(wrong=range(9)).to_json())
    (tmp_path / "b.json").write_text(
        make_result(wrong=range(30), seed=1, sites=sites).to_json()
    )

    found = vitcompress("compare", "a.json", "b.json", "--json", "out.json")

    assert found.code == 0
    for words in (
        "A: a.json\nB: b.json",
        "size: the same",
        "1 of 18 sites differ",
        "blocks.1.fc2:input",
        "-9.0",
        "top1: 95.50 % -> 85.00 % (-10.50 pp, 95 % interval [-14.82, -5.97] pp",
        "won 0, lost 21 images",
    ):
        assert words in found.out
    assert json.loads((tmp_path / "out.json").read_text())["b"] == "b.json"


def test_long_comparison_says_how_many_sites_it_leaves_out(vitcompress, tmp_path):
    for name, scheme in (("a.json", "W4A4"), ("b.json", "W8A8")):
        sites = make_sites(scheme, blocks=4)
        (tmp_path / name).write_text(make_result(labelled=(), sites=sites).to_json())

    found = vitcompress("compare", "a.json", "b.json")

    assert "32 of 36 sites differ" in found.out
    assert "and 12 more; --json has all of them" in found.out


def test_compare_of_other_images_says_why_there_is_no_accuracy(
    vitcompress, artefact, tmp_path
):
    (tmp_path / "a.json").write_text(make_result(sites=()).to_json())

    found = vitcompress("compare", "a.json", artefact)

    assert found.code == 0
    assert "accuracy not compared:" in found.out
    assert "only B has 28 sites" in found.out


def test_compare_of_a_missing_file_is_told_in_one_line(vitcompress):
    found = vitcompress("compare", "a.json", "b.json")

    assert (found.code, found.err.strip()) == (5, "error: a.json: file is missing")


def test_report_writes_its_files(vitcompress, sweep, tmp_path):
    found = vitcompress(
        *("report", "sweep", "-o", "out/report.html"),
        *("--markdown", "out/report.md", "--csv", "out/report.csv"),
    )

    assert found.code == 0
    assert "wrote out/report.html" in found.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("report.html", "report.md", "report.csv"),
    }


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (2, ("sweep",), "Missing option '--output'"),
        (2, ("sweep", "-o", "sweep"), "sweep: is a directory; name a file in it"),
        (5, ("nowhere", "-o", "r.html"), "nowhere: holds no sweep.json"),
        (5, ("sweep", "-o", "r.html", "--analysis", "a.json"), "a.json: cannot be read"),
    ],
)
def test_mistakes_of_report_are_told_in_one_line(vitcompress, sweep, code, arguments, words):
    found = vitcompress("report", *arguments)

    assert found.code == code
    assert words in found.err
    assert "Traceback" not in found.err
