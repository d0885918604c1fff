"""Verdicts: what has moved, what chance explains, and what cannot be compared at all."""

import pytest
from results import make_result

from vitcompress.errors import InputError
from vitcompress.gate import judge, read_baseline, update_baseline


@pytest.fixture
def baseline_of(tmp_path):
    """Return the baseline that results would make, with other tolerances if asked for."""

    def baseline_of(*results, **tolerances):
        path = tmp_path / "baseline.yaml"
        path.unlink(missing_ok=True)
        update_baseline(path, results)
        text = path.read_text()
        for metric, tolerance in tolerances.items():
            lines = [
                line.split("tolerance:")[0] + f"tolerance: {tolerance}}}"
                if line.strip().startswith(f"{metric}:")
                else line
                for line in text.splitlines()
            ]
            text = "\n".join(lines)
        path.write_text(text)
        return read_baseline(path)

    return baseline_of


def verdicts(report):
    (cell,) = report.cells
    return {metric.metric: metric for metric in cell.metrics}


def test_same_results_pass_exactly(baseline_of):
    result = make_result(wrong=range(20))

    report = judge([result], baseline_of(result, top1=0.0, agreement=0.0))

    assert report.passed
    for metric in verdicts(report).values():
        assert (metric.difference, metric.verdict) == (0.0, "within tolerance")
    assert verdicts(report)["top1"].p_value == 1.0


@pytest.mark.parametrize(
    ("wrong", "verdict", "passed"),
    [
        (range(20, 40), "within tolerance", True),  # as many, but others
        (range(21), "within tolerance", True),  # half a point, p = 1
        (range(24), "within noise", True),  # two points, four images lost: p = 1/8
        (range(26), "regressed", False),  # three points, six images lost: p = 1/32
        (range(60), "regressed", False),
        (range(16), "within noise", True),
        (range(14), "improved", False),
        (range(0), "improved", False),
    ],
)
def test_verdict_on_accuracy(baseline_of, wrong, verdict, passed):
    baseline = baseline_of(make_result(wrong=range(20)), top1=1.0, agreement=1.0)

    report = judge([make_result(wrong=wrong)], baseline)

    found = verdicts(report)
    assert (found["top1"].verdict, found["agreement"].verdict) == (verdict, verdict)
    assert report.passed is passed
    assert found["top1"].failed is not passed


def test_what_is_sure_but_small_is_within_tolerance(baseline_of):
    baseline = baseline_of(make_result(wrong=range(20)), top1=3.0, agreement=3.0)

    top1 = verdicts(judge([make_result(wrong=range(26))], baseline))["top1"]

    assert (top1.difference, top1.verdict) == (pytest.approx(-3.0), "within tolerance")
    assert top1.p_value == pytest.approx(2 / 64)
    assert (top1.gained, top1.lost) == (0, 6)
    assert top1.low < -3.0 < top1.high < 0.0


def test_others_lost_than_won_is_not_told_by_the_figure_alone(baseline_of):
    """Twenty images lost and five won is the drop of fifteen lost, with more noise."""
    baseline = baseline_of(make_result(wrong=range(5)))

    mixed = verdicts(judge([make_result(wrong=range(5, 25))], baseline))["top1"]
    plain = verdicts(judge([make_result(wrong=range(20))], baseline))["top1"]

    assert mixed.difference == plain.difference == pytest.approx(-7.5)
    assert (mixed.gained, mixed.lost) == (5, 20)
    assert plain.p_value < mixed.p_value < 0.05
    assert mixed.low < plain.low


def test_improvement_passes_when_it_is_accepted(baseline_of):
    baseline = baseline_of(make_result(wrong=range(20), size_bytes=4000))
    better = [make_result(wrong=(), size_bytes=3000)]

    assert not judge(better, baseline).passed
    report = judge(better, baseline, accept_improvement=True)

    assert report.passed
    assert {m.verdict for m in verdicts(report).values()} == {"improved"}


def test_accepting_improvements_accepts_no_loss(baseline_of):
    baseline = baseline_of(make_result(wrong=range(20)))

    assert not judge([make_result(wrong=range(60))], baseline, accept_improvement=True).passed


@pytest.mark.parametrize(
    ("size_bytes", "verdict"),
    [
        (4000, "within tolerance"),
        (4100, "within tolerance"),
        (4101, "regressed"),
        (3900, "within tolerance"),
        (3899, "improved"),
    ],
)
def test_verdict_on_size_is_the_tolerance(baseline_of, size_bytes, verdict):
    baseline = baseline_of(make_result(size_bytes=4000), size=100)

    size = verdicts(judge([make_result(size_bytes=size_bytes)], baseline))["size"]

    assert size.verdict == verdict
    assert (size.low, size.p_value, size.gained) == (None, None, None)


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (2.1, "within tolerance"),
        (1.8, "within tolerance"),
        (1.7, "regressed"),
        (2.3, "improved"),
    ],
)
def test_verdict_on_latency_is_the_tolerance(baseline_of, ratio, verdict):
    baseline = baseline_of(make_result(latency_ratio=2.0))

    latency = verdicts(judge([make_result(latency_ratio=ratio)], baseline))["latency_ratio"]

    assert latency.verdict == verdict


# Seeds


def test_seeds_are_pooled_over_images(baseline_of):
    """Three seeds lose the same six images: that is six images, not eighteen."""
    before = [make_result(seed=seed, wrong=range(10)) for seed in (0, 1, 2)]
    after = [make_result(seed=seed, wrong=range(16)) for seed in (0, 1, 2)]

    top1 = verdicts(judge(after, baseline_of(*before)))["top1"]

    assert top1.difference == pytest.approx(-3.0)
    assert (top1.gained, top1.lost) == (0, 6)
    assert top1.p_value == pytest.approx(2 / 64)


def test_seeds_meet_their_own_seed_whatever_the_order(baseline_of):
    results = [make_result(seed=seed, wrong=range(10 * seed)) for seed in (0, 1, 2)]

    report = judge(results[::-1], baseline_of(*results))

    assert verdicts(report)["top1"].lost == 0
    assert report.cells[0].seeds == (0, 1, 2)


def test_other_seeds_are_not_compared(baseline_of):
    baseline = baseline_of(make_result(seed=0), make_result(seed=1))

    report = judge([make_result(seed=0), make_result(seed=2)], baseline)

    assert not report.passed
    assert report.cells == ()
    assert report.unmatched == {
        "toy / W4A4 / repq_vit": "has seeds [0, 2], but [0, 1] in the baseline; sweep the "
        "same seeds, or --update-baseline"
    }


# Cells on one side alone


def test_cell_without_a_result_fails_but_the_others_are_judged(baseline_of):
    baseline = baseline_of(make_result(scheme="W8A8"), make_result(scheme="W4A4"))

    report = judge([make_result(scheme="W8A8")], baseline)

    assert not report.passed
    assert [cell.scheme for cell in report.cells] == ["W8A8"]
    assert list(report.unmatched) == ["toy / W4A4 / repq_vit"]
    assert "has no result; sweep it again" in report.unmatched["toy / W4A4 / repq_vit"]


def test_one_result_alone_is_not_asked_for_the_others(baseline_of):
    baseline = baseline_of(make_result(scheme="W8A8"), make_result(scheme="W4A4"))

    assert judge([make_result(scheme="W8A8")], baseline, complete=False).passed


def test_result_without_a_limit_fails(baseline_of):
    report = judge(
        [make_result(), make_result(recipe="deploy")],
        baseline_of(make_result()),
        complete=False,
    )

    assert not report.passed
    assert report.unmatched == {
        "toy / W4A4 / deploy": "is not in the baseline; --update-baseline adds it"
    }


def test_cells_that_failed_fail_the_gate(baseline_of):
    report = judge(
        [make_result()],
        baseline_of(make_result()),
        missing={"W4A4 / x, seed 1": "failed: why"},
    )

    assert not report.passed
    assert report.unmatched == {"W4A4 / x, seed 1": "failed: why"}


# What cannot be compared


def on_other_images(result):
    images = result.origin.evaluation.model_copy(
        update={"digest": "0" * 64, "source": "other images"}
    )
    return result.model_copy(
        update={"origin": result.origin.model_copy(update={"evaluation": images})}
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: [], "gate: no results"),
        (
            lambda: [make_result(model_digest="f0" * 32)],
            "the baseline is of another model: digest d1d1d1d1d1d1, found f0f0f0f0f0f0; "
            "not paired. If the change is meant, --update-baseline",
        ),
        (
            lambda: [on_other_images(make_result())],
            "the baseline is about other images: digest e2e2e2e2e2e2, found 000000000000",
        ),
        (
            lambda: [make_result(), on_other_images(make_result(seed=1))],
            "seed 1: evaluated on other images (000000000000), other results of toy on 200 "
            "images (e2e2e2e2e2e2): not paired; evaluate all on the same images",
        ),
        (
            lambda: [make_result(), make_result(scheme="W8A8", model_digest="f0" * 32)],
            "model digest f0f0f0f0f0f0, but d1d1d1d1d1d1 in another result of toy",
        ),
        (lambda: [make_result(), make_result()], "two results of seed 0; gate one sweep"),
        (lambda: [make_result(images=100)], "has 200 images, the result 100; not paired"),
        (
            lambda: [make_result(labelled=range(150))],
            "toy / W4A4 / repq_vit, seed 0: 50 of 200 images have no label, first 'image150'",
        ),
        (
            lambda: [make_result(labelled=())],
            "the baseline limits top1, but none of the images has a label",
        ),
        (
            lambda: [make_result(execution="executed")],
            "outcomes were executed, those of the baseline simulated",
        ),
        (
            lambda: [make_result(), make_result(seed=1, execution="executed")],
            "some outcomes are simulated, some executed",
        ),
    ],
)
def test_what_is_not_paired_is_refused(baseline_of, make, words):
    baseline = baseline_of(make_result())

    with pytest.raises(InputError) as caught:
        judge(make(), baseline)

    assert words in str(caught.value)


def test_limit_on_latency_needs_a_measured_one(baseline_of):
    baseline = baseline_of(make_result(latency_ratio=2.0))

    with pytest.raises(
        InputError, match="limits latency_ratio, but a result has not measured"
    ):
        judge([make_result()], baseline)
