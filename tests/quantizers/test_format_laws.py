"""The law of every format: what ``forward`` gives is what the codes say, bit for bit."""

import itertools

import pytest
import torch

from vitcompress.errors import ConfigError
from vitcompress.quantizers import (
    FORMATS,
    PerChannel,
    PerGroup,
    PerHead,
    PerTensor,
    QuantSpec,
    make_quantizer,
)

GRANULARITIES = (PerTensor(), PerChannel(0), PerChannel(-1), PerHead(1), PerGroup(4))
SPECS = [
    QuantSpec(
        bits=bits, format=name, symmetric=symmetric, granularity=granularity, strict=strict
    )
    for name, granularity, bits, symmetric, strict in itertools.product(
        FORMATS, GRANULARITIES, (2, 3, 4, 7, 8), (False, True), (True, False)
    )
    if name == "affine" or not symmetric
]


def calibrated(spec, values):
    quantizer = make_quantizer(spec, "test")
    groups = spec.granularity.group(values)
    shape = spec.granularity.parameter_shape(tuple(values.shape))
    low, high = torch.aminmax(groups, dim=1)
    quantizer.set_range(low.clamp(max=0.0).reshape(shape), high.reshape(shape))
    return quantizer


def values_for(spec):
    # Eight images, two heads, three tokens, four channels; logarithms want [0, 1].
    values = torch.randn(8, 2, 3, 4)
    return values if spec.format == "affine" else values.abs().clamp(max=1.0)


def describe(spec):
    return f"{spec.describe()}-{spec.granularity}".replace(" ", "-")


@pytest.mark.parametrize("spec", SPECS, ids=describe)
def test_forward_is_dequantized_codes_bit_for_bit(spec):
    values = values_for(spec)
    quantizer = calibrated(spec, values)

    codes = quantizer.quantize(values)

    assert torch.equal(quantizer(values), quantizer.dequantize(codes))
    assert codes.shape == values.shape
    if spec.strict:
        assert codes.dtype in (torch.uint8, torch.int8)


@pytest.mark.parametrize("spec", SPECS[::3], ids=describe)
def test_quantizing_twice_changes_nothing(spec):
    values = values_for(spec)
    quantizer = calibrated(spec, values)

    once = quantizer(values)

    torch.testing.assert_close(quantizer(once), once, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_strict_affine_tensor_has_at_most_two_to_the_bits_values(bits, symmetric):
    quantizer = make_quantizer(QuantSpec(bits=bits, symmetric=symmetric), "test")
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(2.0))

    found = quantizer(torch.linspace(-5.0, 5.0, 20001))

    assert len(found.unique()) <= 2**bits
    assert quantizer.levels() == 2**bits
    assert quantizer.defect() is None


@pytest.mark.parametrize("name", ["log2", "log_sqrt2"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_log_format_has_two_to_the_bits_values_with_zero_and_one_more_if_not_strict(
    name, bits
):
    values = torch.cat([torch.logspace(-8.0, 0.0, 5001), torch.zeros(1)])

    counts = {}
    for strict in (True, False):
        quantizer = make_quantizer(QuantSpec(bits=bits, format=name, strict=strict), "test")
        quantizer.set_range(torch.tensor(0.0), torch.tensor(1.0))
        counts[strict] = len(quantizer(values).unique())
        assert quantizer.levels() == counts[strict]
        assert (quantizer.defect() is None) is strict

    assert counts == {True: 2**bits, False: 2**bits + 1}


def test_a_fractional_zero_point_gives_one_level_more_and_is_a_defect():
    quantizer = make_quantizer(QuantSpec(bits=4, strict=False), "test")
    quantizer.load(scale=torch.tensor(0.2), zero_point=torch.tensor(5.3))

    found = quantizer(torch.linspace(-5.0, 5.0, 20001))

    assert len(found.unique()) == 17
    assert quantizer.levels() == 17
    assert "not a whole number" in quantizer.defect()


def test_a_zero_point_outside_the_codes_is_a_defect():
    quantizer = make_quantizer(QuantSpec(bits=4), "test")
    quantizer.set_range(torch.tensor(1.0), torch.tensor(2.0))

    assert quantizer.defect() == "zero point -15 outside [0, 15]"


def test_a_quantizer_without_parameters_refuses_to_run():
    quantizer = make_quantizer(QuantSpec(bits=4), "blocks.0:input")

    assert not quantizer.calibrated
    with pytest.raises(ConfigError, match=r"blocks\.0:input: quantizer has no parameters yet"):
        quantizer(torch.zeros(3))


def test_load_refuses_wrong_names_and_values_that_are_not_finite():
    quantizer = make_quantizer(QuantSpec(bits=4), "site")

    with pytest.raises(ConfigError, match=r"expected parameters \['scale', 'zero_point'\]"):
        quantizer.load(scale=torch.tensor(1.0))
    with pytest.raises(ConfigError, match="site: scale holds values that are not finite"):
        quantizer.load(scale=torch.tensor(float("nan")), zero_point=torch.tensor(0.0))


def test_a_frozen_quantizer_only_dequantizes():
    weight = torch.randn(4, 6)
    quantizer = calibrated(QuantSpec(bits=4, granularity=PerChannel(0)), weight)
    expected, codes = quantizer(weight), quantizer.quantize(weight)

    quantizer.frozen = True

    assert torch.equal(quantizer(codes), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES[1:], ids=str)
def test_each_set_of_parameters_serves_its_own_values(granularity):
    values = torch.randn(8, 2, 3, 4)
    quantizer = calibrated(QuantSpec(bits=4, granularity=granularity), values)

    groups = granularity.group(values)
    expected = torch.stack([calibrated(QuantSpec(bits=4), group)(group) for group in groups])

    assert torch.equal(granularity.group(quantizer(values)), expected)
    assert quantizer.scale.numel() == len(groups)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_trial_range_gives_what_the_quantizer_would(name, granularity):
    values = torch.rand(8, 2, 3, 4)
    spec = QuantSpec(bits=4, format=name, granularity=granularity)
    quantizer = calibrated(spec, values)
    groups = granularity.group(values)
    low, high = torch.aminmax(groups, dim=1)

    trial = make_quantizer(spec, "trial").approximate(groups, low.clamp(max=0.0), high)

    assert torch.equal(trial, granularity.group(quantizer(values)))


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ConfigError, match="bits must be between 2 and 8"):
        QuantSpec(bits=bits)


@pytest.mark.parametrize("spec", SPECS[::7], ids=describe)
def test_a_spec_survives_its_dict(spec):
    fields = spec.to_dict()

    assert QuantSpec.from_dict(fields) == spec
    assert isinstance(fields["granularity"]["kind"], str)


@pytest.mark.parametrize(
    "change",
    [
        {"granularity": {"kind": "per_row"}},
        {"granularity": None},
        {"bits": 1},
        {"bits": "four"},
        {"speed": 3},
    ],
    ids=str,
)
def test_a_damaged_spec_is_refused(change):
    fields = {**QuantSpec(bits=4).to_dict(), **change}

    with pytest.raises(ConfigError):
        QuantSpec.from_dict(fields)


def test_a_group_size_that_does_not_divide_a_row_is_refused():
    with pytest.raises(ConfigError, match="group size 64 does not divide a weight row of 48"):
        PerGroup(64).parameter_shape((10, 48))


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="site: unknown format 'log3'; known"):
        make_quantizer(QuantSpec(bits=4, format="log3"), "site")


def test_descriptions_are_short_and_say_what_is_loose():
    assert QuantSpec(bits=4, granularity=PerGroup(32)).describe() == "u4 per_group(32)"
    assert QuantSpec(bits=8, symmetric=True).describe() == "s8 per_tensor"
    loose = QuantSpec(bits=4, format="log_sqrt2", strict=False)
    assert loose.describe() == "log_sqrt2:4 per_tensor (not strict)"
