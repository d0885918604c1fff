import pytest
import torch

from vitcompress.numerics.search import best_candidate, shrunk_ranges, tail_quantiles

PROBABILITIES = (0.5, 0.9, 0.999, 0.9999, 0.99999, 1.0)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1001, 20000])
def test_tail_quantiles_equal_the_library_quantile(count):
    values = torch.randn(3, count) ** 3

    low, high = tail_quantiles(values, PROBABILITIES)

    p = torch.tensor(PROBABILITIES, dtype=torch.float64)
    expected_high = torch.quantile(values.double(), p, dim=1).float()
    expected_low = torch.quantile(values.double(), 1.0 - p, dim=1).float()
    # 1 - p is not exact, which moves a rank of 20000 by up to 1e-12.
    torch.testing.assert_close(high, expected_high, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(low, expected_low, rtol=1e-5, atol=1e-6)


def test_tail_quantiles_by_hand():
    low, high = tail_quantiles(torch.tensor([[3.0, 0.0, 1.0, 2.0, 4.0]]), (0.9,))

    # Rank 0.9 * 4 = 3.6 of the sorted values 0..4, and rank 0.4.
    torch.testing.assert_close(high, torch.tensor([[3.6]]))
    torch.testing.assert_close(low, torch.tensor([[0.4]]))


def test_a_few_hundred_values_are_in_effect_min_max():
    values = torch.randn(1, 300)

    _, high = tail_quantiles(values, (0.9999, 0.99999))

    second, first = values.sort().values[0, -2:]
    assert torch.all((high >= second) & (high <= first))


def test_shrunk_ranges_start_full_and_end_at_the_smallest():
    values = torch.tensor([[-1.0, 2.0], [0.0, 4.0]])

    low, high = shrunk_ranges(values, steps=3, smallest=0.25)

    torch.testing.assert_close(high, torch.tensor([[2.0, 4.0], [1.0, 2.0], [0.5, 1.0]]))
    torch.testing.assert_close(low, torch.tensor([[-1.0, 0.0], [-0.5, 0.0], [-0.25, 0.0]]))


def test_best_candidate_chooses_for_each_group_and_keeps_the_earlier_of_a_tie():
    high = torch.tensor([[3.0, 1.0], [1.0, 3.0], [1.5, 3.0]])
    low = -high
    losses = {3.0: 0.5, 1.0: 1.0, 1.5: 0.5}

    best_low, best_high, _ = best_candidate(
        low, high, lambda _, h: torch.tensor([losses[v] for v in h.tolist()])
    )

    assert best_high.tolist() == [3.0, 3.0]
    assert best_low.tolist() == [-3.0, -3.0]
