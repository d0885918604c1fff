"""Estimates of a Hessian that is known; the item numbers are those of the method's tests."""

import pytest
import torch

from vitcompress.numerics.curvature import DiagonalFit, RankOneFit, row_sums


def symmetric(size, seed=0):
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return matrix @ matrix.T / size


def test_the_fit_recovers_a_diagonal_hessian():
    diagonal = torch.rand(12) + 0.1
    errors = torch.randn(200, 12)
    fit = DiagonalFit()

    for batch in errors.split(32):
        fit.update(batch * diagonal, batch)

    torch.testing.assert_close(fit.result(), diagonal, rtol=1e-3, atol=0.0)


def test_noise_below_zero_counts_as_zero():
    fit = DiagonalFit()

    fit.update(torch.tensor([[1.0, -2.0]]), torch.tensor([[2.0, 1.0]]))

    assert fit.result().tolist() == [0.5, 0.0]


@pytest.mark.parametrize("hessian", [torch.diag(torch.rand(6) + 0.1), symmetric(6)])
def test_perturbation_gives_row_sums(hessian):
    z = torch.randn(40, 6)

    found = row_sums(lambda point: point @ hessian, z.split(16))

    torch.testing.assert_close(found, (hessian @ torch.ones(6)).abs(), rtol=1e-2, atol=1e-4)


def test_row_sums_are_not_the_diagonal_of_a_hessian_that_is_not_diagonal():
    hessian = symmetric(6)

    found = row_sums(lambda point: point @ hessian, [torch.randn(40, 6)])

    assert (found - hessian.diagonal()).abs().max() > 0.3 * hessian.diagonal().max()


def test_the_step_is_not_lost_beside_large_values():
    hessian = torch.diag(torch.rand(6) + 0.1)

    found = row_sums(lambda point: point @ hessian, [1000.0 + torch.randn(40, 6)])

    torch.testing.assert_close(found, hessian.diagonal(), rtol=1e-2, atol=0.0)


def test_the_rank_one_fit_recovers_its_vector_whatever_the_signs():
    u = torch.randn(10)
    errors = torch.randn(100, 10)
    fit = RankOneFit()

    for batch in errors.split(16):
        fit.update((batch @ u)[:, None] * u, batch)

    found = fit.result()
    torch.testing.assert_close(found * (found @ u).sign(), u, rtol=1e-4, atol=1e-5)


def test_samples_without_curvature_say_nothing():
    fit = RankOneFit()

    fit.update(torch.tensor([[1.0, 0.0], [4.0, 0.0]]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))

    assert fit.result().abs().tolist() == [2.0, 0.0]
