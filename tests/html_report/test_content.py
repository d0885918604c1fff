"""What the page says, before anything is drawn; and the same as Markdown and CSV."""

import csv
import io

import pytest
from results import make_result, make_sites, write_sweep

from vitcompress.errors import InputError
from vitcompress.html_report import to_csv, to_markdown
from vitcompress.html_report.content import (
    cell_figures,
    harm_table,
    left_alone,
    metric_of,
    pareto_front,
    shares_table,
    sites_table,
    worst_sites,
    worst_table,
    worst_units,
)
from vitcompress.sweep import read_sweep


@pytest.fixture(scope="module")
def cells(swept):
    return cell_figures(swept)


def test_cells_are_in_order_of_recipe_and_width(cells):
    assert [(cell.name.recipe, cell.name.scheme) for cell in cells] == [
        (recipe, scheme)
        for recipe in ("repq_vit", "deploy")
        for scheme in ("W8A8", "W4A8", "W4A4")
    ]


def test_shares_are_over_seeds_and_images(cells):
    widest = cells[0]

    assert widest.seeds == (0, 1)
    assert widest.top1.seeds == (98.0, 97.0)
    assert widest.top1.mean == 97.5
    assert widest.top1.low < 97.0
    assert 98.0 < widest.top1.high < 100.0
    assert widest.agreement.mean == 97.5
    assert widest.kl == pytest.approx(0.01 + 0.49 * 5 / 200)
    assert widest.latency_ratio is None


def test_front_holds_what_nothing_beats(cells):
    front = [(cell.name.recipe, cell.name.scheme) for cell in pareto_front(cells, "top1")]

    # Size ties are won by accuracy; deploy is a little worse everywhere.
    assert front == [("repq_vit", "W4A8"), ("repq_vit", "W8A8")]


def test_front_leaves_out_what_is_larger_and_no_better(tmp_path):
    results = [
        make_result(scheme="W8A8", size_bytes=8000, wrong=range(4)),
        make_result(scheme="W6A6", size_bytes=6000, wrong=range(4)),
        make_result(scheme="W4A4", size_bytes=4000, wrong=range(9)),
    ]
    cells = cell_figures(read_sweep(write_sweep(tmp_path / "sweep", results)))

    assert [cell.name.scheme for cell in pareto_front(cells, "top1")] == ["W4A4", "W6A6"]


def test_table_of_cells_begins_with_the_float_model(cells, swept):
    table = shares_table(cells, swept)

    assert table.rows[0][:3] == ("float", "-", "100.00")
    assert table.rows[1][:3] == ("repq_vit", "W8A8", "97.50 (97.00 to 98.00)")
    assert table.rows[1][-1] == "yes"
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_without_labels_there_is_agreement_only(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path / "sweep", [make_result(labelled=())]))
    cells = cell_figures(sweep)

    assert metric_of(cells) == "agreement"
    assert shares_table(cells, sweep).rows[1][2:5] == ("-", "-", "100.00")


def test_some_labels_missing_is_an_error(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path / "sweep", [make_result(labelled=range(5))]))

    with pytest.raises(InputError, match="195 of 200 images have no label"):
        cell_figures(sweep)


def test_every_site_is_in_the_table(cells):
    table = sites_table(cells[0].report)

    assert len(table.rows) == 27
    assert table.rows[0] == ("blocks.0.qkv:weight", "weight", "u8 per_channel", "48.0", "-")
    assert table.rows[1][3:] == ("48.0", "-1.5 to 2")
    assert table.rows[8][2:] == ("float", "-", "-")


def test_worst_sites_are_few_measured_and_in_order(cells):
    sites = worst_sites(cells[0].report)

    assert len(sites) == 8
    assert sites[0].site == "blocks.2.fc2:input"
    assert all(site.role != "weight" for site in sites)
    assert worst_table(cells[0].report).rows[0][:4] == (
        *("blocks.2.fc2:input", "31.0", "-3.5 to 2", "0.7"),
    )


def test_harm_is_that_of_the_finest_level(analysis):
    blocks = analysis.model_copy(update={"entries": analysis.entries[:2]})

    assert [entry.level for entry in worst_units(analysis)] == ["site", "site"]
    assert [entry.unit for entry in worst_units(blocks)] == ["blocks.1", "blocks.0"]
    assert harm_table(analysis).rows[0] == (
        *("blocks.1", "block", "u4 per_tensor", "1.5", "-15.0", "25.00"),
    )


def test_what_stays_float_is_told_with_the_reason(cells):
    report = cells[0].report
    step = report.passes[0]
    folded = step.model_copy(
        update={"name": "repq_vit", "skipped": {"norm": "feeds no linear"}}
    )
    changed = report.model_copy(
        update={"passes": (step.model_copy(update={"skipped": {}}), folded)}
    )

    first, second = left_alone(report).rows, left_alone(changed).rows

    assert first[0] == ("blocks.0.attn:probs", "probs", "attach: skipped by a rule")
    assert first[-2:] == (
        ("pos_embed", "stored tensor", "float, 2,000 bytes"),
        ("norm.weight", "stored tensor", "float, 128 bytes"),
    )
    assert second[0] == ("blocks.0.attn:probs", "probs", "no rule matches it")
    assert ("norm", "left by a pass", "repq_vit: feeds no linear") in second


def test_csv_has_a_line_for_each_cell_and_seed(swept):
    rows = list(csv.DictReader(io.StringIO(to_csv(swept))))

    assert len(rows) == 11
    first = rows[0]
    assert (first["recipe"], first["scheme"], first["seed"]) == ("repq_vit", "W4A4", "0")
    assert (float(first["top1_percent"]), int(first["stored_bytes"])) == (80.0, 5000)
    assert first["latency_ratio"] == ""


@pytest.mark.parametrize("name", ["=1+1", "+x", "-x", "@x"])
def test_csv_holds_no_formula(tmp_path, name):
    sweep = read_sweep(write_sweep(tmp_path / "sweep", [make_result(model=name)]))

    (row,) = csv.DictReader(io.StringIO(to_csv(sweep)))

    assert row["model"] == f"'{name}"


def test_markdown_has_the_tables(swept):
    text = to_markdown(swept)

    assert "| repq\\_vit | W8A8 | 97.50 (97.00 to 98.00) |" in text
    assert "## Cells without a result" in text
    assert "| deploy | W4A8 | 1 | ValueError: \\<no\\> |" in text
    assert "| model digest | d1d1" in text


def test_markdown_of_a_complete_sweep_names_no_failures(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path / "sweep", [make_result()]))

    assert "without a result" not in to_markdown(sweep)


def test_names_cannot_break_a_table(named):
    rows = [line for line in to_markdown(named).splitlines() if line.startswith("|")]

    assert len({row.replace(r"\|", "").count("|") for row in rows[:4]}) == 1
    assert "<script>" not in to_markdown(named).replace(r"\<script\>", "")


def test_sites_of_equal_name_do_not_hide_each_other(tmp_path):
    sites = make_sites()[:4]
    result = make_result(sites=[*sites, *sites])
    cells = cell_figures(read_sweep(write_sweep(tmp_path / "sweep", [result])))

    assert len(sites_table(cells[0].report).rows) == 8
