"""Decode image files from strangers: every failure is a reason, nothing is run or unpacked."""

import io
import warnings
from abc import abstractmethod

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from calib.errors import UnreadableError
from calib.source import Samples
from calib.transforms import CONVERTIBLE_MODES, Preprocessing

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
# Named, so that a file cannot ask for a decoder that starts a program (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

MAX_FILE_BYTES = 256 * 2**20
# A 1 x 50000 strip is small until its shorter side is resized to 256.
MAX_ASPECT_RATIO = 100


def decode_image(content: bytes) -> Image.Image:
    """Return the image (its first frame), decoded in full; EXIF orientation is ignored.

    Args:
        content: The bytes of an image file.

    Raises:
        UnreadableError: They cannot be decoded, or are refused.
    """
    if not content:
        raise UnreadableError("the file is empty")
    try:
        with warnings.catch_warnings():
            # Damaged metadata is no concern of ours, an oversized image is.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            _check_geometry(image)
            image.load()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableError("refused: over Pillow's pixel limit") from error
    except UnreadableError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableError("not an image of a known format") from error
    # Decoders raise nearly any type on damaged bytes, and all of them mean the same here.
    except Exception as error:
        raise UnreadableError(f"cannot be decoded: {error}") from error
    return image


def _check_geometry(image: Image.Image) -> None:
    shorter, longer = sorted(image.size)
    if longer > MAX_ASPECT_RATIO * shorter:
        raise UnreadableError(
            f"refused: {image.width}x{image.height} is over {MAX_ASPECT_RATIO} times "
            "as long as wide"
        )
    if image.mode not in CONVERTIBLE_MODES:
        raise UnreadableError(f"refused: pixel mode {image.mode} has no defined range")


class EncodedImages(Samples):
    """Samples stored as image files, wherever the bytes come from."""

    @abstractmethod
    def read(self, number: int) -> bytes:
        """Return the bytes of one image file.

        Raises:
            UnreadableError: They cannot be read.
        """

    def tensor(self, number: int, preprocessing: Preprocessing | None) -> Tensor:
        assert preprocessing is not None  # Source.__iter__ has checked it
        return preprocessing(decode_image(self.read(number)))

    def verify(self, number: int) -> None:
        decode_image(self.read(number))

    def content(self, number: int, preprocessing: Preprocessing | None) -> bytes:
        return self.read(number)


def check_file_size(size_bytes: int) -> None:
    """Check a size before that much is read into memory.

    Raises:
        UnreadableError: It is over ``MAX_FILE_BYTES``.
    """
    if size_bytes > MAX_FILE_BYTES:
        raise UnreadableError(
            f"refused: {size_bytes} bytes is over the limit of {MAX_FILE_BYTES} for one image"
        )
