"""One value for every image, in memory or, beyond a limit, in temporary files."""

import itertools
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from vitcompress.errors import PassError

__all__ = ["CachedRows", "ConstantRows", "RowStore"]

_LARGEST_HALF = torch.finfo(torch.float16).max


class CachedRows:
    """A value whose leading axis is that of the images, or a multiple of it.

    Args:
        values: Room for all images, ``[N, k, ...]``, k parts for each image.
        flat: Merge the parts of all images in a batch into the leading axis.
        device: Where batches are wanted.
    """

    def __init__(self, values: Tensor, flat: bool, device: torch.device) -> None:
        self.values = values
        self._flat = flat
        self._device = device

    def take(self, images: Tensor) -> Tensor:
        """Return the value for some images as one batch, in single precision."""
        found = self.values[images].to(self._device)
        found = found.float() if found.is_floating_point() else found
        return found.flatten(0, 1) if self._flat else found

    def put(self, images: Tensor, values: Tensor) -> None:
        """Store the value for some images.

        Raises:
            PassError: A value is beyond half precision, which was asked for.
        """
        if self.values.dtype == torch.float16 and float(values.abs().max()) > _LARGEST_HALF:
            raise PassError(
                f"a recorded value reaches {float(values.abs().max()):.3g}, beyond half "
                "precision; set cache_half: false"
            )
        self.values[images] = values.reshape(-1, *self.values.shape[1:]).to(
            "cpu", self.values.dtype
        )


class ConstantRows:
    """A value that is the same for all images."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def take(self, images: Tensor) -> Tensor:
        """Return the value."""
        return self._value

    def put(self, images: Tensor, values: Tensor) -> None:
        """Keep the value: it is the same for all images."""


class RowStore:
    """Makes room for values; a context manager that deletes its files on exit.

    Args:
        images: Number of images.
        memory_bytes: Most memory; what goes beyond is mapped from temporary files.
        half: Keep floats in half precision.
        device: Where batches are wanted.

    Attributes:
        images: Number of images for which there is to be room from now on.
    """

    def __init__(
        self, images: int, memory_bytes: int, half: bool, device: torch.device
    ) -> None:
        self.images = images
        self._memory_bytes = memory_bytes
        self._half = half
        self._device = device
        self._rows: list[tuple[CachedRows, Path | None]] = []
        self._names = itertools.count()
        self._folder = tempfile.TemporaryDirectory(prefix="vitcompress-cache-")

    def __enter__(self) -> "RowStore":
        return self

    def __exit__(self, *error: object) -> None:
        self._rows.clear()
        self._folder.cleanup()

    @property
    def memory_bytes(self) -> int:
        """Memory that values take at present."""
        return sum(rows.values.nbytes for rows, path in self._rows if path is None)

    @property
    def files(self) -> int:
        """Number of values that lie in files at present."""
        return sum(path is not None for _, path in self._rows)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype, parts: int = 0) -> CachedRows:
        """Return room for one value of every image.

        Args:
            shape: Of one image's value, or of one of its parts.
            dtype: Of the value.
            parts: How many parts of ``shape`` each image has along the leading axis of a
                batch; 0 if it has one and batches get an axis of their own.
        """
        dtype = torch.float16 if self._half and dtype.is_floating_point else dtype
        whole = (self.images, *((parts,) if parts else ()), *shape)
        count = math.prod(whole)
        path = None
        if self.memory_bytes + count * dtype.itemsize <= self._memory_bytes:
            values = torch.empty(whole, dtype=dtype)
        else:
            path = Path(self._folder.name) / str(next(self._names))
            values = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        rows = CachedRows(values.reshape(whole), parts > 0, self._device)
        self._rows.append((rows, path))
        return rows

    def keep_only(self, alive: Iterable[CachedRows | ConstantRows]) -> None:
        """Give back the room of every value that is not among those alive."""
        kept = {id(rows) for rows in alive}
        for rows, path in self._rows:
            if id(rows) not in kept and path is not None:
                path.unlink()
        self._rows = [entry for entry in self._rows if id(entry[0]) in kept]
