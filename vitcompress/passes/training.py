"""How one block is trained: batches, rates, the penalty on roundings, figures.

Sources: Nagel et al., "AdaRound", ICML 2020, arXiv:2004.10568 (penalty); Wei et al., "QDrop",
ICLR 2022, arXiv:2203.05740 (mixed inputs).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitcompress.errors import ConfigError, PassError
from vitcompress.passes.base import PassReport
from vitcompress.passes.blocks import BlockRecord, BlockTask, Inputs
from vitcompress.passes.losses import BlockLoss
from vitcompress.passes.trainable import Coin, TrainableBlock

__all__ = [
    "Group",
    "Training",
    "block_report",
    "cosine",
    "descend",
    "figures",
    "held_out_error",
    "penalty_exponent",
    "train",
]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one block is trained.

    Attributes:
        iterations: Steps.
        weight_rate: Learning rate of weights, or of their roundings.
        bias_rate: Of biases.
        norm_rate: Of weights and biases of LayerNorms; 0 leaves them as they are.
        scale_rate: Of the logarithms of scales; 0 leaves scales as they are.
        penalty: Weight of the penalty that drives roundings to a decision (lambda).
        warm_up: Share of the steps before that penalty sets in.
        quantized_input: Probability that an element of the input comes from the quantized
            network and not from the float one.
        mixed_precision: Multiply matrices in bfloat16; quantizers stay in float32.
    """

    iterations: int
    weight_rate: float
    bias_rate: float
    norm_rate: float = 0.0
    scale_rate: float = 0.0
    penalty: float = 0.0
    warm_up: float = 0.2
    quantized_input: float = 1.0
    mixed_precision: bool = False

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ConfigError(f"iterations: expected at least 1, got {self.iterations}")
        for name in ("weight_rate", "bias_rate", "norm_rate", "scale_rate", "penalty"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("warm_up", "quantized_input"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(
                    f"{name}: expected a share in [0, 1], got {getattr(self, name)}"
                )

    @property
    def inputs(self) -> Inputs:
        """Which inputs of a block are needed."""
        if self.quantized_input == 1.0:
            return "quantized"
        return "float" if self.quantized_input == 0.0 else "both"


def penalty_exponent(step: int, training: Training) -> float | None:
    """Return beta: ``None`` while warming up, then from 20 to 2 in a straight line."""
    start = training.warm_up * training.iterations
    if step < start:
        return None
    return 20.0 - 18.0 * (step - start) / max(training.iterations - start, 1.0)


def cosine(step: int, steps: int) -> float:
    """Return the share of a learning rate that is left: from 1 to 0 as half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Group:
    """Parameters with a learning rate of their own; a rate falls to 0 unless it is steady."""

    parameters: Sequence[Tensor]
    rate: float
    steady: bool = False


def descend(
    task: BlockTask,
    groups: Sequence[Group],
    iterations: int,
    loss: Callable[[int, Tensor], tuple[Tensor, Tensor]],
) -> list[float]:
    """Run Adam on batches drawn without replacement, and return the loss at each step.

    Args:
        task: The block.
        groups: What is trained.
        iterations: Steps.
        loss: Of a step and of the numbers of its images: the loss that is shown, and what is
            minimised.

    Raises:
        PassError: The loss is no longer finite.
    """
    used = [group for group in groups if group.parameters and group.rate > 0.0]
    optimizer = torch.optim.Adam(
        [{"params": list(group.parameters), "lr": group.rate} for group in used]
    )
    values: list[float] = []
    with task.progress(iterations) as bar:
        for step in range(iterations):
            for group, entry in zip(used, optimizer.param_groups, strict=True):
                entry["lr"] = group.rate * (1.0 if group.steady else cosine(step, iterations))
            chosen = torch.randperm(
                task.training, generator=task.generator, device=task.device
            )
            value, total = loss(step, chosen[: task.batch_size].cpu())
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(total)
            optimizer.step()
            values.append(float(value.detach()))
            if not math.isfinite(values[-1]):
                raise PassError(
                    f"{task.path}: the loss is {values[-1]} after {step + 1} steps; "
                    "lower the learning rates"
                )
            bar.set_postfix_str(f"loss {values[-1]:.3g}")
            bar.update()
    return values


def figures(
    values: list[float], before: float | None, after: float | None, untrained: dict[str, str]
) -> dict[str, Any]:
    """Return what a report says of a block: losses, held-out errors, what was left alone."""
    tail = values[-max(len(values) // 10, 1) :]
    return {
        "loss_first": values[0],
        "loss_last": sum(tail) / len(tail),
        "held_out_before": before,
        "held_out_after": after,
        "untrained": untrained,
    }


def train(
    block: TrainableBlock, task: BlockTask, loss: BlockLoss, training: Training
) -> dict[str, Any]:
    """Train a block in place and return figures of it.

    Raises:
        PassError: The loss is no longer finite.
    """
    groups = [
        Group(block.rounding_parameters, training.weight_rate, steady=True),
        Group(block.weight_parameters, training.weight_rate),
        Group(block.bias_parameters, training.bias_rate),
        Group(block.norm_parameters, training.norm_rate),
        Group(block.scale_parameters, training.scale_rate),
    ]
    if not block.quantizes() or not any(g.parameters and g.rate > 0.0 for g in groups):
        return {"untrained": {**block.untrained, "all": "there is nothing to train yet"}}
    before = held_out_error(task, block.settled)
    loss.prepare(task, block.settled)
    entry = Coin(training.quantized_input, task.generator)
    refresh = training.iterations // loss.refreshes if loss.refreshes else 0

    def step_loss(step: int, images: Tensor) -> tuple[Tensor, Tensor]:
        if refresh and step and step % refresh == 0:
            loss.refresh(task, block.quantized)
        inputs = _mixed(task, images, entry)
        with torch.autocast(
            task.device.type, torch.bfloat16, enabled=training.mixed_precision
        ):
            output = block(*inputs)
        value = loss(output.float(), task.targets.take(images), images)
        beta = penalty_exponent(step, training)
        if beta is None or training.penalty == 0.0:
            return value, value
        return value, value + training.penalty * block.penalty(beta)

    values = descend(task, groups, training.iterations, step_loss)
    after = held_out_error(task, block.settled)
    details = figures(values, before, after, block.untrained)
    return {**details, "undecided": block.undecided()}


def _mixed(task: BlockTask, images: Tensor, coin: Coin) -> list[Tensor]:
    """Return the inputs of a block, mixed element by element from either network."""
    values = [rows.take(images) for rows in task.inputs or task.float_inputs]
    if not task.inputs or not task.float_inputs:
        return values
    plain = [rows.take(images) for rows in task.float_inputs]
    return [
        coin.mix(value, other) if value.is_floating_point() else value
        for value, other in zip(values, plain, strict=True)
    ]


@torch.no_grad()
def held_out_error(task: BlockTask, block: Callable[..., Tensor]) -> float | None:
    """Return the mean squared error of a block on held-out images; ``None`` without any."""
    total, count = 0.0, 0
    for images in task.batches(held_out=True):
        inputs = [rows.take(images) for rows in task.inputs or task.float_inputs]
        error = block(*inputs) - task.targets.take(images)
        total += float(error.square().sum(dtype=torch.float64))
        count += error.numel()
    return total / count if count else None


def block_report(records: Sequence[BlockRecord], details: dict[str, Any]) -> PassReport:
    """Return the report of a pass that walked through the blocks."""
    done = {record.path: record.details for record in records if not record.skipped}
    judged = [d for d in done.values() if d.get("held_out_before") is not None]
    better = sum(d["held_out_after"] < d["held_out_before"] for d in judged)
    skipped = {record.path: record.skipped for record in records if record.skipped}
    for path, figures in done.items():
        skipped.update({f"{path}: {n}": why for n, why in figures["untrained"].items()})
    return PassReport(
        changed=len(done),
        found=len(records),
        skipped=skipped,
        details={
            **details,
            "held_out_better": f"{better} of {len(judged)} blocks",
            "blocks": done,
        },
    )
