"""What no pass could handle is refused by name, place and cure, before any work is done."""

import re
from pathlib import Path

import pytest
import torch
from small import Formula, noise
from torch import nn

from vitcompress.errors import UnsupportedModelError
from vitcompress.graph import capture

CURE_OF_SPECTRA = "write the spectral filter as a convolution"
CURE_OF_EXTENSIONS = "switch the model to its implementation in plain PyTorch operators"


@torch.library.custom_op("vitcompress_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2.0


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


class Spectral(nn.Module):
    """A global filter: a product in the frequency domain."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.complex(noise(6, 6), noise(6, 6, seed=1)))

    def forward(self, x):
        y = torch.fft.rfft2(x, norm="ortho") * self.filter
        return torch.fft.irfft2(y, s=x.shape[-2:], norm="ortho")


class Extended(nn.Module):
    def forward(self, x):
        return doubled(x) + 1.0


def refusal(model, model_id=""):
    with pytest.raises(UnsupportedModelError) as caught:
        capture(model.eval(), noise(2, 4, 6, 10), model_id=model_id)
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert "\n" not in message
    return message


def mixers(mixer):
    blocks = nn.Sequential(mixer(), mixer())
    return Formula(lambda self, x: self.blocks(x), blocks=blocks)


def line_of(text):
    """Return the number of the line of this file that holds a text."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_complex_numbers_are_refused_by_operator_with_the_first_place_of_each():
    message = refusal(mixers(Spectral), "spectral")

    assert message.startswith("spectral: cannot be compressed: blocks.0: aten.")
    place = f"test_refusals.py:{line_of('torch.fft.rfft2(x')}"
    assert re.search(rf"blocks\.0: aten\.fft_rfft2\.default, \S*{re.escape(place)}: ", message)
    assert "blocks.1" not in message
    assert message.count("it yields complex numbers") == message.count("(2 such nodes)")
    assert CURE_OF_SPECTRA in message


def test_operators_of_an_extension_are_refused_with_its_name():
    message = refusal(mixers(Extended), "extended")

    line = line_of("return doubled(x) + 1.0")
    assert re.fullmatch(
        r"extended: cannot be compressed: blocks\.0: vitcompress_tests\.doubled\.default, "
        rf"\S*test_refusals\.py:{line}: an operator of the extension 'vitcompress_tests', "
        rf"which cannot be stored or exported; {CURE_OF_EXTENSIONS} \(2 such nodes\)",
        message,
    )


def test_one_node_is_not_counted_and_the_class_names_a_model_without_a_name():
    message = refusal(Extended())

    assert message.startswith("Extended: cannot be compressed: the model: vitcompress_tests")
    assert "such nodes" not in message


def test_every_kind_is_listed():
    message = refusal(nn.Sequential(Extended(), Spectral()))

    listed = message.split("; ")
    assert any("0: vitcompress_tests.doubled" in part for part in listed)
    assert any("1: aten.fft_rfft2" in part for part in listed)
