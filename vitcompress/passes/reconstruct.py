"""Reconstruct a quantized network block by block against the float one.

Sources: Li et al., "BRECQ", ICLR 2021, arXiv:2102.05426 (blocks as units); Nagel et al.,
"AdaRound", ICML 2020, arXiv:2004.10568 (rounding); Wei et al., "QDrop", ICLR 2022,
arXiv:2203.05740 (randomly dropped quantization). The losses cite their own.
Deviations: biases are trained too, they cost nothing; scales are trained by their logarithm;
the loss of the last block is the KL divergence of the answers, as in the later methods.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vitcompress.calibration import Request
from vitcompress.errors import ConfigError, PassError
from vitcompress.graph import CapturedGraph
from vitcompress.passes.base import Fact, PassContext, PassReport, register
from vitcompress.passes.blocks import (
    BlockOutcome,
    BlockRecord,
    BlockSettings,
    BlockTask,
    Inputs,
)
from vitcompress.passes.losses import LOSSES, AnswersLoss, BlockLoss
from vitcompress.passes.trainable import Coin, TrainableBlock

__all__ = ["Reconstruct", "ReconstructConfig", "Training", "block_report", "train"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one block is trained.

    Attributes:
        iterations: Steps.
        weight_rate: Learning rate of weights, or of their roundings.
        bias_rate: Of biases.
        scale_rate: Of the logarithms of scales; 0 leaves scales as they are.
        penalty: Weight of the penalty that drives roundings to a decision (lambda).
        warm_up: Share of the steps before that penalty sets in.
        quantized_input: Probability that an element of the input comes from the quantized
            network and not from the float one.
    """

    iterations: int
    weight_rate: float
    bias_rate: float
    scale_rate: float = 0.0
    penalty: float = 0.0
    warm_up: float = 0.2
    quantized_input: float = 1.0

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ConfigError(f"iterations: expected at least 1, got {self.iterations}")
        for name in ("weight_rate", "bias_rate", "scale_rate", "penalty"):
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


def train(
    block: TrainableBlock, task: BlockTask, loss: BlockLoss, training: Training
) -> dict[str, Any]:
    """Train a block in place and return figures of it.

    Raises:
        PassError: The loss is no longer finite.
    """
    before = held_out_error(block, task, training)
    loss.prepare(task, block.settled)
    optimizer, scheduler = _optimizer(block, training)
    entry = Coin(training.quantized_input, task.generator)
    values: list[float] = []
    refresh = training.iterations // loss.refreshes if loss.refreshes else 0
    with task.progress(training.iterations) as bar:
        for step in range(training.iterations):
            if refresh and step and step % refresh == 0:
                loss.refresh(task, block.quantized)
            images = torch.randperm(
                task.training, generator=task.generator, device=task.device
            )[: task.batch_size].cpu()
            output = block(*_mixed(task, images, entry))
            value = loss(output, task.targets.take(images), images)
            beta = penalty_exponent(step, training)
            total = value
            if beta is not None and training.penalty:
                total = value + training.penalty * block.penalty(beta)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(total)
            optimizer.step()
            scheduler.step()
            values.append(float(value.detach()))
            if not math.isfinite(values[-1]):
                raise PassError(
                    f"{task.path}: the loss is {values[-1]} after {step + 1} steps; "
                    "lower weight_rate or scale_rate"
                )
            bar.set_postfix_str(f"loss {values[-1]:.3g}")
            bar.update()
    tail = values[-max(len(values) // 10, 1) :]
    return {
        "loss_first": values[0],
        "loss_last": sum(tail) / len(tail),
        "held_out_before": before,
        "held_out_after": held_out_error(block, task, training),
        "undecided": block.undecided(),
        "untrained": block.untrained,
    }


def _optimizer(
    block: TrainableBlock, training: Training
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return Adam; every rate falls to 0 as a cosine, but for roundings, whose rate stays."""

    def cosine(step: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * step / training.iterations))

    groups = [
        (block.rounding_parameters, training.weight_rate, lambda step: 1.0),
        (block.weight_parameters, training.weight_rate, cosine),
        (block.bias_parameters, training.bias_rate, cosine),
        (block.scale_parameters, training.scale_rate, cosine),
    ]
    used = [group for group in groups if group[0]]
    optimizer = torch.optim.Adam([{"params": p, "lr": rate} for p, rate, _ in used])
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, [s for *_, s in used])


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
def held_out_error(block: TrainableBlock, task: BlockTask, training: Training) -> float | None:
    """Return the mean squared error on held-out images, all quantized; ``None`` if none."""
    total, count = 0.0, 0
    for images in task.batches(held_out=True):
        inputs = [rows.take(images) for rows in task.inputs or task.float_inputs]
        error = block.settled(*inputs) - task.targets.take(images)
        total += float(error.square().sum(dtype=torch.float64))
        count += error.numel()
    return total / count if count else None


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(BlockSettings):
    """Settings of reconstruct; the defaults are QDrop's published schedule.

    Attributes:
        loss: What counts as an error: ``mse``, ``fisher_diagonal`` (BRECQ), ``aph``
            (APHQ-ViT), ``fima`` (FIMA-Q), ``least_squares`` (LS-ViT), ``global_local``
            (GLF-Q).
        weights: ``adaround`` decides for each weight whether it is rounded up or down;
            ``straight_through`` trains weights, and their scales, through their rounding.
        iterations: Steps for each block.
        weight_rate: Learning rate of weights or roundings.
        bias_rate: Of biases.
        scale_rate: Of the logarithms of scales.
        penalty: Weight of the penalty that drives roundings to a decision.
        warm_up: Share of the steps before that penalty sets in.
        quantized_input: Probability that an element of a block's input comes from the
            quantized network and not from the float one.
        quantized_inside: Probability that an element inside a block is quantized.
    """

    loss: str = "mse"
    weights: Literal["adaround", "straight_through"] = "adaround"
    iterations: int = 20_000
    weight_rate: float = 1e-3
    bias_rate: float = 1e-4
    scale_rate: float = 4e-4
    penalty: float = 0.01
    warm_up: float = 0.2
    quantized_input: float = 0.5
    quantized_inside: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ConfigError(f"loss: expected one of {sorted(LOSSES)}, got '{self.loss}'")
        if not 0.0 < self.quantized_inside <= 1.0:
            raise ConfigError(
                f"quantized_inside: expected a value in (0, 1], got {self.quantized_inside}"
            )
        if self.quantized_input == 0.0:
            raise ConfigError("quantized_input: expected a value in (0, 1], got 0.0")
        self.training()

    def training(self) -> Training:
        """Return what concerns the training of one block."""
        return Training(
            iterations=self.iterations,
            weight_rate=self.weight_rate,
            bias_rate=self.bias_rate,
            scale_rate=self.scale_rate,
            penalty=self.penalty,
            warm_up=self.warm_up,
            quantized_input=self.quantized_input,
        )


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


@register
class Reconstruct:
    """Train the rounding, scales and biases of each block towards the float block."""

    name: ClassVar[str] = "reconstruct"
    config_type: ClassVar[type] = ReconstructConfig
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.FINAL})
    provides: frozenset[Fact] = frozenset({Fact.CALIBRATED})
    preserves_function: ClassVar[bool] = False

    def __init__(self, config: ReconstructConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        return []

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        inputs = self.config.training().inputs
        if LOSSES[self.config.loss].needs_float_inputs:
            inputs = "both"
        records = context.engine.map_blocks(
            graph,
            context.teacher,
            context.source,
            self._fit,
            inputs=inputs,
            settings=self.config,
            seed=int(torch.randint(2**62, (), generator=context.generator)),
        )
        return block_report(records, {"loss": self.config.loss})

    def _fit(self, task: BlockTask) -> BlockOutcome:
        training = self.config.training()
        block = TrainableBlock(
            task,
            weights=self.config.weights,
            scales=training.scale_rate > 0.0,
            coin=Coin(self.config.quantized_inside, task.generator),
        )
        loss = AnswersLoss() if task.is_last else LOSSES[self.config.loss]()
        return block.outcome(train(block, task, loss, training))
