"""GPTQ and the ridge steps of ERQ, as maths: what each promises, on cases worked by hand."""

import itertools

import pytest
import torch

from vitcompress.numerics.rounding import (
    Grid,
    activation_correction,
    damped,
    gptq,
    halving_rounds,
    refined_rounding,
    weight_correction,
)

OUT, IN = 6, 24


def grid_for(weight, bits=3, symmetric=False):
    high = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    low = -(2 ** (bits - 1)) if symmetric else 0
    scale = (weight.amax(dim=1) - weight.amin(dim=1)) / (2**bits - 1)
    point = torch.zeros(len(weight)) if symmetric else torch.round(-weight.amin(dim=1) / scale)
    shape = weight.shape
    return Grid(
        scale[:, None].double().expand(shape), point[:, None].double().expand(shape), low, high
    )


def correlated(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, IN, generator=torch.Generator().manual_seed(7))
    latent = torch.randn(rows, 8, generator=generator)
    noise = torch.randn(rows, IN, generator=generator)
    return (latent @ mixing + 0.2 * noise + 0.5).double()


@pytest.fixture
def weight():
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def data():
    return correlated(500, 2)


@pytest.fixture
def moment(data):
    return data.T @ data / len(data)


def error(difference, x):
    return float((x @ difference.T).square().mean())


# GPTQ


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_with_a_diagonal_hessian_is_nearest_rounding_bit_for_bit(weight, symmetric):
    grid = grid_for(weight, symmetric=symmetric)
    hessian = torch.diag(torch.rand(IN, dtype=torch.float64) + 0.1)

    found = gptq(weight, hessian, grid, columns=IN, descending=True)

    assert torch.equal(found, grid.nearest(weight, slice(None)))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("descending", [False, True])
def test_gptq_beats_nearest_rounding_on_seen_and_unseen_rows(
    weight, data, moment, symmetric, descending
):
    grid = grid_for(weight, symmetric=symmetric)
    unseen = correlated(500, 3)

    found = gptq(weight, damped(moment, 0.01, IN), grid, columns=IN, descending=descending)

    nearest = grid.nearest(weight, slice(None))
    for x in (data, unseen):
        assert error(found - weight, x) < 0.5 * error(nearest - weight, x)


def test_gptq_ends_exactly_on_the_grid_of_each_row(weight, moment):
    grid = grid_for(weight)

    found = gptq(weight, damped(moment, 0.01, IN), grid, columns=IN, descending=True)

    codes = found / grid.scale + grid.zero_point
    torch.testing.assert_close(codes, codes.round(), rtol=0.0, atol=1e-9)
    assert codes.min() > -1e-9
    assert codes.max() < 7 + 1e-9


def test_gptq_equals_the_textbook_recursion(weight, moment):
    # Optimal brain surgery, one column at a time, the inverse recomputed for what is left.
    grid, hessian = grid_for(weight), damped(moment, 0.05, IN)
    expected = weight.clone()
    for j in range(IN):
        inverse = torch.linalg.inv(hessian[j:, j:])
        rounded = grid.nearest(expected[:, j : j + 1], slice(j, j + 1))
        step = (expected[:, j : j + 1] - rounded) / inverse[0, 0]
        expected[:, j:] -= step * inverse[0]
        expected[:, j : j + 1] = rounded

    found = gptq(weight, hessian, grid, columns=IN, descending=False)

    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_a_bias_column_is_never_rounded_and_takes_the_constant_error(weight, data):
    x = torch.cat([data, torch.ones(len(data), 1)], dim=1)
    matrix = torch.cat([weight, torch.full((OUT, 1), 0.123).double()], dim=1)
    hessian = damped(x.T @ x / len(x), 0.01, IN)
    grid = grid_for(weight)

    found = gptq(matrix, hessian, grid, columns=IN, descending=True)

    codes = found[:, IN] / grid.scale[:, 0]
    assert (codes - codes.round()).abs().max() > 0.01
    shift = (x @ (found - matrix).T).mean(dim=0)
    without = (data @ (found - matrix)[:, :IN].T).mean(dim=0)
    assert shift.abs().max() < 0.1 * without.abs().max()


def test_a_channel_that_never_fires_is_rounded_by_itself(weight, data):
    silent = data.clone()
    silent[:, 5] = 0.0
    grid = grid_for(weight)

    found = gptq(
        weight, damped(silent.T @ silent / 500, 0.01, IN), grid, columns=IN, descending=True
    )

    assert torch.equal(found[:, 5], grid.nearest(weight[:, 5:6], slice(5, 6))[:, 0])


def test_damping_adds_a_share_of_the_mean_diagonal_of_the_weights_columns():
    moment = torch.diag(torch.tensor([4.0, 2.0, 0.0, 100.0], dtype=torch.float64))

    found = damped(moment, 0.5, 3)

    # The mean over three columns is 2; the silent one gets it once more.
    assert torch.diagonal(found).tolist() == [5.0, 3.0, 3.0, 101.0]


# ERQ


def quantized(x, step=0.5):
    return torch.round(x / step) * step


def test_an_infinite_ridge_leaves_the_weight_alone(weight, data):
    q = quantized(data)
    moment, lost = q.T @ q / len(q), q.T @ (data - q) / len(q)

    added = activation_correction(weight, moment, lost, 1e12)

    assert added.abs().max() < 1e-9


@pytest.mark.parametrize("strength", [1e-6, 0.01, 0.1, 1.0])
def test_the_activation_step_never_increases_the_error_it_sees(weight, data, strength):
    q = quantized(data, step=2.0)
    moment, lost = q.T @ q / len(q), q.T @ (data - q) / len(q)
    exact = data @ weight.T

    added = activation_correction(weight, moment, lost, strength)

    before = (exact - q @ weight.T).square().mean()
    after = (exact - q @ (weight + added).T).square().mean()
    assert after < before


def test_the_activation_step_recovers_a_shrunken_input(weight, data):
    # What a quantizer that halves its input loses, doubled weights give back.
    q = 0.5 * data
    moment, lost = q.T @ q / len(q), q.T @ (data - q) / len(q)

    added = activation_correction(weight, moment, lost, 1e-12)

    torch.testing.assert_close(added, weight, rtol=1e-5, atol=1e-5)


def test_each_compensation_lowers_the_error_given_the_columns_already_rounded(
    weight, data, moment
):
    grid = grid_for(weight, bits=2)
    everything = torch.arange(IN)
    current = weight.clone()
    for start, stop in halving_rounds(IN)[:-1]:
        rounded = grid.nearest(current[:, start:stop], slice(start, stop))
        change = rounded - current[:, start:stop]
        current[:, start:stop] = rounded
        before = error(current - weight, data)

        current[:, stop:] += weight_correction(
            change, moment, everything[start:stop], everything[stop:], 0.01
        )

        assert error(current - weight, data) < before


def test_an_infinite_ridge_compensates_nothing(moment):
    added = weight_correction(
        torch.ones(OUT, 4).double(), moment, torch.arange(4), torch.arange(4, IN), 1e12
    )

    assert added.abs().max() < 1e-9


def test_rounds_take_half_of_what_is_left_down_to_one():
    assert halving_rounds(9) == [(0, 4), (4, 6), (6, 7), (7, 8), (8, 9)]
    assert halving_rounds(1) == [(0, 1)]


def test_refinement_stays_with_the_two_neighbours_and_never_increases_the_error(
    weight, moment
):
    grid = grid_for(weight)
    nearest = grid.nearest(weight, slice(None))
    other = grid.other(weight, nearest, slice(None))

    def loss(rounded):
        d = rounded - weight
        return ((d @ moment) * d).sum(dim=1)

    losses = [loss(nearest)]
    for steps in range(1, 12):
        found = refined_rounding(weight, nearest, other, moment, steps)
        assert ((found == nearest) | (found == other)).all()
        losses.append(loss(found))

    for before, after in itertools.pairwise(losses):
        assert (after <= before + 1e-12).all()
    assert losses[-1].sum() < 0.8 * losses[0].sum()


def test_refinement_makes_the_one_move_that_helps():
    # Errors 0.4 and 0.4 of two copies of one input: one up, one down leaves 0.2.
    values = torch.tensor([[0.4, 0.4]], dtype=torch.float64)
    nearest, other = torch.zeros(1, 2).double(), torch.ones(1, 2).double()

    found = refined_rounding(values, nearest, other, torch.ones(2, 2).double(), 5)

    assert sorted(found[0].tolist()) == [0.0, 1.0]


def test_the_other_neighbour_lies_across_the_value_and_is_none_at_the_ends():
    grid = Grid(torch.ones(1, 3).double(), torch.zeros(1, 3).double(), 0, 3)
    values = torch.tensor([[1.2, 1.8, 5.0]], dtype=torch.float64)
    nearest = grid.nearest(values, slice(None))

    assert nearest.tolist() == [[1.0, 2.0, 3.0]]
    assert grid.other(values, nearest, slice(None)).tolist() == [[2.0, 1.0, 3.0]]
