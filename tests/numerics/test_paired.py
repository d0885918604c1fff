import itertools
import math

import numpy as np
import pytest

from vitcompress.numerics.paired import mean_interval, paired_difference, sign_flip_p


def run(right, wrong, both=0, neither=0):
    """Return a run of one seed before and after in which images were won and lost."""
    before = [False] * right + [True] * wrong + [True] * both + [False] * neither
    after = [True] * right + [False] * wrong + [True] * both + [False] * neither
    return np.array([before]), np.array([after])


def binomial_two_sided(gained, lost):
    """McNemar's exact test as textbooks write it."""
    discordant, few = gained + lost, min(gained, lost)
    tail = sum(math.comb(discordant, k) for k in range(few + 1)) / 2**discordant
    return min(1.0, 2 * tail)


@pytest.mark.parametrize(
    ("gained", "lost", "expected"),
    [
        (0, 0, 1.0),
        (0, 5, 2 / 32),
        (6, 0, 2 / 64),
        (3, 3, 1.0),
        (1, 8, 2 * (1 + 9) / 512),
    ],
)
def test_one_seed_is_mcnemar_by_hand(gained, lost, expected):
    found = paired_difference(*run(gained, lost, both=80))

    assert found.p_value == pytest.approx(expected, rel=1e-12)
    assert (found.gained, found.lost) == (gained, lost)


@pytest.mark.parametrize(("gained", "lost"), [(40, 61), (210, 190), (0, 700), (1200, 1100)])
def test_large_counts_are_mcnemar_too(gained, lost):
    gains = np.array([1] * gained + [-1] * lost)

    assert sign_flip_p(gains) == pytest.approx(binomial_two_sided(gained, lost), rel=1e-9)


def test_several_seeds_by_trying_every_sign():
    gains = np.array([3, -1, 2, 2, -1, 0, 1, 3])
    sizes = np.abs(gains[gains != 0])
    sums = [np.dot(signs, sizes) for signs in itertools.product((-1, 1), repeat=len(sizes))]

    expected = np.mean(np.abs(sums) >= gains.sum())

    assert sign_flip_p(gains) == pytest.approx(expected, rel=1e-12)


def test_gains_over_seeds_are_counted_for_each_image():
    before = np.array([[1, 0, 0, 1], [1, 0, 1, 1]], dtype=bool)
    after = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=bool)

    found = paired_difference(before, after)

    # Gains 0, +2, 0 (one seed won, one lost) and -2.
    assert (found.images, found.gained, found.lost) == (4, 1, 1)
    assert found.difference_pp == 0.0
    assert found.p_value == pytest.approx(1.0)


def test_interval_by_hand():
    """Bonett and Price: (b + 1) and (c + 1) of n + 2 images."""
    found = paired_difference(*run(2, 12, both=84, neither=2))

    share, variance = (3 - 13) / 102, (3 + 13) / 102 - ((3 - 13) / 102) ** 2
    reach = 1.959964 * math.sqrt(variance / 102)
    assert found.difference_pp == pytest.approx(-10.0)
    assert found.low_pp == pytest.approx(100 * (share - reach))
    assert found.high_pp == pytest.approx(100 * (share + reach))


def test_interval_does_not_close_where_no_image_changed():
    found = paired_difference(*run(0, 0, both=50, neither=50))

    assert found.difference_pp == 0.0
    assert found.low_pp == pytest.approx(-found.high_pp)
    assert 1.0 < found.high_pp < 4.0


def test_interval_stays_within_what_is_possible():
    found = paired_difference(*run(10, 0))

    assert found.high_pp == found.difference_pp == 100.0


@pytest.mark.parametrize(("seeds", "images"), [(1, 200), (3, 200), (1, 1000)])
def test_interval_holds_the_truth_and_the_test_is_not_fooled(seeds, images):
    """Images differ in difficulty, so seeds of one image are alike."""
    generator = np.random.default_rng(0)
    held, alarms, trials = 0, 0, 400
    for _ in range(trials):
        ease = generator.beta(4, 1, images)
        draws = generator.random((3, seeds, images))
        same = draws[0] < ease, draws[1] < ease
        alarms += paired_difference(*same).significant
        worse = draws[2] < ease - 0.05 * ease  # E[ease] = 0.8: four points fewer
        found = paired_difference(same[0], worse)
        held += found.low_pp <= -4.0 <= found.high_pp

    assert held / trials >= 0.93
    assert alarms / trials <= 0.06


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 4), (1, 5)), ((2, 4), (1, 4)), ((1, 0), (1, 0)), ((4,), (4,))],
)
def test_runs_that_do_not_belong_together_are_refused(before, after):
    with pytest.raises(ValueError, match="expected equal shapes"):
        paired_difference(np.ones(before, dtype=bool), np.ones(after, dtype=bool))


def test_interval_of_a_share_by_hand():
    outcomes = np.array([[True] * 8 + [False] * 2])

    low, high = mean_interval(outcomes)

    share = 10 / 14
    reach = 1.959964 * math.sqrt(share * (1 - share) / 14)
    assert (low, high) == pytest.approx((100 * (share - reach), 100 * (share + reach)))


def test_interval_of_a_share_stays_within_0_and_100():
    assert mean_interval(np.ones((2, 50), dtype=bool))[1] == 100.0
    assert mean_interval(np.zeros((2, 50), dtype=bool))[0] == 0.0
