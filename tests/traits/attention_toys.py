"""Blocks on tokens whose trait lies in attention, and in the norms around it."""

import math

import torch
import torch.nn.functional as F
from scaffold import (
    DIM,
    HEAD_DIM,
    HEADS,
    SIDE,
    TOKENS,
    as_map,
    merge_heads,
    query_key_value,
    split_heads,
    tokens,
)
from torch import Tensor, nn


class Attention(nn.Module):
    """Plain attention behind a norm; the blocks below change one thing each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(self.norm(x))

    def attend(self, x: Tensor) -> Tensor:
        return self.proj(merge_heads(self.core(*query_key_value(self.qkv(x)))))

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class SeparateProjections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(DIM, DIM) for _ in range(3))
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (split_heads(part(y)) for part in (self.q_proj, self.k_proj, self.v_proj))
        return x + self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class PostNorm(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.attend(x))


class SandwichNorm(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.norm_after = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm_after(self.attend(self.norm(x)))


class LibraryAttention(nn.Module):
    """``nn.MultiheadAttention``: its in-projection is a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        nn.init.normal_(self.attn.in_proj_bias, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attn(y, y, y, need_weights=False)[0]


class TalkingHeads(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.mix_scores, self.mix_probs = (nn.Linear(HEADS, HEADS) for _ in range(2))

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * HEAD_DIM**-0.5
        scores = self.mix_scores(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        probs = scores.softmax(-1)
        return self.mix_probs(probs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class TalkingMaps(TalkingHeads):
    """EfficientFormer V2: the same with pointwise convolutions on ``[B, H, N, N]``."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_scores, self.mix_probs = (nn.Conv2d(HEADS, HEADS, 1) for _ in range(2))

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.mix_scores(q @ k.transpose(-2, -1) * HEAD_DIM**-0.5)
        return self.mix_probs(scores.softmax(-1)) @ v


class ClassAttention(SeparateProjections):
    """Only the class token asks."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q = split_heads(self.q_proj(y[:, :1]))
        k, v = split_heads(self.k_proj(y)), split_heads(self.v_proj(y))
        answer = self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        return torch.cat([x[:, :1] + answer, x[:, 1:]], dim=1)


class CosineAttention(Attention):
    """Swin V2: cosines divided by a learned temperature that is kept from running away."""

    #: The last one is above the clamp.
    TEMPERATURES = (5.0, 10.0, 150.0)

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(self.TEMPERATURES).log()[:, None, None])

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = cosines * self.logit_scale.clamp(max=math.log(100.0)).exp()
        return scores.softmax(-1) @ v


# Windows and blocks of tokens


def relative_index(side: int) -> Tensor:
    """Return for each pair of ``side * side`` positions the row of its relative position."""
    rows, columns = (
        axis.flatten() for axis in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij")
    )
    across = (part[:, None] - part[None, :] + side - 1 for part in (rows, columns))
    down, right = across
    return down * (2 * side - 1) + right


class Windows(Attention):
    """Attention in windows of ``window * window`` tokens."""

    window = 2

    def forward(self, x: Tensor) -> Tensor:
        inside = self.arranged(self.norm(x).unflatten(1, (SIDE, SIDE)))
        side = inside.shape[1]
        count = side // self.window
        grid = (count, self.window, count, self.window)
        parts = inside.reshape(-1, *grid, DIM).permute(0, 1, 3, 2, 4, 5)
        parts = self.attend(parts.reshape(-1, self.window**2, DIM))
        parts = parts.reshape(-1, count, count, self.window, self.window, DIM)
        whole = parts.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, DIM)
        return x + self.restored(whole).flatten(1, 2)

    def arranged(self, x: Tensor) -> Tensor:
        return x

    def restored(self, x: Tensor) -> Tensor:
        return x


class ShiftedWindows(Windows):
    """Swin: a bias picked from a table by index, and a mask between torn neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn((2 * self.window - 1) ** 2, HEADS))
        self.register_buffer("index", relative_index(self.window))
        regions = torch.zeros(SIDE, SIDE)
        regions[-1:] += 1
        regions[:, -1:] += 2
        count = SIDE // self.window
        parts = regions.reshape(count, self.window, count, self.window).transpose(1, 2)
        parts = parts.reshape(count**2, self.window**2)
        torn = parts[:, :, None] != parts[:, None, :]
        self.register_buffer("mask", torch.where(torn, -100.0, 0.0))

    def arranged(self, x: Tensor) -> Tensor:
        return x.roll((-1, -1), (1, 2))

    def restored(self, x: Tensor) -> Tensor:
        return x.roll((1, 1), (1, 2))

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * HEAD_DIM**-0.5
        scores = scores + self.table[self.index].permute(2, 0, 1)[None]
        masked = scores.unflatten(0, (-1, len(self.mask))) + self.mask[None, :, None]
        return masked.flatten(0, 1).softmax(-1) @ v


class PaddedWindows(Windows):
    """Zeros fill up the last windows, between the norm and the projection."""

    window = 3

    def arranged(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 2, 0, 2))

    def restored(self, x: Tensor) -> Tensor:
        return x[:, :SIDE, :SIDE]


class BlockedAttention(Attention):
    """Tokens in blocks: attention on ``[B, H, blocks, N, D]``."""

    def attend(self, x: Tensor) -> Tensor:
        parts = self.qkv(x.unflatten(1, (2, TOKENS // 2)))
        q, k, v = parts.unflatten(3, (3, HEADS, HEAD_DIM)).permute(3, 0, 4, 1, 2, 5).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2))


class OutlookAttention(nn.Module):
    """VOLO: each token says how its 3 x 3 neighbours mix, and results overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attn = nn.Linear(DIM, HEADS * 81)
        self.v = nn.Linear(DIM, DIM, bias=False)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        v = F.unfold(as_map(self.v(y)), kernel_size=3, padding=1)
        v = v.reshape(-1, HEADS, HEAD_DIM, 9, TOKENS).permute(0, 1, 4, 3, 2)
        scores = self.attn(y).reshape(-1, TOKENS, HEADS, 9, 9).permute(0, 2, 1, 3, 4)
        mixed = (scores * HEAD_DIM**-0.5).softmax(-1) @ v
        mixed = mixed.permute(0, 1, 4, 3, 2).reshape(-1, DIM * 9, TOKENS)
        return x + self.proj(tokens(F.fold(mixed, (SIDE, SIDE), kernel_size=3, padding=1)))


# Other spellings


class EinsumAttention(Attention):
    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * HEAD_DIM**-0.5
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


class EinsumPositions(Attention):
    """MViT v2: the query meets a table of relative rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(2 * SIDE - 1, HEAD_DIM))
        distance = torch.arange(SIDE)[:, None] - torch.arange(SIDE)[None, :] + SIDE - 1
        self.register_buffer("distance", distance)

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * HEAD_DIM**-0.5
        grid = q.flatten(0, 1).unflatten(1, (SIDE, SIDE))
        bias = torch.einsum("bhwc,hkc->bhwk", grid, self.rows[self.distance])
        bias = bias.reshape(-1, HEADS, TOKENS, SIDE, 1)
        scores = (bias + scores.unflatten(3, (SIDE, SIDE))).flatten(3)
        return scores.softmax(-1) @ v


class AdditiveAttention(nn.Module):
    """SwiftFormer: a learned vector weighs the queries, whose sum meets every key."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.proj = (nn.Linear(DIM, DIM) for _ in range(3))
        self.weigh = nn.Parameter(torch.randn(DIM, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (F.normalize(part(x), dim=-1) for part in (self.query, self.key))
        weights = F.normalize((q @ self.weigh) * DIM**-0.5, dim=1)
        everything = (weights * q).sum(dim=1, keepdim=True)
        return x + self.proj(everything * k) + q


class ReluLinearAttention(Attention):
    """EfficientViT: no softmax; the sum of weights is carried in a column of ones."""

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.relu(q), F.relu(k)
        v = F.pad(v, (0, 1), value=1.0)
        with torch.autocast(device_type="cpu", enabled=False):
            out = q.float() @ (k.float().transpose(-2, -1) @ v.float())
            return out[..., :-1] / (out[..., -1:] + 1e-5)


# Attention that meets constants


class PositionMlp(Attention):
    """Swin V2: a small network on constant coordinates makes the bias of the scores."""

    def __init__(self) -> None:
        super().__init__()
        steps = torch.linspace(-1.0, 1.0, 2 * SIDE - 1)
        self.register_buffer("grid", torch.cartesian_prod(steps, steps))
        self.register_buffer("index", relative_index(SIDE))
        self.cpb1 = nn.Linear(2, 16)
        self.cpb2 = nn.Linear(16, HEADS, bias=False)

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        table = 16 * torch.sigmoid(self.cpb2(F.relu(self.cpb1(self.grid))))
        scores = q @ k.transpose(-2, -1) * HEAD_DIM**-0.5
        return (scores + table[self.index].permute(2, 0, 1)[None]).softmax(-1) @ v


class FourierPositions(Attention):
    """XCiT: waves over a mask as large as the batch, projected and added to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.waves = nn.Conv2d(16, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        here = ~torch.zeros(x.shape[0], SIDE, SIDE, dtype=torch.bool, device=x.device)
        step = 2 ** torch.arange(4, dtype=torch.float32)
        parts = []
        for axis in (1, 2):
            place = here.cumsum(axis, dtype=torch.float32) / SIDE
            angle = place[..., None] * step
            parts.append(torch.stack([angle.sin(), angle.cos()], dim=4).flatten(3))
        waves = torch.cat(parts, dim=3).permute(0, 3, 1, 2)
        return super().forward(x + tokens(self.waves(waves)))


class LearnedQuery(SeparateProjections):
    """Attention pooling: one learned query for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, 2, DIM))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q = split_heads(self.q_proj(self.latent.expand(x.shape[0], -1, -1)))
        k, v = split_heads(self.k_proj(y)), split_heads(self.v_proj(y))
        pooled = self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        return x + pooled.mean(dim=1, keepdim=True)
