"""Preprocessing equals timm's, converts every pixel mode, and checks its fields."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from calib import Preprocessing, SourceError
from calib.transforms import DEEP_GREY_MODES, convert_mode

# Odd edges on purpose: rounding is where implementations part.
SHAPES = [(37, 61), (61, 37), (50, 50), (224, 224), (225, 301), (7, 40), (333, 100)]


def noise(width, height, mode="RGB"):
    random = np.random.RandomState(width * 1000 + height)
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(random.randint(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    ("size", "crop_fraction", "interpolation"),
    [
        ((32, 32), 0.875, "bicubic"),
        ((31, 31), 0.9, "bilinear"),
        ((48, 48), 1.0, "lanczos"),
        ((33, 48), 0.95, "bicubic"),
        ((24, 24), 0.875, "nearest"),
    ],
)
def test_tensor_equals_timm_bit_for_bit(shape, crop_mode, size, crop_fraction, interpolation):
    timm_data = pytest.importorskip("timm.data")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    theirs = timm_data.create_transform(
        input_size=(3, *size),
        is_training=False,
        crop_pct=crop_fraction,
        crop_mode=crop_mode,
        interpolation=interpolation,
        mean=mean,
        std=std,
    )
    ours = Preprocessing(
        size=size,
        crop_fraction=crop_fraction,
        crop_mode=crop_mode,
        interpolation=interpolation,
        mean=mean,
        std=std,
    )
    image = noise(*shape)

    assert torch.equal(ours(image), theirs(image))


def test_defaults_equal_timm_at_224():
    timm_data = pytest.importorskip("timm.data")
    theirs = timm_data.create_transform((3, 224, 224), interpolation="bicubic")
    image = noise(500, 375)

    assert torch.equal(Preprocessing()(image), theirs(image))


def test_one_mean_reads_grey():
    preprocessing = Preprocessing(size=(8, 8), mean=(0.5,), std=(0.25,))

    tensor = preprocessing(Image.new("RGB", (20, 20), (255, 255, 255)))

    torch.testing.assert_close(tensor, torch.full((1, 8, 8), 2.0))


def test_image_smaller_than_the_crop_is_padded_with_zero():
    preprocessing = Preprocessing(
        size=(8, 8), crop_fraction=1.0, crop_mode="border", mean=(0.0,) * 3, std=(1.0,) * 3
    )

    tensor = preprocessing(Image.new("RGB", (8, 4), (255, 255, 255)))

    assert tensor[:, 2:6].eq(1.0).all()
    assert tensor[:, :2].eq(0.0).all()
    assert tensor[:, 6:].eq(0.0).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_become_rgb_as_pillow_does(mode):
    image = noise(9, 7).convert(mode)

    converted = convert_mode(image, 3)

    assert converted.tobytes() == image.convert("RGB").tobytes()


def test_palette_with_transparency_is_silent():
    image = noise(9, 7).convert("P")
    image.info["transparency"] = bytes(range(256))

    assert convert_mode(image, 3).mode == "RGB"


@pytest.mark.parametrize("mode", ["I", "I;16"])
def test_deep_grey_keeps_its_upper_byte(mode):
    assert mode in DEEP_GREY_MODES
    values = np.array([[0, 255, 256, 65535]], dtype=np.int32 if mode == "I" else np.uint16)

    converted = convert_mode(Image.fromarray(values), 3)

    assert np.asarray(converted)[0, :, 0].tolist() == [0, 0, 1, 255]


def test_float_pixels_are_refused():
    with pytest.raises(SourceError, match=r"pixel mode.*'F'"):
        Preprocessing()(Image.new("F", (4, 4)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", (0, 224)),
        ("size", (224,)),
        ("size", (224.0, 224)),
        ("size", (True, 224)),
        ("size", (2049, 224)),
        ("size", 224),
        ("crop_fraction", 0.0),
        ("crop_fraction", 1.01),
        ("crop_fraction", float("nan")),
        ("crop_fraction", "1"),
        ("crop_mode", "middle"),
        ("interpolation", "cubic"),
        ("mean", (0.5, 0.5)),
        ("mean", (0.5, 0.5, float("inf"))),
        ("std", (0.5, 0.5, 0.0)),
        ("std", (0.5,)),
    ],
)
def test_bounds_name_the_field(field, value):
    with pytest.raises(SourceError, match=f"preprocessing: {field} must be .*, found"):
        Preprocessing(**{field: value})


def test_dict_round_trip_through_json():
    preprocessing = Preprocessing(size=(192, 256), crop_mode="squash", mean=(0.5,), std=(0.5,))

    values = json.loads(json.dumps(preprocessing.to_dict()))

    assert Preprocessing.from_dict(values) == preprocessing
    assert hash(Preprocessing.from_dict(values)) == hash(preprocessing)


def test_unknown_key_is_an_error():
    with pytest.raises(SourceError, match="found crop"):
        Preprocessing.from_dict({"crop": 1.0})


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"crop_fraction": 0.9},
            "resize 248 bicubic, centre crop 224x224, mean 0.5 0.5 0.5, std 0.5 0.5 0.5",
        ),
        (
            {"size": (96, 128), "crop_fraction": 1.0, "interpolation": "bilinear"},
            "resize to cover 96x128 bilinear, centre crop 96x128, "
            "mean 0.5 0.5 0.5, std 0.5 0.5 0.5",
        ),
        (
            {"crop_mode": "squash"},
            "squash to 256x256 bicubic, centre crop 224x224, "
            "mean 0.5 0.5 0.5, std 0.5 0.5 0.5",
        ),
        (
            {"crop_mode": "border"},
            "fit into 256x256 bicubic, crop or pad 224x224, mean 0.5 0.5 0.5, std 0.5 0.5 0.5",
        ),
    ],
)
def test_description_fits_one_line(fields, line):
    half = (0.5, 0.5, 0.5)

    assert Preprocessing(mean=half, std=half, **fields).describe() == line
