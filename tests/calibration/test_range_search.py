import pytest
import torch

from vitcompress.calibration import Histogram, RangeConfig, search_range
from vitcompress.errors import ConfigError, PassError
from vitcompress.quantizers import PerChannel, QuantSpec, make_quantizer


def quantizer(**spec):
    return make_quantizer(QuantSpec(**{"bits": 4, **spec}), "blocks.0.fc1:input")


def error(values, method, **spec):
    fitted = quantizer(**spec)
    fitted.set_range(*search_range(fitted, values, RangeConfig(method=method)))
    return float((fitted(values) - values).square().mean())


@pytest.fixture(scope="module")
def heavy_tailed():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 500, generator=generator) ** 3


def test_minmax_takes_the_extremes():
    low, high = search_range(
        quantizer(), torch.tensor([-1.0, 0.5, 3.0]), RangeConfig(method="minmax")
    )

    assert (low.item(), high.item()) == (-1.0, 3.0)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_mse_beats_minmax_on_heavy_tails(heavy_tailed, granularity):
    spec = {"granularity": PerChannel(0)} if granularity == "per_channel" else {}

    assert error(heavy_tailed, "mse", **spec) < 0.95 * error(heavy_tailed, "minmax", **spec)
    assert error(heavy_tailed, "percentile", **spec) < error(heavy_tailed, "minmax", **spec)


def test_mse_is_never_worse_than_minmax():
    for seed in range(5):
        values = torch.rand(100, generator=torch.Generator().manual_seed(seed))

        assert error(values, "mse") <= error(values, "minmax")


def test_percentile_search_keeps_the_clip_of_least_error_of_each_channel():
    values = torch.randn(2, 10001)
    # At 4 bits clipping an outlier pays while fewer than 1 / (12 * 4^4) of all values are one.
    values[0, :1] = 50.0
    values[1, :8] = 50.0
    config = RangeConfig(method="percentile", percentiles=(0.999, 0.99999))

    _, high = search_range(quantizer(granularity=PerChannel(0)), values, config)

    assert high[0] < 5.0
    assert high[1] == pytest.approx(50.0)


def test_one_percentile_is_taken_without_a_search(heavy_tailed):
    config = RangeConfig(method="percentile", percentiles=(0.9,))

    low, high = search_range(quantizer(), heavy_tailed, config)

    expected = torch.quantile(heavy_tailed.flatten(), torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(torch.stack([low, high]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_histogram_ranges_are_close_to_exact_ones(heavy_tailed, method):
    histogram = Histogram()
    for part in heavy_tailed.split(16):
        histogram.update(part)
    centres, counts = histogram.result()
    config = RangeConfig(method=method)

    found = search_range(quantizer(), centres, config, counts=counts)
    exact = search_range(quantizer(), heavy_tailed, config)

    # Bins are 0.4 % wide, and ranks of 32000 values are not interpolated.
    tolerance = 0.02 if method == "percentile" else 0.004
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=0.0)


def test_output_mse_weighs_what_the_reader_makes_of_the_error():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, 4, generator=generator)
    values[:, 3] *= 20.0  # wide, but the reader ignores it
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0]])

    def reader(x):
        return x @ weight.T

    def output_error(method):
        fitted = quantizer()
        config = RangeConfig(method=method)
        fitted.set_range(*search_range(fitted, values, config, reader=reader))
        return float((reader(fitted(values)) - reader(values)).square().mean())

    assert output_error("output_mse") < 0.2 * output_error("mse")


def test_output_mse_without_a_reader_or_per_channel_is_refused():
    config = RangeConfig(method="output_mse")

    with pytest.raises(ConfigError, match=r"blocks\.0\.fc1:input: output_mse needs a linear"):
        search_range(quantizer(), torch.randn(4, 4), config)
    with pytest.raises(ConfigError, match="per-tensor ranges only"):
        search_range(
            quantizer(granularity=PerChannel(-1)),
            torch.randn(4, 4),
            config,
            reader=lambda x: x,
        )


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("through_histogram", [False, True])
def test_values_that_are_not_finite_name_the_site(broken, through_histogram):
    values, counts = torch.tensor([[0.0, 1.0, broken]]), None
    if through_histogram:
        histogram = Histogram()
        histogram.update(values)
        values, counts = histogram.result()

    with pytest.raises(
        PassError, match=r"blocks\.0\.fc1:input: calibration saw values that are not"
    ):
        search_range(quantizer(), values, RangeConfig(method="mse"), counts=counts)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_range_without_zero_is_widened_to_it_on_demand(method, sign):
    values = sign * (torch.rand(1000) + 5.0)

    for include_zero in (True, False):
        config = RangeConfig(method=method, include_zero=include_zero)
        fitted = quantizer()
        fitted.set_range(*search_range(fitted, values, config))

        assert (fitted.defect() is None) is include_zero or method == "mse"
        if include_zero:
            assert fitted.defect() is None


def test_a_log_format_reads_only_the_upper_end():
    probs = torch.rand(1000)

    low, high = search_range(
        quantizer(format="log_sqrt2"), probs, RangeConfig(method="minmax", include_zero=False)
    )

    assert (low.item(), high.item()) == (0.0, probs.max().item())


@pytest.mark.parametrize(
    "settings",
    [
        {"percentiles": ()},
        {"percentiles": (0.4,)},
        {"percentiles": (1.1,)},
        {"steps": 0},
        {"smallest": 0.0},
        {"smallest": 1.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        RangeConfig(**settings)
