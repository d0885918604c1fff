import math

import pytest
import torch

from vitcompress.numerics.nonuniform import log_codes, log_table, parity_table


def codes(x, scale=1.0, *, bits=4, steps=2, strict=True):
    x, scale = torch.tensor(x), torch.tensor(scale)
    return log_codes(x, scale, bits=bits, steps_per_octave=steps, strict=strict).tolist()


def test_codes_by_hand():
    assert codes([1.0, 0.5, 0.25, 0.125], steps=1) == [0.0, 1.0, 2.0, 3.0]
    assert codes([1.0, 0.5**0.5, 0.5, 0.25], steps=2) == [0.0, 1.0, 2.0, 4.0]
    assert codes([0.4, 0.2], scale=0.4, steps=1) == [0.0, 1.0]


def test_values_above_the_scale_saturate_to_it():
    assert codes([0.5, 7.0], scale=0.4, steps=1) == [0.0, 0.0]


@pytest.mark.parametrize(("strict", "zero_code"), [(True, 15.0), (False, 16.0)])
def test_zero_negative_and_tiny_values_get_the_zero_code(strict, zero_code):
    assert codes([0.0, -0.1, 1e-30], strict=strict) == [zero_code] * 3


def test_the_cut_off_lies_where_the_last_power_would_be_rounded_to():
    # Strict, 3 bits, log-sqrt(2): codes 0 to 6 are powers, 7 is zero. Half a step is 2^(-1/4).
    edge = 2 ** (-6.5 / 2)

    assert codes([edge * 1.01, edge * 0.99], bits=3) == [6.0, 7.0]


def test_no_epsilon_changes_the_code_of_small_values():
    powers = [2.0**-k for k in range(0, 120)]

    assert codes(powers, bits=8, steps=2) == [float(min(2 * k, 255)) for k in range(0, 120)]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_table_holds_the_powers_and_zero_last(bits, steps, strict):
    table = log_table(bits=bits, steps_per_octave=steps, strict=strict)
    powers = 2**bits - 1 if strict else 2**bits
    expected = [2.0 ** (-q / steps) for q in range(powers)] + [0.0]

    assert len(table) == powers + 1
    torch.testing.assert_close(table, torch.tensor(expected), rtol=2e-7, atol=0.0)


def test_an_odd_code_is_a_ceil_power_times_sqrt_two():
    table = log_table(bits=4, steps_per_octave=2, strict=True)

    assert table[3].item() == pytest.approx(2**-1.5)
    assert table[3].item() != pytest.approx(2**-2 / math.sqrt(2))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.9973, 0.37, 3e-3])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_parity_form_equals_the_table_bit_for_bit(bits, scale, strict):
    scale = torch.tensor(scale)

    table = log_table(bits=bits, steps_per_octave=2, strict=strict) * scale

    assert torch.equal(parity_table(scale, bits=bits, strict=strict), table)


def test_parity_form_equals_the_table_on_normal_numbers_at_8_bits():
    scale = torch.tensor(0.37)
    table = log_table(bits=8, steps_per_octave=2, strict=True) * scale
    normal = table >= torch.finfo(torch.float32).tiny

    assert normal.sum() > 240
    assert torch.equal(parity_table(scale, bits=8, strict=True)[normal], table[normal])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoded_codes_are_the_nearest_power_in_the_logarithm(bits):
    x = torch.rand(2000) * 0.999 + 0.001
    table = log_table(bits=bits, steps_per_octave=2, strict=True)

    found = log_codes(x, torch.tensor(1.0), bits=bits, steps_per_octave=2, strict=True)

    kept = found < 2**bits - 1
    octaves = (torch.log2(table[found[kept].long()]) - torch.log2(x[kept])).abs()
    assert octaves.max() <= 0.25 + 1e-5
