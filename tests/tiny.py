"""Tiny models for tests, and short ways to run passes on them.

A freshly initialised vision transformer says almost nothing: its norms are the identity, its
attention is uniform and its logits are close to 0. ``enliven`` gives every norm, bias and
batch statistic a value of its own and sharpens attention, so that errors show in the logits.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.tensors import TensorSource
from vitcompress.calibration import CalibrationSource, Statistics
from vitcompress.calibration.interpreter import run
from vitcompress.engine import LocalEngine, PassRecord, run_recipe
from vitcompress.graph import CapturedGraph
from vitcompress.passes import Pass, PassContext, PassReport
from vitcompress.quantizers import Quantizer, QuantSpec, make_quantizer
from vitcompress.recipe import Recipe

QUERY_KEY_NAMES = ("qkv", "query", "key", "q_proj", "k_proj", "in_proj")


class TinyAttention(nn.Module):
    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(B, N, C))


class TinyBlock(nn.Module):
    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TinyAttention(dim, heads, bias)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 2 * dim, bias=bias)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class TinyViT(nn.Module):
    """Two plain blocks on 32 x 32 images: 16 patches and a class token."""

    def __init__(
        self,
        dim: int = 32,
        heads: int = 2,
        depth: int = 2,
        classes: int = 10,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=8, stride=8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, 17, dim))
        self.blocks = nn.Sequential(*(TinyBlock(dim, heads, bias) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return ``model`` in evaluation mode with parameters that all matter."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    for name, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)):
            if module.weight is not None:
                module.weight.copy_(torch.exp(0.5 * noise(module.weight)))
            if module.bias is not None:
                module.bias.copy_(0.5 * noise(module.bias))
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.copy_(0.3 * noise(module.running_mean))
            module.running_var.copy_(torch.exp(0.5 * noise(module.running_var)))
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            # Unit gain whatever the library's initialisation; attention a little above it.
            sharp = 1.5 if name.rpartition(".")[2] in QUERY_KEY_NAMES else 1.0
            fan_in = module.weight[0].numel()
            module.weight.copy_(sharp * noise(module.weight) / fan_in**0.5)
            if module.bias is not None:
                module.bias.copy_(0.2 * noise(module.bias))
    return model.eval()


def tiny_vit(seed: int = 0, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    return enliven(TinyViT(**settings), seed)


def images(count: int, size: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def smooth_images(count: int, size: int = 32, seed: int = 1) -> Tensor:
    """Return images whose neighbouring pixels agree, as natural ones' do.

    On white noise rounding to nearest cannot be improved upon: every error counts alike.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    return F.interpolate(coarse, (size, size), mode="bilinear") + 0.05 * fine


def make_source(
    images: Tensor, labels: Tensor | None = None, batch_size: int = 4
) -> CalibrationSource:
    return TensorSource(images, labels, batch_size=batch_size)


def run_pass(
    step: Pass,
    graph: CapturedGraph,
    source: CalibrationSource | None,
    teacher: CapturedGraph | None = None,
) -> PassReport:
    """Apply one pass to ``graph`` as the engine does, without the engine's checks."""
    engine = LocalEngine()
    requests = step.statistics(graph)
    statistics = engine.collect(graph, requests, source) if requests else Statistics()
    context = PassContext(
        statistics=statistics,
        source=source,
        reference=graph.clone(),
        teacher=(teacher or graph).clone(),
        engine=engine,
        generator=torch.Generator().manual_seed(0),
    )
    return step.apply(graph, context)


def run_steps(
    steps: Iterable[Mapping[str, Any]],
    graph: CapturedGraph,
    source: CalibrationSource,
    scheme: str = "W4A4",
) -> tuple[CapturedGraph, list[PassRecord]]:
    """Run passes written as in a recipe; ``graph`` is not changed."""
    recipe = {"schema": 1, "name": "test", "scheme": scheme, "passes": list(steps)}
    return run_recipe(Recipe.from_dict(recipe), graph, source)


def float_outputs(graph: CapturedGraph, images: Tensor) -> Tensor:
    """Return the first output with every quantizer bypassed."""
    return run(graph, images, bypass=True)[0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest magnitude expected."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def ranged(low: Tensor, high: Tensor, **spec: Any) -> Quantizer:
    """Return a quantizer that covers ``[low, high]``."""
    quantizer = make_quantizer(QuantSpec(**spec), "test")
    quantizer.set_range(low, high)
    return quantizer
