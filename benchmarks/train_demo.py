"""How accurate does the demo model get on digits it never saw?

Trains the digits vision transformer from scratch on the 1,197 training images and writes the
weights that ``vitcompress.demo.load_model`` ships. A few minutes on two cores. The settings
were fixed beforehand and the held-out images are read once, after the last step. Left out: any
search over settings, and other seeds.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from vitcompress.demo import DigitsViT, load_digits

BATCH = 64
PEAK_LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
WARMUP_FRACTION = 0.05
LABEL_SMOOTHING = 0.1

MAX_ROTATION_DEG = 10.0
MAX_SHIFT_PX = 0.75
MAX_LOG_SCALE = 0.12
NOISE_STD = 0.05


def uniform(n: int, limit: float, generator: torch.Generator) -> Tensor:
    """Return ``[n]`` values drawn evenly from [-limit, limit]."""
    return (2 * torch.rand(n, generator=generator) - 1) * limit


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images slightly turned, moved, resized and noised, each in its own way.

    Args:
        images: ``[B, 1, 8, 8]``, float in [-1, 1].
        generator: Source of randomness.

    Returns:
        ``[B, 1, 8, 8]``, float in [-1, 1].
    """
    B, size = images.shape[0], images.shape[-1]
    angle = uniform(B, math.radians(MAX_ROTATION_DEG), generator)
    scale = uniform(B, MAX_LOG_SCALE, generator).exp()
    # The grid spans [-1, 1], so one pixel is 2 / size.
    shift_x, shift_y = (uniform(B, MAX_SHIFT_PX * 2 / size, generator) for _ in range(2))
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(B, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Samples outside the image read 0, so ink must be counted from 0 and not from -1.
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    noise = NOISE_STD * torch.randn(moved.shape, generator=generator)
    return (moved + noise).clamp(-1, 1)


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the share of the peak rate at a step: linear warm-up, then half a cosine to 0."""
    warmup = max(1, round(WARMUP_FRACTION * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(epochs: int, seed: int) -> DigitsViT:
    """Return a model trained on the training split, in eval mode."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_digits("train")
    model = DigitsViT()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    steps = epochs * math.ceil(len(images) / BATCH)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            logits = model(augmented(images[rows], generator))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1:4d}: training loss {total / len(images):.4f}", flush=True)
    return model.eval()


@torch.inference_mode()
def top1_percent(model: DigitsViT, images: Tensor, labels: Tensor) -> float:
    """Return how many of the images are classified correctly, in percent."""
    return 100 * (model(images).argmax(dim=1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("digits_vit.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(2)
    start = time.perf_counter()
    model = train(arguments.epochs, arguments.seed)
    save_file(model.state_dict(), arguments.out)
    print(f"trained in {time.perf_counter() - start:.0f} s, written to {arguments.out}")
    print(f"training top-1 {top1_percent(model, *load_digits('train')):.2f} %")
    print(f"held-out top-1 {top1_percent(model, *load_digits('test')):.2f} %")


if __name__ == "__main__":
    main()
