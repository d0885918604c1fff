"""A trained digits vision transformer and its data, packaged so that a demo needs no download.

Attribution and licence of the data are in ``NOTICE.md`` next to this file.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vitcompress.demo.model import DigitsViT

__all__ = ["DigitsViT", "load_digits", "load_model"]

WEIGHTS_PATH = Path(__file__).with_name("digits_vit.safetensors")
DATA_PATH = Path(__file__).with_name("digits.npz")
TRAIN_SIZE = 1197  # of 1,797; the other 600 are held out


def load_model() -> DigitsViT:
    """Return the digits model with its trained weights, in eval mode, on the CPU."""
    model = DigitsViT()
    model.load_state_dict(load_file(WEIGHTS_PATH))
    return model.eval()


def split_indices(split: Literal["train", "test"]) -> Tensor:
    """Return the rows of the data file that form a split.

    Args:
        split: ``"train"`` for the images the model has seen, ``"test"`` for those held out.

    Returns:
        ``[1197]`` or ``[600]``, int64; the two are disjoint and cover the file.
    """
    # RandomState, not default_rng: NumPy promises that its stream never changes.
    order = torch.from_numpy(np.random.RandomState(0).permutation(1797).astype(np.int64))
    return {"train": order[:TRAIN_SIZE], "test": order[TRAIN_SIZE:]}[split]


def load_digits(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a split, in a fixed shuffled order.

    Args:
        split: ``"train"`` for the images the model has seen, ``"test"`` for those held out.

    Returns:
        Images ``[N, 1, 8, 8]``, float32 in [-1, 1]; labels ``[N]``, int64 in [0, 9].
    """
    with np.load(DATA_PATH, allow_pickle=False) as data:
        images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    rows = split_indices(split)
    pixels = images[rows].unsqueeze(1).to(torch.float32)
    return (pixels / 16 - 0.5) / 0.5, labels[rows].long()
