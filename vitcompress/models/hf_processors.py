"""What the image processor saved beside a transformers model does, as a ``Preprocessing``.

Its file is read as plain JSON: the processor itself can be had from the hub only.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib import Preprocessing
from vitcompress.errors import ConfigError, InputError
from vitcompress.models.naming import first_line, import_optional
from vitcompress.models.preprocessing import for_channels, input_channels, make_preprocessing

__all__ = ["processor_preprocessing"]

PROCESSOR_FILE = "preprocessor_config.json"
# Pillow's numbers, as transformers writes them.
RESAMPLE_NAMES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def processor_preprocessing(name: str, module: Any, image_size: int | None) -> Preprocessing:
    """Return the preprocessing that belongs to a classifier.

    Args:
        name: A hub name, a local ``config.json`` or its folder.
        module: Asked for its input channels and its ``config.image_size``.
        image_size: Height and width in pixels instead of the published ones.

    Raises:
        ConfigError: The processor's settings are no such settings or out of bounds.
        InputError: Its file is damaged or cannot be downloaded.
    """
    settings = _processor_settings(name)
    where = f"hf/{name}" if settings is None else f"hf/{name}: {PROCESSOR_FILE}"
    channels = input_channels(module)
    if settings is None:
        # The defaults of the library's own ViT processor.
        default = getattr(module.config, "image_size", None) or 224
        height, width = _pair(image_size or default)
        half = for_channels((0.5, 0.5, 0.5), channels)
        return make_preprocessing(
            where,
            size=(height, width),
            crop_fraction=1.0,
            interpolation="bilinear",
            mean=half,
            std=half,
        )
    try:
        geometry = _geometry(settings, image_size)
        scale = 255 * settings.get("rescale_factor", 1 / 255)
        # Pixels are scaled to [0, 1] here, so another factor moves into mean and std.
        if not settings.get("do_rescale", True):
            scale = 255
        normalised = settings.get("do_normalize", True)
        mean = settings.get("image_mean", (0.5, 0.5, 0.5)) if normalised else (0.0, 0.0, 0.0)
        std = settings.get("image_std", (0.5, 0.5, 0.5)) if normalised else (1.0, 1.0, 1.0)
        statistics = {
            "mean": for_channels([value / scale for value in mean], channels),
            "std": for_channels([value / scale for value in std], channels),
        }
    except (TypeError, KeyError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{where}: expected the settings of an image processor: {error!r}"
        ) from error
    resample = settings.get("resample", 2)
    interpolation = RESAMPLE_NAMES.get(resample, str(resample))
    return make_preprocessing(where, **geometry, **statistics, interpolation=interpolation)


def _processor_settings(name: str) -> Mapping[str, Any] | None:
    """Return the content of the processor's file, None where there is none."""
    path: Path | None
    if Path(name).exists():
        folder = Path(name) if Path(name).is_dir() else Path(name).parent
        path = folder / PROCESSOR_FILE
    else:
        cached_file = import_optional("transformers").utils.cached_file
        try:
            found = cached_file(
                name, PROCESSOR_FILE, _raise_exceptions_for_missing_entries=False
            )
        except OSError as error:
            raise InputError(
                f"hf/{name}: {PROCESSOR_FILE} cannot be had: {first_line(str(error))}; give a "
                "local folder with --arch hf/path/to/folder"
            ) from error
        path = Path(found) if found else None
    if path is None or not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: expected JSON: {error}") from error
    if not isinstance(settings, Mapping):
        raise InputError(f"{path}: expected a JSON object, found {type(settings).__name__}")
    return settings


def _geometry(settings: Mapping[str, Any], image_size: int | None) -> dict[str, Any]:
    size = settings["size"]
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else None
    # A lone number means a square for the ViT family.
    resized = (shortest, shortest) if shortest else _pair(size)
    crop = resized
    crop_mode = "center" if shortest else "squash"
    fraction = 1.0
    if "crop_pct" in settings and shortest:
        # ConvNeXt: crop to the edge from a larger image, or squash where the edge is large.
        large = shortest >= 384
        crop_mode, fraction = ("squash", 1.0) if large else ("center", settings["crop_pct"])
    elif settings.get("do_center_crop") and settings.get("crop_size"):
        crop = _pair(settings["crop_size"])
        fraction = crop[0] / resized[0]
    if image_size:
        crop = (image_size, image_size)
    return {"size": crop, "crop_fraction": fraction, "crop_mode": crop_mode}


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return size["height"], size["width"]
    if isinstance(size, (list, tuple)):
        height, width = size
        return height, width
    return size, size
