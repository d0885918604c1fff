"""A vision transformer small enough to ship: digits of 8 x 8 pixels, 0.67 M weights.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition
at Scale", ICLR 2021, arXiv:2010.11929; equations as numbered there. Names are those of timm.
Deviation: no dropout, and the head is the single linear layer the paper uses for fine-tuning:
the demo is there to be compressed, and either would only be in its way.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "Block", "DigitsViT", "Mlp", "PatchEmbed"]

IMAGE_SIZE = 8
PATCH_SIZE = 2


class PatchEmbed(nn.Module):
    """Cut an image into square patches and project each to ``dim`` channels (E of Eq. 1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, dim, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)

    def forward(self, x: Tensor) -> Tensor:
        """Return one token per patch, row by row: ``[B, 1, 8, 8]`` to ``[B, 16, C]``."""
        tokens: Tensor = self.proj(x)
        return tokens.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention over ``heads`` heads; one layer makes q, k and v (Eq. 5 to 8)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, N, C]`` as ``x``."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(B, N, C))
        return out


class Mlp(nn.Module):
    """Two linear layers, ``hidden`` channels between them, with a GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, N, C]`` as ``x``; tokens do not mix."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm block: attention (Eq. 2), then MLP (Eq. 3), each with a residual."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, N, C]`` as ``x``."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class DigitsViT(nn.Module):
    """ViT for the 8 x 8 digits; the defaults are those of the packaged weights.

    Args:
        dim: Channels C of a token.
        depth: Number of blocks.
        heads: Attention heads of a block; must divide ``dim``.
        num_classes: Number of logits.
    """

    pretrained_cfg: ClassVar[dict[str, object]] = {
        "input_size": (1, IMAGE_SIZE, IMAGE_SIZE),
        "crop_pct": 1.0,
        "mean": (0.5,),
        "std": (0.5,),
    }

    def __init__(
        self, dim: int = 96, depth: int = 6, heads: int = 3, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        patches = (IMAGE_SIZE // PATCH_SIZE) ** 2
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + patches, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio=4) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images.

        Args:
            x: Images as ``load_digits`` returns them, ``[B, 1, 8, 8]``, float in [-1, 1].

        Returns:
            ``[B, num_classes]``.
        """
        tokens = self.patch_embed(x)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        # Eq. 1: the class token goes first, then positions are added.
        tokens = torch.cat([cls_token, tokens], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits
