"""AdaLog: the published table, strict codes, the shift, and a base that calibration finds."""

import math

import pytest
import torch
from tiny import images, run_steps, tiny_vit

from vitcompress.artifact import StoredModel, read_artifact, write_artifact
from vitcompress.calibration import Histogram, RangeConfig, fit_range
from vitcompress.errors import ConfigError
from vitcompress.export.onnx import export_onnx
from vitcompress.graph import capture
from vitcompress.numerics.adaptive_log import adaptive_log_codes, adaptive_log_table
from vitcompress.numerics.nonuniform import log_codes, log_table
from vitcompress.passes.base import quantizers_of
from vitcompress.quantizers import PerChannel, QuantSpec, make_quantizer
from vitcompress.quantizers.adalog import AdaLog

GELU_SHIFT = 0.17


def adalog(bits=4, **spec):
    return AdaLog(QuantSpec(bits=bits, format="adalog", **spec), "blocks.0.fc2:input")


def loaded(scale, numerator, shift=0.0, bits=4, **spec):
    quantizer = adalog(bits, **spec)
    values = {"scale": scale, "numerator": float(numerator), "shift": shift}
    quantizer.load(**{name: torch.tensor(value) for name, value in values.items()})
    return quantizer


@pytest.fixture(scope="module")
def probabilities():
    generator = torch.Generator().manual_seed(0)
    return torch.softmax(2.0 * torch.randn(12, 197, 197, generator=generator), dim=-1)


@pytest.fixture(scope="module")
def short_rows():
    """Attention over few tokens: little of it is small, so that finer powers are better."""
    generator = torch.Generator().manual_seed(0)
    return torch.softmax(torch.randn(500, 17, 17, generator=generator), dim=-1)


@pytest.fixture(scope="module")
def activations():
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.gelu(1.5 * torch.randn(4096, 64, generator=generator) - 0.5)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_numerator_37_is_the_log2_quantizer(probabilities, bits, strict):
    scale = torch.tensor(0.9)

    found = adaptive_log_codes(
        probabilities, scale, torch.tensor(37.0), bits=bits, strict=strict
    )

    expected = log_codes(probabilities, scale, bits=bits, steps_per_octave=1, strict=strict)
    assert (found != expected).float().mean() < 1e-5  # exact ties
    table = adaptive_log_table(37, bits=bits, strict=strict)
    assert torch.equal(table, log_table(bits=bits, steps_per_octave=1, strict=strict))


@pytest.mark.parametrize("numerator", [10, 18, 29, 37, 52, 138])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_table_is_shifts_of_mantissas_rounded_to_one_bit_more(bits, numerator):
    table = adaptive_log_table(numerator, bits=bits, strict=True)

    largest = 2 ** (bits + 1) - 2
    for code in range(2**bits - 1):
        octaves = code * numerator / 37
        mantissa = round(2 ** -(octaves % 1.0) * largest) / largest
        assert table[code].item() == pytest.approx(2 ** -math.floor(octaves) * mantissa)
    assert table[-1] == 0.0


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_strict_codes_are_b_bits_and_the_published_ones_are_not(probabilities, bits):
    for strict in (True, False):
        quantizer = loaded(1.0, 20, bits=bits, strict=strict)

        codes = quantizer.quantize(torch.cat([probabilities.flatten(), torch.zeros(1)]))

        assert codes.max() == 2**bits - int(strict)
        assert quantizer.levels() == 2**bits + (not strict)
        assert (quantizer.defect() is None) is strict


def test_values_survive_the_shift_both_ways():
    quantizer = loaded(5.0, 18, GELU_SHIFT)
    x = torch.tensor([-GELU_SHIFT, 5.0 - GELU_SHIFT, 9.0])

    found = quantizer(x)

    torch.testing.assert_close(
        found, torch.tensor([-GELU_SHIFT, 5.0 - GELU_SHIFT, 5.0 - GELU_SHIFT])
    )


def test_the_table_less_the_shift_equals_the_shift_folded_into_the_readers_bias(activations):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, 64, generator=generator)
    bias = torch.randn(32, generator=generator)
    scale = float(activations.max()) + GELU_SHIFT
    quantizer, unshifted = loaded(scale, 18, GELU_SHIFT), loaded(scale, 18)

    found = quantizer(activations) @ weight.T + bias

    positive = unshifted(activations + GELU_SHIFT)
    folded = positive @ weight.T + (bias - GELU_SHIFT * weight.sum(dim=1))
    assert (found - folded).abs().max() < 1e-5 * folded.abs().max()


def test_the_table_holds_what_each_code_means(activations):
    quantizer = loaded(6.0, 21, GELU_SHIFT)

    codes = quantizer.quantize(activations)

    assert len(quantizer.table()) == 16
    assert torch.equal(quantizer.table()[codes.long()], quantizer(activations))


def relative(quantizer, x):
    return float((quantizer(x) - x).square().sum() / x.square().sum())


def errors_of_formats(x):
    errors = {}
    for name in ("adalog", "affine", "log2", "log_sqrt2"):
        quantizer = make_quantizer(QuantSpec(bits=4, format=name), "site")
        histogram = Histogram()
        histogram.update(x)
        values, counts = histogram.result()
        fit_range(quantizer, values, RangeConfig(method="mse"), counts=counts)
        errors[name] = relative(quantizer, x)
    return errors


@pytest.mark.parametrize("kind", ["short_rows", "activations"])
def test_a_fitted_base_beats_uniform_and_both_fixed_bases_at_4_bits(kind, request):
    errors = errors_of_formats(request.getfixturevalue(kind))

    best_other = min(error for name, error in errors.items() if name != "adalog")
    assert errors["adalog"] < 0.8 * best_other


def test_where_a_fixed_base_is_best_a_fitted_one_is_hardly_worse(probabilities):
    # Mantissas of b + 1 bits cost a little, and 18.5 / 37 is no base of this format.
    errors = errors_of_formats(probabilities)

    assert errors["log_sqrt2"] == min(errors.values())
    assert errors["adalog"] < 1.05 * errors["log_sqrt2"]


def test_fitting_finds_the_base_that_made_the_values():
    truth = loaded(2.0, 26)
    x = truth.table()[:-1].repeat(50)
    quantizer = adalog()

    fit_range(quantizer, x, RangeConfig(method="minmax"))

    assert float(quantizer.numerator) == 26.0
    assert float(quantizer.scale) == 2.0


def test_one_base_serves_all_groups():
    spec = QuantSpec(bits=4, format="adalog", granularity=PerChannel(0))
    quantizer = make_quantizer(spec, "site")
    ones = torch.ones(2)

    quantizer.load(scale=ones, numerator=20.0 * ones, shift=0.0 * ones)
    with pytest.raises(ConfigError, match="one whole numerator for all groups"):
        quantizer.load(scale=ones, numerator=torch.tensor([20.0, 21.0]), shift=ones)
    with pytest.raises(ConfigError, match="whole numerator"):
        quantizer.load(scale=ones, numerator=20.5 * ones, shift=ones)


RULES = [
    {"roles": ["weight"], "bits": 8, "granularity": "per_channel"},
    {"roles": ["norm_output", "proj_input", "head_input"], "bits": 8},
    {"roles": ["probs", "act_output"], "bits": 4, "format": "adalog"},
    {"roles": ["query", "key", "value"], "bits": 8},
]
STEPS = [
    {"pass": "attach", "rules": RULES},
    {"pass": "calibrate"},
    {"pass": "integer_bias"},
    {"pass": "freeze"},
]


@pytest.fixture(scope="module")
def finished(source):
    graph = capture(tiny_vit(depth=1), images(2))
    return run_steps(STEPS, graph, source)[0]


def test_the_exported_table_and_codes_are_the_quantizers(finished, source, tmp_path):
    x = torch.cat([batch.images for batch in source])

    result = export_onnx(finished, tmp_path / "model.onnx", x)

    # Behind softmax and GELU: their readers multiply floats, all others integers.
    assert result.verification.code_mismatch < 1e-3
    assert result.verification.in_step_cosine > 0.99999
    assert set(result.verification.float_linears) == {"blocks.0.fc2"}
    assert "adalog:4" in result.verification.float_linears["blocks.0.fc2"]


def test_an_artefact_keeps_base_and_shift(finished, tmp_path):
    write_artifact(tmp_path / "a", StoredModel(finished, {}, {}), overwrite=False)

    again = read_artifact(tmp_path / "a").graph

    before, after = (
        {q.site: q for q in quantizers_of(g).values() if isinstance(q, AdaLog)}
        for g in (finished, again)
    )
    assert set(before) == set(after)
    assert set(before) == {"blocks.0.attn:probs", "blocks.0.fc2:input"}
    for site, quantizer in before.items():
        for name in quantizer.parameter_names:
            assert torch.equal(getattr(quantizer, name), getattr(after[site], name))
    assert float(before["blocks.0.fc2:input"].shift) > 0.1
