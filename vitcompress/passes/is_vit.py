"""I&S-ViT: three stages from a smooth loss to a quantized network.

Source: Zhong et al., "I&S-ViT: An Inclusive & Stable Method for Pushing the Limit of
Post-Training ViTs Quantization", arXiv:2311.10126; section numbers as there.
Deviations: losses are divided by their first value, which Adam hardly notices; a table of
position biases is not trained. The strict mode of the fold is that of ``repq_vit``: the common
zero point is a whole number, so that stage 2 changes nothing. The logarithm of section 4.1 is
a number format (``sulq``), attached by the recipe and searched with the other ranges.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from vitcompress.calibration import Request
from vitcompress.errors import ConfigError
from vitcompress.graph import CapturedGraph
from vitcompress.graph.edit import is_quantizer, replace_quantizer
from vitcompress.passes.base import Fact, PassContext, PassReport, quantizers_of, register
from vitcompress.passes.blocks import BlockOutcome, BlockSettings, BlockTask, Inputs
from vitcompress.passes.calibrate import Calibrate, CalibrateConfig
from vitcompress.passes.losses import AnswersLoss, MeanSquaredError
from vitcompress.passes.repq_vit import RepqVit, RepqVitConfig
from vitcompress.passes.trainable import TrainableBlock, WeightMode
from vitcompress.passes.training import Training, block_report, train
from vitcompress.quantizers import Quantizer

__all__ = ["IsVit", "IsVitConfig"]


@dataclass(frozen=True, kw_only=True)
class IsVitConfig(BlockSettings):
    """Settings of I&S-ViT.

    Attributes:
        mode: ``strict`` or ``paper``: how the common zero point of a fold is found.
        iterations: Steps for each block in stage 1 and again in stage 3; 1000 as published
            for 3 and 4 bits, 200 for 6.
        rate: Learning rate of weights and biases; falls to 0 as a cosine.
        calibration_images: The first so many images set the ranges.
        activation_percentiles: Candidate clips of activations.
        weight_percentiles: Candidate clips of weights.
    """

    mode: Literal["strict", "paper"] = "strict"
    iterations: int = 1000
    rate: float = 4e-5
    batch_size: int = 64
    calibration_images: int = 64
    activation_percentiles: tuple[float, ...] = (0.999, 0.9999, 0.99999)
    weight_percentiles: tuple[float, ...] = (
        *(0.97, 0.98, 0.99, 0.995),
        *(0.9995, 0.9997, 0.9999, 0.99995, 0.99999),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration_images < 1:
            raise ConfigError(
                f"calibration_images: expected at least 1, got {self.calibration_images}"
            )
        self.training("float")

    def training(self, inputs: Inputs) -> Training:
        """Return how a block is trained on inputs of one of the networks."""
        return Training(
            iterations=self.iterations,
            weight_rate=self.rate,
            bias_rate=self.rate,
            quantized_input=float(inputs == "quantized"),
        )


@register
class IsVit:
    """Calibrate and train a network with quantizers attached, in three stages."""

    name: ClassVar[str] = "is_vit"
    config_type: ClassVar[type] = IsVitConfig
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTACHED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED, Fact.FINAL})
    provides: frozenset[Fact] = frozenset({Fact.CALIBRATED})
    preserves_function: ClassVar[bool] = False

    def __init__(self, config: IsVitConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        return []

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        # 4.2 "Stage one": float weights, channel-wise activations behind LayerNorm
        with float_weights(graph):
            self._calibrate(graph, context)
            first = self._tuned(graph, context, "float", "float")
        # "Stage two": from channel-wise to layer-wise, weights still float
        fold = RepqVitConfig(
            mode=self.config.mode,
            method="percentile",
            percentiles=self.config.weight_percentiles,
        )
        folded = RepqVit(fold).apply(graph, context)
        # "Stage three": weights quantized as well
        self._calibrate_weights(graph, context)
        third = self._tuned(graph, context, "straight_through", "quantized")
        return PassReport(
            changed=third.changed,
            found=third.found,
            skipped={**folded.skipped, **third.skipped},
            warnings=folded.warnings,
            details={
                "mode": self.config.mode,
                "folded": folded.details["folded"],
                "stage_1": first.details,
                "stage_3": third.details,
            },
        )

    def _calibrate(self, graph: CapturedGraph, context: PassContext) -> None:
        config = CalibrateConfig(
            method="percentile",
            percentiles=self.config.activation_percentiles,
            sequential=True,
            images=self.config.calibration_images,
        )
        Calibrate(config).apply(graph, context)

    def _calibrate_weights(self, graph: CapturedGraph, context: PassContext) -> None:
        """Set the quantizers that the fold has not: those of the other weights."""
        config = CalibrateConfig(
            method="percentile", percentiles=self.config.weight_percentiles
        )
        Calibrate(config).apply(graph, context)

    def _tuned(
        self, graph: CapturedGraph, context: PassContext, weights: WeightMode, inputs: Inputs
    ) -> PassReport:
        training = self.config.training(inputs)

        def fit(task: BlockTask) -> BlockOutcome:
            block = TrainableBlock(task, weights=weights, scales=False)
            loss = AnswersLoss() if task.is_last else MeanSquaredError()
            return block.outcome(train(block, task, loss, training))

        records = context.engine.map_blocks(
            graph,
            context.teacher,
            context.source,
            fit,
            inputs=inputs,
            settings=self.config,
            seed=int(torch.randint(2**62, (), generator=context.generator)),
        )
        return block_report(records, {"inputs": inputs, "weights": weights})


@contextmanager
def float_weights(graph: CapturedGraph) -> Iterator[None]:
    """Take the quantizers of weights out of a graph for a while."""
    known: dict[str, Quantizer] = quantizers_of(graph)
    taken: dict[str, Any] = {
        str(node.target): known[str(node.target)]
        for node in graph.nodes_of_kind("call_module")
        if is_quantizer(node) and node.all_input_nodes[0].op == "get_attr"
    }
    for target in taken:
        replace_quantizer(graph, target, nn.Identity())
    try:
        yield
    finally:
        for target, quantizer in taken.items():
            replace_quantizer(graph, target, quantizer)
