"""What a pass may expect of calibration data: a structural protocol, met by ``calib``."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

__all__ = ["Batch", "CalibrationSource", "FirstImages"]


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


class FirstImages:
    """The first images of a source, for methods that look at fewer than are there.

    Args:
        source: All images.
        count: How many to keep.
    """

    def __init__(self, source: CalibrationSource, count: int) -> None:
        self._source = source
        self._count = count

    @property
    def batch_size(self) -> int:
        """Most images in a batch."""
        return min(self._source.batch_size, self._count)

    def __iter__(self) -> Iterator[Batch]:
        left = self._count
        for batch in self._source:
            yield batch if len(batch.images) <= left else _Part(batch, left)
            left -= len(batch.images)
            if left <= 0:
                return

    def __len__(self) -> int:
        return min(len(self._source), self._count)

    def digest(self) -> str:
        """Return a hash of the images and their preprocessing."""
        return f"{self._source.digest()}:{len(self)}"


class _Part:
    """The first images of a batch."""

    def __init__(self, batch: Batch, count: int) -> None:
        self.images = batch.images[:count]
        self.labels = None if batch.labels is None else batch.labels[:count]
        self.ids = batch.ids[:count]
