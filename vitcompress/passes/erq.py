"""ERQ: repair weights by ridge regression, against activation error and then weight error.

Source: Zhong, Huang, Hu, Zhang, Ji, "ERQ: Error Reduction for Post-Training Quantization of
Vision Transformers", ICML 2024, arXiv:2407.06794; headings as there.
Inputs come from the float network, as published: the step against activation error then
answers the layer's own input quantizer alone. Deviations: regularisation is relative to the
mean square of a channel and independent of the number of images; a layer with too few rows of
data (a classifier that reads one token of each image) is left out of the first step, which
would fit noise; the range of each row is searched by mean squared error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, fx

from vitcompress.calibration import Observer, RangeConfig, Request, fit_range
from vitcompress.errors import ConfigError
from vitcompress.graph import CapturedGraph, enumerate_sites
from vitcompress.numerics.rounding import (
    Grid,
    activation_correction,
    halving_rounds,
    refined_rounding,
    weight_correction,
)
from vitcompress.passes.base import Fact, PassContext, PassReport, register
from vitcompress.passes.layers import QuantizedLayer, output_error, quantized_layers

__all__ = ["Erq", "ErqConfig"]


@dataclass(frozen=True, kw_only=True)
class ErqConfig(RangeConfig):
    """Settings of ERQ; the inherited ones find the range of each row.

    Attributes:
        activation_strength: Regularisation of the step against activation error, in units of
            the mean square of an input channel.
        weight_strength: The same of the steps against weight error.
        rows_per_column: Rows of data for each input channel that the first step needs.
        refinements: Most moves to the other neighbour in each row and round.
        round_weights: Take the second step; without it the weights are left to a later pass.
    """

    method: Literal["minmax", "percentile", "mse", "output_mse"] = "mse"
    smallest: float = 0.4
    activation_strength: float = 0.1
    weight_strength: float = 0.01
    rows_per_column: float = 4.0
    refinements: int = 100
    round_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "output_mse":
            raise ConfigError("method: output_mse is for activations; weights take another")
        for name in ("activation_strength", "weight_strength"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"{name}: expected a value above 0")
        if self.rows_per_column < 1.0:
            raise ConfigError(
                f"rows_per_column: expected at least 1, got {self.rows_per_column}"
            )
        if self.refinements < 0:
            raise ConfigError(f"refinements: expected at least 0, got {self.refinements}")


class InputMoments(Observer):
    """Second moments of a layer's input x and its quantized form q, over rows.

    Rows are what the weight is multiplied with (``QuantizedLayer.rows``). ``result`` is the
    means of ``q q^T``, ``q (x - q)^T`` and ``(x - q) (x - q)^T``, each ``[I, I]`` double, and
    the number of rows, ``[]``.

    Args:
        layer: The layer; its quantizer is calibrated.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        self._layer = layer
        self._rows = 0
        self._sums: tuple[Tensor, ...] = ()

    def update(self, x: Tensor) -> None:
        quantizer = self._layer.input_quantizer
        exact = self._layer.rows(x, ones=True)
        taken = exact
        if quantizer is not None:
            taken = self._layer.rows(quantizer(x), ones=True)
        missing = exact - taken
        pairs = ((taken, taken), (taken, missing), (missing, missing))
        self._add(tuple((a.T @ b).double() for a, b in pairs), len(exact))

    def merge(self, other: Self) -> None:
        if other._rows:
            self._add(other._sums, other._rows)

    def result(self) -> tuple[Tensor, ...]:
        return *(total / self._rows for total in self._sums), torch.tensor(self._rows)

    def _add(self, sums: tuple[Tensor, ...], rows: int) -> None:
        if self._sums:
            sums = tuple(a + b for a, b in zip(self._sums, sums, strict=True))
        self._sums, self._rows = sums, self._rows + rows


# "Weight quantization error reduction"


def rounded_by_halves(
    matrix: Tensor, moments: Tensor, grid: Grid, columns: int, config: ErqConfig
) -> Tensor:
    """Return weights on the grid: half by half, each compensated by what is still free.

    Args:
        matrix: ``[O, I]`` double; columns from ``columns`` on (a bias) stay off the grid.
        moments: Second moment of the quantized input, ``[I, I]`` double.
        grid: The values weights can take.
        columns: How many leading columns are put on the grid.
        config: ``weight_strength`` and ``refinements`` are read.
    """
    result = matrix.clone()
    everything = torch.arange(matrix.shape[1])
    for start, stop in halving_rounds(columns):
        values = result[:, start:stop].clone()
        nearest = grid.nearest(values, slice(start, stop))
        chosen = refined_rounding(
            values,
            nearest,
            grid.other(values, nearest, slice(start, stop)),
            moments[start:stop, start:stop],
            config.refinements,
        )
        result[:, start:stop] = chosen
        if stop < matrix.shape[1]:
            result[:, stop:] += weight_correction(
                chosen - values,
                moments,
                everything[start:stop],
                everything[stop:],
                config.weight_strength,
            )
    return result


@register
class Erq:
    """Correct the weights of quantized layers in closed form, and round them."""

    name: ClassVar[str] = "erq"
    config_type: ClassVar[type] = ErqConfig
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.FINAL})
    provides: frozenset[Fact] = frozenset({Fact.CALIBRATED})
    preserves_function: ClassVar[bool] = False

    def __init__(self, config: ErqConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        layers, _ = quantized_layers(graph)
        names = _input_sites(graph)
        return [
            Request(names[node], partial(InputMoments, layer))
            for node, layer in layers.items()
        ]

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        layers, skipped = quantized_layers(graph)
        names = _input_sites(graph)
        kept: dict[str, float] = {}
        uncorrected: list[str] = []
        noise: dict[str, float] = {}
        for node, layer in layers.items():
            found = context.statistics.get(names[node], InputMoments)
            share = self._correct(graph, layer, *found)
            if self.config.round_weights:
                noise[layer.quantizer.site] = self._round(graph, layer, found[0])
            if share is None:
                uncorrected.append(layer.label)
            else:
                kept[layer.label] = share
        return PassReport(
            changed=len(layers),
            found=len(layers) + len(skipped),
            skipped=skipped,
            details={
                "activation_error_left": kept,
                "not_corrected": uncorrected,
                "weight_sqnr_db": noise,
            },
        )

    def _correct(
        self,
        graph: CapturedGraph,
        layer: QuantizedLayer,
        moments: Tensor,
        lost: Tensor,
        error: Tensor,
        rows: Tensor,
    ) -> float | None:
        """Return the share of the activation error that is left, ``None`` if not corrected."""
        matrix, columns = layer.matrix(graph)
        left = None
        quantized = layer.input_quantizer is not None
        if quantized and int(rows) >= self.config.rows_per_column * columns:
            added = activation_correction(
                matrix, moments, lost, self.config.activation_strength
            )
            before = output_error(matrix, error)
            gained = 2.0 * float((added * (matrix @ lost.T)).sum())
            left = (before - gained + output_error(added, moments)) / before
            matrix = matrix + added
            layer.store(graph, matrix)
        return left

    def _round(self, graph: CapturedGraph, layer: QuantizedLayer, moments: Tensor) -> float:
        """Put a weight on its grid; return its signal-to-noise ratio in dB."""
        matrix, columns = layer.matrix(graph)
        weight = graph.parameter(layer.weight)
        fit_range(layer.quantizer, weight, self.config)
        rounded = rounded_by_halves(matrix, moments, layer.grid(weight), columns, self.config)
        layer.store(graph, rounded)
        return layer.rounding_sqnr_db(matrix, rounded, columns)


def _input_sites(graph: CapturedGraph) -> dict[fx.Node, str]:
    """Return the name of the site of each operation's first argument."""
    return {s.reader: s.name for s in enumerate_sites(graph).values() if s.index == 0}
