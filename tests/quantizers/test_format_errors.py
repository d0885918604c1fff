"""Which format suits which data: the orderings that RepQ-ViT rests on."""

import pytest
import torch

from vitcompress.calibration import RangeConfig, search_range
from vitcompress.quantizers import PerChannel, QuantSpec, make_quantizer

CLIPS = RangeConfig(method="percentile", percentiles=(0.999, 0.9999, 0.99999))
CLIPS_WITHOUT_ZERO = RangeConfig(method="percentile", include_zero=False)
#: Tokens of a 224 x 224 image in patches of 16, and the class token.
TOKENS = 197


def fitted(values, config=CLIPS, **spec):
    quantizer = make_quantizer(QuantSpec(**spec), "test")
    quantizer.set_range(*search_range(quantizer, values, config))
    return quantizer


def attention(std, images=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = std * torch.randn(images, TOKENS, TOKENS, generator=generator)
    return torch.softmax(logits, dim=-1)


def product_error(probs, quantized, seed=1):
    """Return the mean squared error of A V for standard normal values."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(len(probs), TOKENS, 64, generator=generator)
    return float(((quantized - probs) @ value).square().mean())


@pytest.fixture(scope="module")
def normed():
    """Values as behind a LayerNorm: channels of very different spread and offset."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(0.8 * torch.randn(384, generator=generator))
    offset = torch.randn(384, generator=generator)
    return torch.randn(2, TOKENS, 384, generator=generator) * spread + offset


def test_channel_wise_beats_layer_wise_threefold_on_normed_values(normed):
    layer = fitted(normed, bits=4)(normed)
    channel = fitted(normed, CLIPS_WITHOUT_ZERO, bits=4, granularity=PerChannel(-1))(normed)

    layer_error = (layer - normed).square().mean()
    channel_error = (channel - normed).square().mean()
    assert channel_error <= layer_error / 3


def test_log_sqrt2_beats_log2_beats_uniform_at_4_bits():
    probs = attention(std=2.0)

    errors = {
        name: product_error(probs, fitted(probs, bits=4, format=name)(probs))
        for name in ("log_sqrt2", "log2", "affine")
    }

    assert errors["log_sqrt2"] < errors["log2"] < errors["affine"]


def test_log2_beats_log_sqrt2_at_3_bits():
    probs = attention(std=2.0)

    errors = {
        name: product_error(probs, fitted(probs, bits=3, format=name)(probs))
        for name in ("log_sqrt2", "log2")
    }

    assert errors["log2"] < errors["log_sqrt2"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("std", [2.0, 3.0, 4.0])
def test_rows_of_quantized_attention_still_sum_to_about_one_at_4_bits(std, strict):
    probs = attention(std)

    found = fitted(probs, bits=4, format="log_sqrt2", strict=strict)(probs)

    assert 0.8 <= found.sum(dim=-1).mean() <= 1.2


def test_without_a_zero_code_rows_would_sum_to_far_more():
    probs = attention(std=2.0)
    quantizer = fitted(probs, bits=3, format="log_sqrt2")

    codes = quantizer.quantize(probs).clamp(max=2**3 - 2)  # zeros become the last power

    assert quantizer(probs).sum(dim=-1).mean() < 1.2
    assert quantizer.dequantize(codes).sum(dim=-1).mean() > 2.0
