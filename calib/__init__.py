"""Image sources for calibration and evaluation.

``open_source`` turns a folder, a manifest, tensors, WebDataset shards or the word
``"synthetic"`` into a ``Source``: a fixed, reproducible choice of images that can be iterated
over as often as needed. The package stands alone; it imports nothing from ``vitcompress``.
"""

from calib.errors import SourceError
from calib.opening import open_source
from calib.source import Batch, Skipped, Source
from calib.tensors import TensorSource
from calib.transforms import Preprocessing

__all__ = [
    "Batch",
    "Preprocessing",
    "Skipped",
    "Source",
    "SourceError",
    "TensorSource",
    "open_source",
]
