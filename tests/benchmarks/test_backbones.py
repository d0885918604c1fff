"""The pure parts of the backbone matrix: weights, rules, comparison and page."""

import copy
import json
import math
import sys

import bench_backbones
import pytest
import torch
from backbone_rows import notes, problems, read_rows, regressions
from backbones import BACKBONES, Backbone, is_norm, liveliness, randomise, select
from bench_backbones import Record, coverage, failure, last_row, measure
from draw_backbones import COLUMNS, cells, render, result
from tiny import TinyViT, images, tiny_vit
from torch import nn

import calib
from vitcompress.errors import UnsupportedModelError
from vitcompress.graph import enumerate_sites

CASE = Backbone("toy", "timm", 1)


class RootMeanSquareNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Everything(nn.Module):
    """One parameter of each kind, as libraries initialise them."""

    def __init__(self, dim=16):
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(dim)
        self.layer_norm = nn.LayerNorm(dim)
        self.group_norm = nn.GroupNorm(1, dim)
        self.rms_norm = RootMeanSquareNorm(dim)
        self.plain_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.dead_norm = nn.BatchNorm1d(dim)
        nn.init.zeros_(self.dead_norm.weight)
        self.conv = nn.Conv2d(3, dim, 3)
        self.attention = nn.MultiheadAttention(dim, 2)
        self.head = nn.Linear(dim, 10)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.faint_head = nn.Linear(dim, 10)
        nn.init.normal_(self.faint_head.weight, std=2e-5)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))
        self.scale = nn.Parameter(torch.ones(dim, 1, 1))
        self.logit_scale = nn.Parameter(torch.full((2, 1, 1), math.log(10)))
        self.bias_table = nn.Parameter(torch.zeros(4, 49))
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.faint_token = nn.Parameter(1e-6 * torch.randn(1, 1, dim))


@pytest.fixture
def everything():
    return randomise(Everything())


def row(**changes):
    """Return a row that passes, with changes."""
    scheme = {
        "linears": {"quantized": 9, "found": 9, "reasons": {}, "unexplained": []},
        "convs": {"quantized": 1, "found": 1, "reasons": {}, "unexplained": []},
        "product_operands": {"quantized": 0, "found": 8},
        "norms_folded": 4,
        "norms_found": 5,
        "sqnr_db": 38.25,
        "varying_sqnr_db": 14.5,
        "same_bits": True,
        "onnx": {
            "integer_linears": 9,
            "linears": 9,
            "integer_ops": {"QGemm": 9, "QLinearConv": 1},
            "top1_agreement_percent": 93.75,
        },
    }
    products = {**scheme, "product_operands": {"quantized": 8, "found": 8}, "sqnr_db": 29.0}
    measured = {
        "model": "timm/toy",
        "tier": 1,
        "refused": "",
        "samples": 4,
        "size": 32,
        "parameters": 1_500_000,
        "seconds": {"capture": 3.5, "quantize W8A8": 4.25, "export W8A8": 10.0},
        "peak_bytes": {"capture": 8e8, "export W8A8": 9e8},
        "capture_error": {"1": 2e-7, "3": 4e-7},
        "norms": {"batch_norms": 3, "other_norms": 5, "batch_norms_left": 1},
        "unlisted_products": {},
        "liveliness": {"spread": 0.02, "block_effect": 0.01},
        "schemes": {"W8A8": scheme, "W4A8": {**scheme, "sqnr_db": 18.0}, "repq_vit": products},
        "failures": [],
        "versions": {"torch": "2.0"},
        "processor": "a processor",
        "threads": 1,
        "date": "2026-01-02",
    }
    return judged({**measured, **changes})


def judged(figures):
    found = problems(figures)
    return {**figures, "passes": not found, "problems": found, "notes": notes(figures)}


def with_scheme(name, **changes):
    schemes = copy.deepcopy(row()["schemes"])
    schemes[name].update(changes)
    return row(schemes=schemes)


# Cases


def test_every_case_has_a_key_of_its_own():
    by_tier = [sum(case.tier == tier for case in BACKBONES.values()) for tier in (0, 1, 2)]

    assert by_tier == [6, 26, 40]
    assert all(case.key == key for key, case in BACKBONES.items())


def test_cases_are_found_with_and_without_their_library():
    chosen = select(["swin_t", "timm/levit_128s"], None)

    assert [case.key for case in chosen] == ["torchvision/swin_t", "timm/levit_128s"]
    assert select(["swin_t", "dinat"], 2) == [BACKBONES["transformers/dinat"]]
    assert len(select([], None)) == len(BACKBONES)


def test_an_unknown_case_is_an_error():
    with pytest.raises(LookupError, match="resnet: expected the name of one backbone"):
        select(["resnet"], None)


# Weights


def test_no_parameter_is_constant_or_next_to_nothing(everything):
    for name, parameter in everything.named_parameters():
        assert parameter.std() > 5e-3, name


def test_norms_get_spreads_of_their_own(everything):
    for norm in (module for module in everything.modules() if is_norm(module)):
        if norm.weight is None:
            continue
        assert 0.5 <= norm.weight.min() < norm.weight.max() <= 1.5
        bias = getattr(norm, "bias", None)
        assert bias is None or 0.1 < bias.std() < 0.6
    for norm in (everything.batch_norm, everything.dead_norm):
        assert 0.1 < norm.running_mean.std() < 0.6
        assert 0.5 <= norm.running_var.min() < norm.running_var.max() <= 2.0


def test_scales_are_drawn_around_what_trained_ones_are(everything):
    for scale in (everything.gamma, everything.scale):
        assert 0.3 <= scale.min() < scale.max() <= 1.0
    assert torch.allclose(everything.logit_scale, torch.tensor(math.log(10)), rtol=0.2)


def gain(weight):
    return weight.square().mean().sqrt().item() * weight[0].numel() ** 0.5


def test_heads_of_zeros_are_redrawn(everything):
    for head in (everything.head, everything.faint_head):
        assert gain(head.weight) == pytest.approx(1.0, rel=0.3)


def test_weak_weights_are_scaled_to_unit_gain():
    torch.manual_seed(0)
    model = Everything()
    nn.init.normal_(model.conv.weight, std=0.02)
    before = model.conv.weight.clone()

    randomise(model)

    assert gain(model.conv.weight) == pytest.approx(1.0)
    torch.testing.assert_close(model.conv.weight, before / gain(before))


def test_strong_weights_are_left_alone():
    torch.manual_seed(0)
    model = Everything()
    nn.init.normal_(model.conv.weight)
    before = model.conv.weight.clone()

    randomise(model)

    assert torch.equal(model.conv.weight, before)


def test_the_same_seed_gives_the_same_weights():
    torch.manual_seed(0)
    model = TinyViT()
    first = randomise(copy.deepcopy(model), seed=1).state_dict()
    again = randomise(copy.deepcopy(model), seed=1).state_dict()
    other = randomise(copy.deepcopy(model), seed=2).state_dict()

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["norm.weight"], other["norm.weight"])


def test_a_model_without_a_head_is_found_blind_and_comes_alive():
    model = TinyViT().eval()
    nn.init.zeros_(model.head.weight)

    blind = liveliness(model, images(3), model)
    lively = liveliness(randomise(model), images(3), model)

    assert blind.spread == blind.block_effect == 0.0
    assert lively.spread > 1e-3
    assert lively.block_effect > 1e-3


def test_the_disturbed_weight_is_put_back():
    model = tiny_vit()
    before = copy.deepcopy(model.state_dict())

    liveliness(model, images(3), model)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Rules


def test_a_good_row_passes():
    assert row()["passes"]
    assert not row()["notes"]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (
            row(capture_error={"1": 1e-7, "3": 2e-5}),
            "captured differs from eager by 2.0e-05 at batch 3, expected at most 1e-05",
        ),
        (
            row(capture_error={"1": math.nan}),
            "captured differs from eager by nan at batch 1, expected at most 1e-05",
        ),
        (row(seconds={"capture": 12.5}), "capture took 12.5 s, expected 12 s"),
        (
            with_scheme("W8A8", sqnr_db=19.9),
            "W8A8: SQNR 19.9 dB, expected at least 20 dB",
        ),
        (
            with_scheme("W4A8", same_bits=False),
            "W4A8: the loaded artefact computes other values than the saved model",
        ),
        (
            with_scheme("repq_vit", convs={"unexplained": ["stem"]}),
            "repq_vit: 1 convs are float without a reason: stem",
        ),
        (
            row(failures=[failure("export W4A8", UnsupportedModelError("no such op"))]),
            "export W4A8: UnsupportedModelError: no such op",
        ),
    ],
)
def test_a_column_that_fails_is_named(bad, problem):
    assert bad["problems"] == [problem]
    assert not bad["passes"]


def test_four_bit_weights_are_reported_and_not_judged():
    assert with_scheme("W4A8", sqnr_db=5.0)["passes"]


def test_a_float_layer_with_a_reason_is_no_problem():
    linears = {"quantized": 7, "found": 9, "reasons": {"a:input": "skipped by a rule"}}

    assert with_scheme("W8A8", linears=linears)["passes"]


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (UnsupportedModelError("toy: needs natten"), True),
        (UnsupportedModelError("toy: cannot be traced"), False),
        # Without an exit code of its own it would end as an internal error.
        (ImportError("needs natten"), False),
        (None, False),
    ],
)
def test_a_refusal_names_what_is_missing_and_has_its_exit_code(error, passes):
    failures = [] if error is None else [failure("build", error)]

    assert row(refused="natten", failures=failures)["passes"] is passes


def test_a_blind_model_is_noted():
    found = row(liveliness={"spread": 5e-5, "block_effect": 0.1})

    assert found["passes"]
    assert found["notes"] == ["logits hardly vary between images (5e-05 of the largest)"]


def test_only_tier_1_models_that_passed_before_can_get_worse():
    failing = row(failures=[failure("capture", ValueError("no"))])
    baseline = {
        "kept": row(),
        "broken": row(),
        "gone": row(),
        "never": failing,
        "second": row(tier=2),
    }
    now = {"kept": row(), "broken": failing, "never": failing, "second": failing}

    assert regressions(baseline, now) == [
        "broken: passed on 2026-01-02, now: capture: ValueError: no",
        "gone: passed on 2026-01-02, has no row now",
    ]


def test_the_last_row_of_a_model_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(size=size)) + "\n" for size in (32, 64)))

    assert {model: found["size"] for model, found in read_rows(path).items()} == {
        "timm/toy": 64
    }


# Measuring


def test_messages_lose_the_paths_of_a_machine():
    text = f"at /opt/python/site-packages/timm/vit.py:3 and {bench_backbones.ROOT}/calib/x.py"

    assert failure("capture", ValueError(text))["message"] == "at timm/vit.py:3 and calib/x.py"


def test_float_layers_are_explained_by_what_was_skipped(vit_graph):
    skipped = dict.fromkeys(enumerate_sites(vit_graph), "skipped by a rule")

    unexplained, explained = coverage(vit_graph, {}), coverage(vit_graph, skipped)

    assert unexplained["convs"]["unexplained"] == ["patch_embed"]
    assert len(unexplained["linears"]["unexplained"]) == unexplained["linears"]["found"] == 9
    assert explained["linears"]["unexplained"] == []
    assert len(explained["linears"]["reasons"]) == 2 * 9
    assert explained["product_operands"] == {"quantized": 0, "found": 8}


def test_a_model_is_measured_to_the_end(monkeypatch):
    preprocessing = calib.Preprocessing(size=(32, 32))
    monkeypatch.setattr(bench_backbones, "build", lambda case: (tiny_vit(), preprocessing))
    monkeypatch.setattr(bench_backbones, "SCHEMES", (("repq_vit", "W8A8", "repq_vit", False),))
    printed = []
    record = Record(CASE, printed.append)

    measure(CASE, record)

    found = record.row
    assert problems(found) == []
    assert printed[-1]["running"] == "quantize repq_vit"
    assert found["operations"] == {"conv2d": 1, "linear": 9, "matmul": 4}
    assert found["schemes"]["repq_vit"]["product_operands"] == {"quantized": 8, "found": 8}
    assert set(found["seconds"]) == set(found["peak_bytes"])


def test_a_stage_that_fails_ends_the_model_with_its_message(monkeypatch):
    def build(case):
        raise UnsupportedModelError("toy: no such thing")

    monkeypatch.setattr(bench_backbones, "build", build)
    record = Record(CASE, lambda row: None)

    with pytest.raises(bench_backbones.StageFailedError):
        measure(CASE, record)

    expected = {
        "stage": "build",
        "type": "UnsupportedModelError",
        "message": "toy: no such thing",
        "exit_code": 4,
    }
    assert record.row["failures"] == [expected]


def test_a_crash_costs_the_stage_it_happened_in():
    known = json.dumps({**row(), "running": "export W8A8"})

    found = last_row(CASE, f'{known}\n{{"model": "ti', "exit code -11")

    assert found["size"] == 32
    assert found["problems"] == ["export W8A8: process: exit code -11"]


def test_a_process_that_says_nothing_failed_at_its_start():
    assert last_row(CASE, "", "exit code 1")["problems"] == ["start: process: exit code 1"]


def run_main(monkeypatch, found, *arguments):
    monkeypatch.setattr(bench_backbones, "measure_apart", lambda case: found)
    monkeypatch.setattr(sys, "argv", ["bench_backbones.py", *map(str, arguments)])
    bench_backbones.main()


def test_a_model_that_got_worse_fails_the_run(monkeypatch, tmp_path):
    model = "timm/levit_128s"
    baseline, output = tmp_path / "before.jsonl", tmp_path / "now.jsonl"
    baseline.write_text(json.dumps(row(model=model)) + "\n")
    options = ("--models", "levit_128s", "--output", output, "--baseline", baseline)

    run_main(monkeypatch, row(model=model), *options)
    broken = row(model=model, capture_error={"1": 1.0})
    with pytest.raises(SystemExit, match=f"{model}: passed on 2026-01-02, now: captured"):
        run_main(monkeypatch, broken, *options)


def test_resuming_measures_what_has_no_row_yet(monkeypatch, tmp_path):
    output = tmp_path / "rows.jsonl"
    output.write_text(json.dumps(row(model="timm/levit_128s")) + "\n")
    found = row(model="timm/pvt_v2_b0")

    run_main(
        monkeypatch, found, "--resume", "--models", "levit_128s,pvt_v2_b0", "--output", output
    )

    assert list(read_rows(output)) == ["timm/levit_128s", "timm/pvt_v2_b0"]
    assert len(output.read_text().splitlines()) == 2


# Page


def test_cells_stand_under_their_columns():
    found = dict(zip(COLUMNS, cells(row()), strict=True))

    assert found["size"] == "1.5 M, 32"
    assert found["linears"] == "9/9"
    assert found["products"] == "8/8"
    assert found["norms"] == "BN 2/3, LN 4/5"
    assert found["capture error"] == "4e-07"
    assert found["W8A8 dB"] == "38.2 (14.5)"
    assert found["same bits"] == "yes"
    assert found["ONNX integer"] == "9/9, convs 1/1"
    assert found["agree %"] == "94"
    assert found["peak MB"] == "900"
    assert found["result"] == "passes"


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("export W8A8: ExportError: " + 50 * "long ", "export W8A8: ExportError"),
        ("capture took 12.5 s, expected 12 s", "capture took 12.5 s"),
        ("wrong refusal: expected exit code 4 " + 50 * "long ", "wrong refusal"),
        (50 * "long ", (10 * "long ").strip() + " ..."),
    ],
)
def test_the_verdict_is_short(problem, words):
    assert result({**row(), "passes": False, "problems": [problem]}) == words


def test_what_was_not_measured_is_left_empty():
    failures = [failure("build", ImportError("no module"))]
    empty = judged({**Record(CASE, lambda row: None).row, "failures": failures})

    found = dict(zip(COLUMNS, cells(empty), strict=True))

    assert found.pop("model") == "timm/toy"
    assert found.pop("result") == "build: ImportError: no module"
    assert set(found.values()) == {""}


def test_the_page_has_a_table_for_each_tier_and_every_reason_in_full():
    reason = "a | long reason " * 10
    failures = [failure("capture", UnsupportedModelError(reason))]
    rows = [row(), row(model="timm/other", tier=2, failures=failures)]

    page = render(rows, "backbones-2026-01-02.jsonl")

    assert "## Tier 1: must pass every column\n\n1 of 1 pass.\n" in page
    assert "## Tier 2: the rest of the families\n\n0 of 1 pass.\n" in page
    assert "python benchmarks/bench_backbones.py" in page
    assert "benchmarks/results/backbones-2026-01-02.jsonl" in page
    assert f"- timm/other: capture: UnsupportedModelError: {reason.strip()}" in page
    tables = [line for line in page.splitlines() if line.startswith("| timm/")]
    assert len(tables) == 2
    assert all(line.count(" | ") == len(COLUMNS) - 1 for line in tables)
    assert tables[1].endswith("| capture: UnsupportedModelError |")
