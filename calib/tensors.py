"""Arrays of images: in memory, or in ``.npy``, ``.npz`` and ``.safetensors`` files."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from calib.errors import SourceError, UnreadableError
from calib.source import Samples, Source
from calib.transforms import Preprocessing

IMAGES_KEY = "images"
LABELS_KEY = "labels"
PIXEL_CHANNELS = (1, 3, 4)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SAFETENSORS_DTYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class Rows(Protocol):
    """An array read one row at a time; ``shape`` covers all rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, number: int) -> Tensor:
        """Return one row on the CPU."""


class MemoryRows:
    """Rows of a tensor, which is not copied: leave it as it is while the source is in use."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype

    def read(self, number: int) -> Tensor:
        return self._tensor[number].detach().cpu()


class ArrayRows:
    """Rows of a NumPy array, which may be a memory map."""

    def __init__(self, array: NDArray[Any], location: str) -> None:
        self._native = array.dtype.newbyteorder("=")
        try:
            self.dtype = torch.from_numpy(np.empty(0, dtype=self._native)).dtype
        except TypeError as error:
            raise _wrong_dtype(location, str(array.dtype)) from error
        self._array = array
        self.shape = tuple(array.shape)

    def read(self, number: int) -> Tensor:
        # A copy: torch refuses read-only maps and foreign byte orders.
        return torch.from_numpy(np.array(self._array[number], dtype=self._native, order="C"))


class SafetensorsRows:
    """Rows of one tensor in a safetensors file, each read by slice."""

    def __init__(self, path: Path, key: str, location: str) -> None:
        self._path, self._key = path, key
        with safe_open(path, framework="pt") as file:
            found = file.get_slice(key)
            self.shape = tuple(found.get_shape())
            dtype = found.get_dtype()
        if dtype not in SAFETENSORS_DTYPES:
            raise _wrong_dtype(location, dtype)
        self.dtype = SAFETENSORS_DTYPES[dtype]

    def read(self, number: int) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            row: Tensor = file.get_slice(self._key)[number : number + 1][0]
        return row


class TensorSamples(Samples):
    """Rows of an array as samples.

    Args:
        rows: Floating ``[N, C, H, W]`` (model input) or uint8 ``[N, H, W, C]``,
            ``[N, C, H, W]`` or ``[N, H, W]`` (images; where the channel axis may be either,
            it is the last).
        labels: ``[N]``, any integer type, in [0, 2**31), or None.
        location: What error messages call the source.

    Raises:
        SourceError: Rank, type or number of labels do not fit.
    """

    kind = "tensors"
    noun = "tensors"

    def __init__(self, rows: Rows, labels: Tensor | None, location: str) -> None:
        self.location = location
        self.preprocessed = rows.dtype in FLOATING
        self._rows = rows
        if not self.preprocessed and rows.dtype != torch.uint8:
            raise _wrong_dtype(location, str(rows.dtype).removeprefix("torch."))
        self._channels_first = _check_shape(rows.shape, self.preprocessed, location)
        self.ids = [f"array[{number}]" for number in range(rows.shape[0])]
        self.labels = (
            None if labels is None else _check_labels(labels, rows.shape[0], location)
        )

    def tensor(self, number: int, preprocessing: Preprocessing | None) -> Tensor:
        if not self.preprocessed:
            assert preprocessing is not None  # Source.__iter__ has checked it
            return preprocessing(self._image(number))
        values = self._rows.read(number).to(torch.float32)
        wrong = int((~torch.isfinite(values)).sum())
        if wrong:
            raise UnreadableError(f"{wrong} of {values.numel()} values are NaN or infinite")
        return values

    def verify(self, number: int) -> None:
        if self.preprocessed:
            self.tensor(number, None)

    def content(self, number: int, preprocessing: Preprocessing | None) -> bytes:
        row = self._rows.read(number).contiguous()
        header = f"{row.dtype} {tuple(row.shape)}\n".encode()
        return header + row.view(torch.uint8).numpy().tobytes()

    def _image(self, number: int) -> Image.Image:
        pixels = self._rows.read(number)
        if self._channels_first:
            pixels = pixels.permute(1, 2, 0)
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        return Image.fromarray(pixels.contiguous().numpy())


class TensorSource(Source):
    """A source of tensors; also made directly from tensors in memory.

    Args:
        images: See ``TensorSamples``; a tensor, or rows read from elsewhere.
        labels: ``[N]``, integers, or None.
        batch_size: Samples per batch.
        samples: How many to choose; None takes all, in order.
        seed: Seed of the choice.
        preprocessing: For uint8 images; floating ones are taken as they are.
        location: What error messages call the source.

    Raises:
        SourceError: The tensors or the settings do not fit.
    """

    def __init__(
        self,
        images: Tensor | Rows,
        labels: Tensor | None = None,
        *,
        batch_size: int = 32,
        samples: int | None = None,
        seed: int = 0,
        preprocessing: Preprocessing | None = None,
        location: str = "tensors",
    ) -> None:
        rows = MemoryRows(images) if isinstance(images, Tensor) else images
        super().__init__(
            TensorSamples(rows, labels, location),
            samples=samples,
            seed=seed,
            batch_size=batch_size,
            preprocessing=preprocessing,
        )


def open_arrays(path: Path, location: str) -> tuple[Rows, Tensor | None]:
    """Return images and labels of an array file.

    ``.npy`` is memory-mapped, ``.safetensors`` read by slices, ``.npz`` held in memory. The
    key ``images`` may have another name where it is the only array besides ``labels``.

    Args:
        path: A file that ends in ``.npy``, ``.npz`` or ``.safetensors``.
        location: What error messages call it.

    Raises:
        SourceError: The file is damaged, would need unpickling, or lacks the key.
    """
    readers = {".npy": _open_npy, ".npz": _open_npz, ".safetensors": _open_safetensors}
    try:
        with warnings.catch_warnings():
            # NumPy warns of headers written by Python 2; it reads them well.
            warnings.simplefilter("ignore")
            return readers[path.suffix.lower()](path, location)
    except (SourceError, OSError):
        raise
    # Header parsers raise nearly any type on damaged bytes; all of them mean the same here.
    except Exception as error:
        raise SourceError(
            f"{location}: expected plain numeric arrays: {error} (object arrays are refused, "
            "they would have to be unpickled)"
        ) from error


def _open_npy(path: Path, location: str) -> tuple[Rows, Tensor | None]:
    return ArrayRows(np.lib.format.open_memmap(path, mode="r"), location), None


def _open_npz(path: Path, location: str) -> tuple[Rows, Tensor | None]:
    with path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise SourceError(f"{location}: expected an .npz archive, found a single array")
        with loaded as archive:
            images = archive[_images_key(archive.files, location)]
            labels = archive[LABELS_KEY] if LABELS_KEY in archive.files else None
    rows = ArrayRows(images, location)
    return rows, None if labels is None else _label_tensor(labels, location)


def _open_safetensors(path: Path, location: str) -> tuple[Rows, Tensor | None]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        labels = file.get_tensor(LABELS_KEY) if LABELS_KEY in names else None
    return SafetensorsRows(path, _images_key(names, location), location), labels


def _images_key(names: Sequence[str], location: str) -> str:
    others = [name for name in names if name != LABELS_KEY]
    if IMAGES_KEY in others:
        return IMAGES_KEY
    if len(others) == 1:
        return others[0]
    raise SourceError(
        f"{location}: expected an array {IMAGES_KEY!r}, or a single array besides "
        f"{LABELS_KEY!r}, found {', '.join(sorted(names)) or 'no array'}"
    )


def _label_tensor(labels: NDArray[Any], location: str) -> Tensor:
    if labels.dtype.kind not in "iu":
        raise SourceError(f"{location}: labels must be integers, found {labels.dtype}")
    return torch.from_numpy(labels.astype(np.int64))


def _check_labels(labels: Tensor, count: int, location: str) -> list[int]:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise SourceError(f"{location}: labels must be integers, found {labels.dtype}")
    if tuple(labels.shape) != (count,):
        raise SourceError(
            f"{location}: labels must have one entry per image, shape [{count}], "
            f"found {list(labels.shape)}"
        )
    values: list[int] = labels.tolist()
    for extreme in (min(values), max(values)):
        if not 0 <= extreme < 2**31:
            raise SourceError(f"{location}: labels must be in [0, 2**31), found {extreme}")
    return values


def _check_shape(shape: tuple[int, ...], floating: bool, location: str) -> bool:
    """Return whether the channel axis is the first of a row."""
    expected = (
        "floating [N, C, H, W]"
        if floating
        else f"uint8 [N, H, W, C], [N, C, H, W] or [N, H, W] with C in {PIXEL_CHANNELS}"
    )
    fits = len(shape) == 4 if floating else len(shape) in (3, 4)
    channels_last = len(shape) == 3 or (fits and shape[3] in PIXEL_CHANNELS)
    if fits and not floating:
        fits = channels_last or shape[1] in PIXEL_CHANNELS
    if not fits or 0 in shape:
        raise SourceError(
            f"{location}: images must be {expected}, none of them 0, found {list(shape)}"
        )
    return not channels_last


def _wrong_dtype(location: str, found: str) -> SourceError:
    return SourceError(
        f"{location}: images must be uint8 or floating (16, 32 or 64 bits), found {found}"
    )
