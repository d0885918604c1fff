"""How images must be prepared for a model, from what the model says about itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from calib import Preprocessing, SourceError
from calib.transforms import IMAGENET_MEAN, IMAGENET_STD
from vitcompress.errors import ConfigError

__all__ = [
    "for_channels",
    "from_attributes",
    "from_data_config",
    "input_channels",
    "make_preprocessing",
]

DEFAULT_IMAGE_SIZE = 224


def make_preprocessing(where: str, **values: Any) -> Preprocessing:
    """Return a ``Preprocessing`` of these fields.

    Raises:
        ConfigError: A value is out of bounds; the message starts with ``where``.
    """
    try:
        return Preprocessing(**values)
    except SourceError as error:
        raise ConfigError(f"{where}: {error}") from error


def input_channels(module: nn.Module) -> int:
    """Return 1 if the first convolution reads one channel, else 3."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            # Other numbers say nothing: some models fold pixels into channels before it.
            return 1 if part.in_channels == 1 else 3
    return 3


def for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return per-channel statistics for grey images, where a model reads those."""
    return (sum(values) / len(values),) if channels == 1 and values else tuple(values)


def from_data_config(
    where: str, module: nn.Module, config: Mapping[str, Any], image_size: int | None
) -> Preprocessing:
    """Return the preprocessing that a timm data configuration describes.

    Args:
        where: Start of an error message.
        module: Asked for its input channels.
        config: ``input_size`` (channels, height, width), ``crop_pct``, ``crop_mode``,
            ``interpolation``, ``mean``, ``std``; absent ones take timm's defaults.
        image_size: Height and width in pixels instead of ``input_size``.

    Raises:
        ConfigError: A value is of the wrong type or out of bounds.
    """
    channels = input_channels(module)
    default_size = (channels, DEFAULT_IMAGE_SIZE, DEFAULT_IMAGE_SIZE)
    try:
        size = tuple(config.get("input_size") or default_size)[-2:]
        mean = for_channels(config.get("mean") or IMAGENET_MEAN, channels)
        std = for_channels(config.get("std") or IMAGENET_STD, channels)
    except TypeError as error:
        raise ConfigError(
            f"{where}: preprocessing: expected lists of numbers: {error}"
        ) from error
    return make_preprocessing(
        where,
        size=(image_size, image_size) if image_size else size,
        crop_fraction=config.get("crop_pct") or 0.875,
        crop_mode=config.get("crop_mode") or "center",
        interpolation=config.get("interpolation") or "bicubic",
        mean=mean,
        std=std,
    )


def from_attributes(where: str, module: nn.Module, image_size: int | None) -> Preprocessing:
    """Return what a module's own ``pretrained_cfg`` says, or the usual ImageNet settings.

    Raises:
        ConfigError: What it says is out of bounds.
    """
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(module, attribute, None)
        if isinstance(config, Mapping):
            return from_data_config(where, module, config, image_size)
    return from_data_config(where, module, {}, image_size)
