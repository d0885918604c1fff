import pytest
import torch

from vitcompress.numerics.affine import (
    affine_parameters,
    code_bounds,
    dequantize_affine,
    quantize_affine,
    smallest_scale,
)


def quantize(x, scale, zero_point, qmin, qmax):
    scale, zero_point = torch.tensor(scale), torch.tensor(zero_point)
    return quantize_affine(torch.tensor(x), scale, zero_point, qmin=qmin, qmax=qmax).tolist()


def test_code_bounds_are_signed_when_symmetric():
    assert code_bounds(4, symmetric=False) == (0, 15)
    assert code_bounds(4, symmetric=True) == (-8, 7)
    assert code_bounds(8, symmetric=True) == (-128, 127)


def test_asymmetric_parameters_by_hand():
    low, high = torch.tensor([-1.0, 0.0, -3.0]), torch.tensor([2.0, 1.5, 0.0])

    scale, zero_point = affine_parameters(low, high, bits=4, symmetric=False)

    torch.testing.assert_close(scale, torch.tensor([0.2, 0.1, 0.2]))
    # rne(1 / 0.2), rne(0 / 0.1), rne(3 / 0.2)
    assert zero_point.tolist() == [5.0, 0.0, 15.0]


def test_symmetric_parameters_by_hand():
    low, high = torch.tensor([-1.0, -0.5]), torch.tensor([0.5, 3.5])

    scale, zero_point = affine_parameters(low, high, bits=4, symmetric=True)

    torch.testing.assert_close(scale, torch.tensor([1 / 7, 0.5]))
    assert zero_point.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_of_ranges_with_zero_are_codes(bits):
    low = -torch.rand(1000) * 10
    high = torch.rand(1000) * 10
    low[:10], high[10:20] = 0.0, 0.0

    _, zero_point = affine_parameters(low, high, bits=bits, symmetric=False)

    assert torch.equal(zero_point, zero_point.round())
    assert zero_point.min() >= 0
    assert zero_point.max() <= 2**bits - 1


def test_rounding_is_half_to_even_and_the_zero_point_is_added_afterwards():
    halves = [-1.5, -0.5, 0.5, 1.5, 2.5]

    # round(x) + 3; rounding the sum instead would give 2, 2, 4, 4, 6.
    assert quantize(halves, 1.0, 3.0, 0, 15) == [1.0, 3.0, 3.0, 5.0, 5.0]


def test_codes_are_clamped_to_both_ends():
    assert quantize([-100.0, 0.0, 100.0], 0.5, 5.0, 0, 15) == [0.0, 5.0, 15.0]


def test_dequantize_by_hand():
    values = dequantize_affine(
        torch.tensor([0.0, 5.0, 15.0]), torch.tensor(0.2), torch.tensor(5.0)
    )

    torch.testing.assert_close(values, torch.tensor([-1.0, 0.0, 2.0]))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("constant", [0.0, 1e-12, 0.3, -0.3, 1e4])
def test_constant_groups_stay_finite_and_keep_their_value(constant, symmetric):
    value = torch.full((5,), constant)
    low, high = value[:1], value[:1]

    scale, zero_point = affine_parameters(low, high, bits=8, symmetric=symmetric)
    codes = quantize_affine(value, scale, zero_point, qmin=-(10**9), qmax=10**9)
    found = dequantize_affine(codes, scale, zero_point)

    assert scale > 0
    assert torch.isfinite(found).all()
    # Half of the least scale is the most that rounding can cost.
    assert (found - value).abs().max() <= 0.51 * smallest_scale(value.abs().max()) + 1e-12


def test_a_group_of_zeros_has_scale_one_and_codes_zero():
    zeros = torch.zeros(1)

    for symmetric in (False, True):
        scale, zero_point = affine_parameters(zeros, zeros, bits=4, symmetric=symmetric)

        assert (scale.item(), zero_point.item()) == (1.0, 0.0)
