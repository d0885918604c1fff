"""From a Pillow image to the tensor a model expects, as evaluation protocols do it.

The geometry and the arithmetic follow timm's evaluation transform (``timm.data``,
``create_transform(is_training=False)``) and torchvision's ``Resize``, ``CenterCrop``,
``ToTensor`` and ``Normalize`` bit for bit, so that an accuracy measured here can be compared
with a published one. EXIF orientation is ignored, because those protocols ignore it.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from calib.errors import SourceError

CropMode = Literal["center", "squash", "border"]
Interpolation = Literal["bicubic", "bilinear", "lanczos", "nearest"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Wider than any published protocol; they keep a slip of a digit from asking for gigabytes.
MAX_SIZE = 2048
MIN_CROP_FRACTION = 0.1

PLAIN_MODES = frozenset(
    {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"}
)
# Pillow opens 16-bit grey as "I;16" or, in older releases and for PGM, as "I".
DEEP_GREY_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
CONVERTIBLE_MODES = PLAIN_MODES | DEEP_GREY_MODES


def convert_mode(image: Image.Image, channels: int) -> Image.Image:
    """Return the image as 8-bit RGB or grey.

    Alpha is dropped, palettes are looked up, and 16-bit grey keeps its upper byte (Pillow
    alone would clip it to white).

    Args:
        image: An image in one of ``CONVERTIBLE_MODES``.
        channels: 3 for RGB, 1 for grey.

    Raises:
        SourceError: The pixel mode has no defined range, e.g. ``F``.
    """
    if image.mode not in CONVERTIBLE_MODES:
        raise SourceError(
            f"pixel mode: expected one of {', '.join(sorted(CONVERTIBLE_MODES))}, "
            f"found {image.mode!r}; convert the image to RGB first"
        )
    if image.mode in DEEP_GREY_MODES:
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    mode = "RGB" if channels == 3 else "L"
    if image.mode == mode:
        return image
    with warnings.catch_warnings():
        # Pillow advises RGBA for palettes with transparency; the protocols drop alpha.
        warnings.simplefilter("ignore", UserWarning)
        return image.convert(mode)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes model input.

    Attributes:
        size: Height and width of the result in pixels, each in [1, 2048].
        crop_fraction: Share of the resized edge that the crop keeps, in [0.1, 1].
        crop_mode: ``center`` resizes the shorter edge and crops; ``squash`` resizes both
            edges, giving up the aspect ratio; ``border`` fits the longer edge and pads with
            the mean.
        interpolation: Resampling filter.
        mean: Per-channel mean on the [0, 1] scale; three numbers read RGB, one reads grey.
        std: Per-channel standard deviation, above 0, as many numbers as ``mean``.

    Raises:
        SourceError: A field is out of bounds.
    """

    size: tuple[int, int] = (224, 224)
    crop_fraction: float = 0.875
    crop_mode: CropMode = "center"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        # Lists come from YAML and JSON; tuples keep the object hashable.
        for name in ("size", "mean", "std"):
            value = getattr(self, name)
            _expect(isinstance(value, (tuple, list)), name, "a list of numbers", value)
            object.__setattr__(self, name, tuple(value))
        _expect(
            len(self.size) == 2 and all(_is_size(edge) for edge in self.size),
            "size",
            f"(height, width), whole numbers in [1, {MAX_SIZE}]",
            self.size,
        )
        _expect(
            _is_number(self.crop_fraction) and MIN_CROP_FRACTION <= self.crop_fraction <= 1.0,
            "crop_fraction",
            f"a number in [{MIN_CROP_FRACTION}, 1]",
            self.crop_fraction,
        )
        for name, choices in (("crop_mode", CropMode), ("interpolation", Interpolation)):
            allowed = get_args(choices)
            value = getattr(self, name)
            _expect(value in allowed, name, f"one of {', '.join(allowed)}", value)
        _expect(
            len(self.mean) in (1, 3) and all(_is_number(value) for value in self.mean),
            "mean",
            "one or three finite numbers",
            self.mean,
        )
        _expect(
            len(self.std) == len(self.mean)
            and all(_is_number(value) and value > 0 for value in self.std),
            "std",
            f"{len(self.mean)} finite numbers above 0, as many as mean has",
            self.std,
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the preprocessed image, ``[C, H, W]``, float32, C = number of means.

        Raises:
            SourceError: The image has a pixel mode without a defined range.
        """
        image = convert_mode(image, len(self.mean))
        return self.normalise(self._crop(self._resize(image)))

    def normalise(self, image: Image.Image) -> Tensor:
        """Return the image scaled to [0, 1], less mean, over std, without resizing it.

        Args:
            image: Any size.

        Returns:
            ``[C, H, W]``, float32.
        """
        pixels = np.array(convert_mode(image, len(self.mean)), dtype=np.uint8)
        channels_last = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1))
        values = channels_last.permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
        mean = torch.tensor(self.mean, dtype=torch.float32)[:, None, None]
        std = torch.tensor(self.std, dtype=torch.float32)[:, None, None]
        return values.sub_(mean).div_(std)

    def describe(self) -> str:
        """Return the steps as one line for a terminal."""
        height, width = self._resized_target()
        box, crop = f"{height}x{width}", f"{self.size[0]}x{self.size[1]}"
        if self.crop_mode == "center":
            resized = f"resize {height if height == width else f'to cover {box}'}"
        else:
            resized = f"{'squash to' if self.crop_mode == 'squash' else 'fit into'} {box}"
        return (
            f"{resized} {self.interpolation}, "
            f"{'crop or pad' if self.crop_mode == 'border' else 'centre crop'} {crop}, "
            f"mean {' '.join(f'{value:g}' for value in self.mean)}, "
            f"std {' '.join(f'{value:g}' for value in self.std)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """Return the preprocessing that ``to_dict`` described; absent keys take defaults.

        Raises:
            SourceError: A key is unknown or a value out of bounds.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise SourceError(
                f"preprocessing: expected keys among {', '.join(known)}, "
                f"found {', '.join(unknown)}"
            )
        return cls(**values)

    def _resized_target(self) -> tuple[int, int]:
        height, width = self.size
        return math.floor(height / self.crop_fraction), math.floor(width / self.crop_fraction)

    def _resize(self, image: Image.Image) -> Image.Image:
        height, width = self._resized_target()
        if self.crop_mode == "squash":
            new_size = (width, height)
        elif self.crop_mode == "center" and height == width:
            new_size = _cover_square(image.size, height)
        else:
            pick = max if self.crop_mode == "border" else min
            ratio = pick(image.height / height, image.width / width)
            new_size = (
                max(1, round(image.width / ratio)),
                max(1, round(image.height / ratio)),
            )
        return image.resize(new_size, Image.Resampling[self.interpolation.upper()])

    def _crop(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        fill = (0,) * len(self.mean)
        if self.crop_mode == "border":
            fill = tuple(round(255 * value) for value in self.mean)
        corner = (_crop_offset(image.width, width), _crop_offset(image.height, height))
        canvas = Image.new(image.mode, (width, height), fill if len(fill) == 3 else fill[0])
        canvas.paste(image, corner)
        return canvas


def _cover_square(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """Return (width, height) with the shorter side at ``edge``, as torchvision's Resize."""
    width, height = size
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def _crop_offset(found: int, wanted: int) -> int:
    """Return where the image starts on the canvas; negative where it is cropped."""
    if found < wanted:
        return (wanted - found) // 2
    # Python's round to even, as torchvision has it: half a pixel decides which row is lost.
    return -round((found - wanted) / 2.0)


def _is_number(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_SIZE


def _expect(condition: bool, field: str, expected: str, found: object) -> None:
    if not condition:
        raise SourceError(f"preprocessing: {field} must be {expected}, found {found!r}")
