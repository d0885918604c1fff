"""SULQ; item numbers are those of the method's test list."""

import math

import pytest
import torch

from vitcompress.numerics.shifted_log import (
    SHIFTS,
    last_code,
    shifted_log_codes,
    shifted_log_values,
)
from vitcompress.quantizers import QuantSpec, make_quantizer

POWERS = tuple(2.0**-k for k in range(1, 21))


def made(shift, bits=4, strict=True, least=0.0, largest=1.0):
    """Return the quantizer for values from 0 to 1."""
    quantizer = make_quantizer(QuantSpec(bits=bits, format="sulq", strict=strict), "probs")
    quantizer.load(
        shift=torch.tensor(shift),
        low=torch.log2(torch.tensor(least + shift)),
        high=torch.log2(torch.tensor(largest + shift)),
    )
    return quantizer


def attention(spread, images=2, heads=2, tokens=50, size=16, seed=0):
    """Return probabilities of a given logit spread, and the values they weigh."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(images, heads, tokens, tokens, generator=generator)
    values = torch.randn(images, heads, tokens, size, generator=generator)
    return torch.softmax(logits, dim=-1), values


def test_codes_and_values_by_hand():
    shift, low, high = torch.tensor(0.25), torch.tensor(-2.0), torch.tensor(1.0)
    x = torch.tensor([0.0, 0.25, 0.75, 1.75, 9.0])

    codes = shifted_log_codes(x, shift, low, high, steps=3)

    # log2(x + 1/4) = -2, -1, 0, 1, 3.2 in steps of 1 from -2.
    assert codes.tolist() == [0.0, 1.0, 2.0, 3.0, 3.0]
    values = shifted_log_values(codes, shift, low, high, steps=3)
    assert values.tolist() == [0.0, 0.25, 0.75, 1.75, 1.75]


# Item 1: the code book


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("shift", [*SHIFTS, *POWERS])
def test_a_strict_table_holds_as_many_shifted_powers_as_the_bits_do(bits, shift):
    quantizer = made(shift, bits)

    table = quantizer.table()

    assert len(table) == quantizer.levels() == 2**bits
    assert bool((table.diff() >= 0).all())
    exponents = torch.log2(table.double() + shift)
    assert (exponents - exponents.round()).abs().max() < 1e-2 * 2**-20 / shift + 1e-5
    steps = torch.arange(2**bits) * (quantizer.high - quantizer.low) / (2**bits - 1)
    expected = torch.round(steps + quantizer.low).unique()
    assert len(table.unique()) == len(expected)
    assert quantizer.defect() is None


def test_a_shift_of_a_thousandth_gives_eleven_values_at_four_bits():
    assert len(made(0.001).table().unique()) == 11


def test_the_published_form_has_one_code_more_than_its_bits_hold():
    strict, published = made(0.001, bits=3), made(0.001, bits=3, strict=False)
    x = torch.rand(20000).pow(8)

    assert len(strict.quantize(x).unique()) == 8
    assert len(published.quantize(x).unique()) == 9
    assert last_code(3, strict=False) == 8
    assert published.defect() == "9 levels, 3 bits hold 8"


# Item 2: zero


@pytest.mark.parametrize("shift", POWERS)
@pytest.mark.parametrize("least", [0.0, 1e-7])
def test_zero_stays_zero_where_the_shift_is_a_power_of_two(shift, least):
    quantizer = made(shift, least=least if shift > 1e-4 else 0.0)

    assert quantizer(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_zero_moves_where_it_is_not():
    found = made(0.005)(torch.zeros(1)).item()

    assert found == pytest.approx(2.0 ** round(math.log2(0.005)) - 0.005)
    assert found == pytest.approx(-0.0011, abs=1e-4)


# Item 3: the shift form


def test_a_product_is_one_of_powers_less_the_shift_times_a_sum():
    probs, values = attention(2.0)
    quantizer = made(2.0**-6)
    powers = quantizer(probs) + quantizer.shift

    found = powers @ values - quantizer.shift * values.sum(dim=-2, keepdim=True)

    expected = quantizer(probs) @ values
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


# Item 4: the search


def judged(probs, values, shift, bits=4):
    """Return the error of a product, computed anew."""
    low, high = torch.log2(probs.amin() + shift), torch.log2(probs.amax() + shift)
    step = (high - low) / (2**bits - 1)
    codes = torch.round((torch.log2(probs + shift) - low) / step).clamp(0, 2**bits - 1)
    approximated = 2.0 ** torch.round(codes * step + low) - shift
    return (approximated @ values - probs @ values).square().mean().item()


def test_the_search_finds_the_candidate_of_least_error():
    chosen = {}
    for spread in (1.0, 4.0):
        probs, values = attention(spread)
        quantizer = make_quantizer(QuantSpec(bits=4, format="sulq"), "probs")

        quantizer.search(probs, lambda p, v=values: p @ v)

        errors = {s: judged(probs, values, s) for s in (*SHIFTS, *POWERS)}
        chosen[spread] = quantizer.shift.item()
        nearest = min(errors, key=lambda s: abs(s - chosen[spread]))
        assert errors[nearest] <= min(errors.values()) * (1 + 1e-4)
    assert chosen[1.0] != chosen[4.0]


def test_the_published_search_looks_at_the_probabilities_and_the_published_list():
    probs, values = attention(4.0)
    published = make_quantizer(QuantSpec(bits=4, format="sulq", strict=False), "probs")

    errors = published.search(probs, lambda p: p @ values)

    assert len(errors) == len(SHIFTS)
    assert published.shift.item() in torch.tensor(SHIFTS).tolist()
    again = make_quantizer(QuantSpec(bits=4, format="sulq", strict=False), "probs")
    assert again.search(probs, None) == errors


def test_the_range_is_that_of_the_shifted_logarithm():
    probs, _ = attention(2.0)
    quantizer = make_quantizer(QuantSpec(bits=4, format="sulq"), "probs")

    quantizer.search(probs, None)

    assert quantizer.low == torch.log2(probs.amin() + quantizer.shift)
    assert quantizer.high == torch.log2(probs.amax() + quantizer.shift)


def test_a_range_alone_gives_as_many_octaves_as_codes():
    quantizer = make_quantizer(QuantSpec(bits=3, format="sulq"), "probs")

    quantizer.set_range(torch.tensor(0.0), torch.tensor(1.0))

    assert quantizer.shift.item() == 2.0**-7
    assert quantizer(torch.zeros(1)).item() == 0.0
    wide = make_quantizer(QuantSpec(bits=8, format="sulq"), "probs")
    wide.set_range(torch.tensor(0.0), torch.tensor(1.0))
    assert wide.shift.item() == 2.0**-20


def test_a_constant_tensor_has_one_code():
    quantizer = make_quantizer(QuantSpec(bits=4, format="sulq"), "probs")
    quantizer.search(torch.full((2, 3), 0.5), None)

    assert quantizer.quantize(torch.full((4,), 0.5)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("other", ["affine", "log_sqrt2"])
def test_at_three_bits_attention_to_many_is_kept_better_than_by_other_formats(other):
    probs, values = attention(1.0)
    sulq = make_quantizer(QuantSpec(bits=3, format="sulq"), "probs")
    plain = make_quantizer(QuantSpec(bits=3, format=other), "probs")

    sulq.search(probs, lambda p: p @ values)
    plain.set_range(torch.tensor(0.0), probs.amax())

    error = (sulq(probs) @ values - probs @ values).square().mean()
    assert error < 0.5 * (plain(probs) @ values - probs @ values).square().mean()
