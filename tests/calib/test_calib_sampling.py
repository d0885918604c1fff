"""The order of candidates: seeded, balanced, and equal to a permutation where it must be."""

from collections import Counter

import numpy as np
import pytest

from calib import SourceError
from calib.sampling import Choice, candidate_order, check_settings


def test_without_labels_the_order_is_the_seeded_permutation():
    order = candidate_order(100, None, 10, seed=3)

    assert order == np.random.RandomState(3).permutation(100).tolist()


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_one_image_per_class_equals_the_permutation(seed):
    order = candidate_order(1000, list(range(1000)), 32, seed)

    assert order[:32] == np.random.RandomState(seed).permutation(1000)[:32].tolist()


@pytest.mark.parametrize("samples", [7, 10, 25, 40])
def test_every_prefix_is_balanced(samples):
    labels = [0] * 50 + [1] * 30 + [2] * 20 + [3] * 10 + [4] * 10

    chosen = candidate_order(len(labels), labels, samples, seed=0)[:samples]

    counts = Counter(labels[number] for number in chosen)
    assert max(counts.values()) - min(counts[label] for label in range(5)) <= 1


def test_exhausted_classes_leave_room_to_others():
    labels = [0] * 10 + [1] * 2

    chosen = candidate_order(len(labels), labels, 8, seed=0)[:8]

    assert Counter(labels[number] for number in chosen) == {0: 6, 1: 2}


def test_balance_by_hand():
    labels = [0, 0, 0, 1]
    permutation = np.random.RandomState(0).permutation(4).tolist()
    assert permutation == [2, 3, 1, 0]

    # Ranks in permutation order are 0, 0, 1, 2: nothing moves.
    assert candidate_order(4, labels, 4, seed=0) == [2, 3, 1, 0]
    # With labels 0, 0, 1, 1 the ranks are 0, 1, 0, 1: number 1 overtakes number 3.
    assert candidate_order(4, [0, 0, 1, 1], 4, seed=0) == [2, 1, 3, 0]


def test_all_samples_keep_their_order():
    assert candidate_order(5, [1, 0, 1, 0, 1], None, seed=9) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0, 0, 1), "samples"),
        ((1, -1, 1), "seed"),
        ((1, 2**32, 1), "seed"),
        ((1, 0, 0), "batch"),
    ],
)
def test_settings_out_of_bounds(settings, message):
    with pytest.raises(SourceError, match=message):
        check_settings(*settings)


def test_choice_goes_on_past_rejected_candidates():
    choice = Choice([4, 2, 0, 1], wanted=2)

    choice.accept()
    choice.reject("broken")
    choice.accept()

    assert choice.pending() is None
    assert choice.accepted == [4, 0]
    assert choice.rejected == [(2, "broken")]
