import math

import pytest
import torch

from vitcompress.numerics.metrics import cosine, kl_divergence, sqnr_db


def test_sqnr_by_hand():
    assert sqnr_db(100.0, 1.0) == pytest.approx(20.0)
    assert sqnr_db(1.0, 0.0) == math.inf
    assert sqnr_db(0.0, 1.0) == -math.inf


def test_cosine_by_hand():
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(
        0.5**0.5
    )
    assert cosine(torch.tensor([[2.0]]), torch.tensor([[-3.0]])) == pytest.approx(-1.0)
    assert cosine(torch.zeros(3), torch.ones(3)) == 1.0


def test_kl_divergence_by_hand():
    reference = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    found = torch.tensor([[math.log(3.0), 0.0], [5.0, 6.0]])

    divergence = kl_divergence(reference, found)

    # (1/2, 1/2) against (3/4, 1/4); a constant added to all logits changes nothing.
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    torch.testing.assert_close(divergence, torch.tensor([expected, 0.0], dtype=torch.float64))
