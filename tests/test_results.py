"""Reading a sweep's directory, and figures over the seeds of a cell."""

import numpy as np
import pytest
from results import make_result, write_sweep

from vitcompress.errors import InputError
from vitcompress.results import cells_of, figure_of, image_outcomes, read_results


@pytest.fixture
def sweep(tmp_path):
    results = [make_result(scheme=scheme) for scheme in ("W8A8", "W6A6", "W4A4")]
    return write_sweep(tmp_path / "sweep", results)


def test_directory_gives_its_cells_in_order(sweep):
    found = read_results(sweep)

    assert [result.origin.scheme for result in found.found] == ["W8A8", "W6A6", "W4A4"]
    assert found.missing == {}


def test_file_gives_its_one_result(sweep):
    path = next((sweep / "cells").iterdir())

    (found,) = read_results(path).found

    assert path.stem == found.origin.key()


def test_cells_of_an_earlier_sweep_stay_out(sweep):
    stale = make_result(scheme="W2A2")
    (sweep / "cells" / f"{stale.origin.key()}.json").write_text(stale.to_json())

    assert len(read_results(sweep).found) == 3


def test_cells_without_a_result_are_named_with_the_reason(tmp_path):
    results = [make_result(scheme=scheme) for scheme in ("W8A8", "W6A6", "W4A4")]
    error = "internal error; please report it\nTraceback ...\nValueError: no\n"
    sweep = write_sweep(tmp_path / "sweep", results, failed={1: error})
    (sweep / "cells" / f"{results[2].origin.key()}.json").unlink()

    found = read_results(sweep)

    assert [result.origin.scheme for result in found.found] == ["W8A8"]
    assert found.missing == {
        "W6A6 / repq_vit, seed 0": "failed: ValueError: no; sweep again",
        "W4A4 / repq_vit, seed 0": "was not computed; sweep again",
    }


def test_damaged_cell_is_refused(sweep):
    path = next((sweep / "cells").iterdir())
    path.write_text(path.read_text()[:-100])

    with pytest.raises(InputError, match=f"{path.name}: Invalid JSON"):
        read_results(sweep)


def test_what_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no sweep\.json"):
        read_results(tmp_path)
    with pytest.raises(InputError, match=r"none\.json: file is missing"):
        read_results(tmp_path / "none.json")


def test_seeds_of_a_cell_come_together_in_order():
    results = [make_result(scheme=s, seed=n) for n in (2, 0) for s in ("W8A8", "W4A4")]

    cells = cells_of(results)

    assert [str(name) for name in cells] == ["toy / W8A8 / repq_vit", "toy / W4A4 / repq_vit"]
    assert [[r.origin.seed for r in group] for group in cells.values()] == [[0, 2], [0, 2]]


def test_result_about_no_image_is_refused():
    with pytest.raises(
        InputError, match=r"toy / W4A4 / repq_vit, seed 0: was evaluated on no"
    ):
        cells_of([make_result(images=0, labelled=())])


def test_figures_by_hand():
    group = [
        make_result(wrong=range(10), images=100, size_bytes=300, latency_ratio=2.0),
        make_result(wrong=range(20), images=100, size_bytes=400, latency_ratio=3.0, seed=1),
    ]

    figures = {
        metric: figure_of(group, metric) for metric in ("top1", "size", "latency_ratio")
    }

    assert figures == {"top1": 85.0, "size": 350.0, "latency_ratio": 2.5}


def test_outcome_of_an_image_is_that_of_its_prediction():
    result = make_result(wrong=(1, 3), images=5)
    outcomes = result.outcomes.model_copy(
        update={"reference_predictions": result.outcomes.predictions}
    )

    top1 = image_outcomes(result, "top1")
    agreement = image_outcomes(result.model_copy(update={"outcomes": outcomes}), "agreement")

    np.testing.assert_array_equal(top1, [True, False, True, False, True])
    np.testing.assert_array_equal(agreement, [True] * 5)


@pytest.mark.parametrize("metric", ["top1", "latency_ratio"])
def test_figure_that_one_seed_lacks_is_none(metric):
    group = [
        make_result(latency_ratio=2.0),
        make_result(seed=1, labelled=()),
    ]

    assert figure_of(group, metric) is None
