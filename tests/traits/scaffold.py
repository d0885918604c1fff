"""What the toys share: a patch embedding, two blocks, a mean over positions and a head."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

SIZE = 16
PATCH = 4
#: Tokens along one side of the image.
SIDE = SIZE // PATCH
TOKENS = SIDE * SIDE
HEADS = 3
HEAD_DIM = 8
DIM = HEADS * HEAD_DIM
CLASSES = 10


class Toy(nn.Module):
    """Two blocks on tokens ``[B, N, C]``, or on a map ``[B, C, H, W]``.

    Args:
        first: Makes the first block, and the second if that has no maker of its own.
        second: Makes the second block.
        on_map: Leave the patches where they are in the image.
        class_token: Put a learned token in front, which the head reads.
    """

    def __init__(
        self,
        first: Callable[[], nn.Module],
        second: Callable[[], nn.Module] | None = None,
        *,
        on_map: bool = False,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.blocks = nn.Sequential(first(), (second or first)())
        self.head = nn.Linear(DIM, CLASSES)
        self.on_map = on_map
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM)) if class_token else None

    def features(self, images: Tensor) -> Tensor:
        x = self.patch(images)
        if self.on_map:
            return self.blocks(x).mean((2, 3))
        x = tokens(x)
        if self.cls_token is None:
            return self.blocks(x).mean(1)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.blocks(x)[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class TwoHeaded(Toy):
    """The answer is the mean of two heads."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__(block)
        self.head_dist = nn.Linear(DIM, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)
        return (self.head(x) + self.head_dist(x)) / 2


def tokens(x: Tensor) -> Tensor:
    """Return a map ``[B, C, H, W]`` as tokens ``[B, N, C]``."""
    return x.flatten(2).transpose(1, 2)


def as_map(x: Tensor) -> Tensor:
    """Return tokens ``[B, N, C]`` as a map ``[B, C, H, W]``."""
    return x.transpose(1, 2).unflatten(2, (SIDE, SIDE))


def split_heads(x: Tensor) -> Tensor:
    """Return ``[B, N, C]`` as ``[B, H, N, D]``."""
    return x.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Return ``[B, H, N, D]`` as ``[B, N, C]``."""
    return x.transpose(1, 2).flatten(2)


def query_key_value(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of ``[B, N, 3 C]``, ``[B, H, N, D]`` each."""
    q, k, v = x.unflatten(2, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v
