"""Reconstruct a quantized network block by block against the float one.

Sources: Li et al., "BRECQ", ICLR 2021, arXiv:2102.05426 (blocks as units); Nagel et al.,
"AdaRound", ICML 2020, arXiv:2004.10568 (rounding); Wei et al., "QDrop", ICLR 2022,
arXiv:2203.05740 (randomly dropped quantization). The losses cite their own.
Deviations: biases are trained too, they cost nothing; scales are trained by their logarithm;
the loss of the last block is the KL divergence of the answers, as in the later methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vitcompress.calibration import Request
from vitcompress.errors import ConfigError
from vitcompress.graph import CapturedGraph
from vitcompress.passes.base import Fact, PassContext, PassReport, register
from vitcompress.passes.blocks import BlockOutcome, BlockSettings, BlockTask
from vitcompress.passes.losses import LOSSES, AnswersLoss
from vitcompress.passes.trainable import Coin, TrainableBlock
from vitcompress.passes.training import Training, block_report, train

__all__ = ["Reconstruct", "ReconstructConfig"]


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
        norm_rate: Of weights and biases of LayerNorms, which decide behind a fold how the
            codes of an activation are shared among its channels; 0 as published.
        scale_rate: Of the logarithms of scales.
        penalty: Weight of the penalty that drives roundings to a decision.
        warm_up: Share of the steps before that penalty sets in.
        quantized_input: Probability that an element of a block's input comes from the
            quantized network and not from the float one.
        quantized_inside: Probability that an element inside a block is quantized.
        mixed_precision: Multiply matrices in bfloat16 while training: faster where the
            processor has units for it. Quantizers, norms and losses stay in float32, and so
            does all that prepares a loss or judges a block.
    """

    loss: str = "mse"
    weights: Literal["adaround", "straight_through"] = "adaround"
    iterations: int = 20_000
    weight_rate: float = 1e-3
    bias_rate: float = 1e-4
    norm_rate: float = 0.0
    scale_rate: float = 4e-4
    penalty: float = 0.01
    warm_up: float = 0.2
    quantized_input: float = 0.5
    quantized_inside: float = 0.5
    mixed_precision: bool = False

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
            norm_rate=self.norm_rate,
            scale_rate=self.scale_rate,
            penalty=self.penalty,
            warm_up=self.warm_up,
            quantized_input=self.quantized_input,
            mixed_precision=self.mixed_precision,
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
        loss, inputs = LOSSES[self.config.loss], self.config.training().inputs
        if loss.needs_float_inputs:
            inputs = "both"
        records = context.engine.map_blocks(
            graph,
            context.teacher,
            context.source,
            self._fit,
            inputs=inputs,
            settings=self.config,
            seed=int(torch.randint(2**62, (), generator=context.generator)),
            answers=loss.needs_answers,
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
