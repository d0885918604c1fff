"""GPTQ: round weights one column after another, each making good for those before it.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", ICLR 2023, arXiv:2210.17323; headings as there.
Layers are taken in graph order, and each sees inputs that went through the quantized layers
before it and through its own input quantizer. Deviations: the bias is a last column that is
never rounded and so takes what the weights leave (a constant error of the outputs); the range
of each row is searched by mean squared error before rounding; convolutions are rounded as
linears over their patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, fx

from vitcompress.calibration import RangeConfig, Request, fit_range
from vitcompress.errors import ConfigError
from vitcompress.graph import CapturedGraph
from vitcompress.numerics.rounding import damped, gptq
from vitcompress.passes.base import Fact, PassContext, PassReport, register
from vitcompress.passes.layers import QuantizedLayer, moment, output_error, quantized_layers

__all__ = ["Gptq", "GptqConfig"]


@dataclass(frozen=True, kw_only=True)
class GptqConfig(RangeConfig):
    """Settings of GPTQ; the inherited ones find the range of each row.

    Attributes:
        damping: Share of the mean diagonal added to the Hessian's diagonal.
        descending: Round the columns of largest input first ("act-order" of the public code).
    """

    method: Literal["minmax", "percentile", "mse", "output_mse"] = "mse"
    smallest: float = 0.4
    damping: float = 0.01
    descending: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "output_mse":
            raise ConfigError("method: output_mse is for activations; weights take another")
        if not self.damping > 0.0:
            raise ConfigError(f"damping: expected a value above 0, got {self.damping}")


@register
class Gptq:
    """Put the weights of every quantized layer on their grids, least output error first."""

    name: ClassVar[str] = "gptq"
    config_type: ClassVar[type] = GptqConfig
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.FINAL})
    provides: frozenset[Fact] = frozenset({Fact.CALIBRATED})
    preserves_function: ClassVar[bool] = False

    def __init__(self, config: GptqConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        return []

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        layers, skipped = quantized_layers(graph)
        errors: dict[str, float] = {}
        noise: dict[str, float] = {}

        def visit(node: fx.Node, values: list[Tensor]) -> None:
            if node in layers:
                layer = layers[node]
                error, ratio = self._round(graph, layer, values)
                errors[layer.label], noise[layer.quantizer.site] = error, ratio

        context.engine.walk(graph, context.source, visit)
        return PassReport(
            changed=len(layers),
            found=len(layers) + len(skipped),
            skipped=skipped,
            details={"error_of_nearest": errors, "weight_sqnr_db": noise},
        )

    def _round(
        self, graph: CapturedGraph, layer: QuantizedLayer, values: list[Tensor]
    ) -> tuple[float, float]:
        """Round one layer.

        Returns:
            Its output error relative to that of nearest rounding, and the signal-to-noise
            ratio of its weight in dB.
        """
        inputs = [layer.rows(value, ones=True) for value in values]
        hessian = moment([(rows, rows) for rows in inputs])
        weight = graph.parameter(layer.weight)
        fit_range(layer.quantizer, weight, self.config)
        matrix, columns = layer.matrix(graph)
        grid = layer.grid(weight)
        rounded = gptq(
            matrix,
            damped(hessian, self.config.damping, columns),
            grid,
            columns=columns,
            descending=self.config.descending,
        )
        layer.store(graph, rounded)
        nearest = matrix.clone()
        nearest[:, :columns] = grid.nearest(matrix[:, :columns], slice(columns))
        plain = output_error(nearest - matrix, hessian)
        left = output_error(rounded - matrix, hessian) / plain if plain > 0 else 1.0
        return left, layer.rounding_sqnr_db(matrix, rounded, columns)
