"""What a pass may expect of calibration data: a structural protocol, met by ``calib``."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

__all__ = ["Batch", "CalibrationSource"]


class Batch(Protocol):
    """Some preprocessed images.

    Attributes:
        images: ``[B, C, H, W]`` float32.
        labels: ``[B]`` int64, or ``None``.
        ids: One stable name for each image.
    """

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def ids(self) -> tuple[str, ...]: ...


class CalibrationSource(Protocol):
    """Images in batches, the same ones in the same order on every iteration."""

    @property
    def batch_size(self) -> int:
        """Most images in a batch."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int:
        """Return the number of images."""

    def digest(self) -> str:
        """Return a hash of the images and their preprocessing."""
