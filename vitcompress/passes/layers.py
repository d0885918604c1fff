"""What the passes that repair weights share: layers, their inputs as rows, their grids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import info, module_path, node_argument
from vitcompress.graph.ops import is_op
from vitcompress.numerics.metrics import sqnr_db
from vitcompress.numerics.rounding import Grid
from vitcompress.passes.base import quantizers_of
from vitcompress.quantizers import Affine, Quantizer

__all__ = ["QuantizedLayer", "moment", "output_error", "quantized_layers"]


@dataclass(frozen=True)
class QuantizedLayer:
    """A linear or convolution whose stored weight is quantized.

    Attributes:
        node: The operation.
        label: For reports: path of its module, and its name where one module has several.
        weight: Name of the weight.
        bias: Name of the bias if it is stored and no one else reads it.
        quantizer: Of the weight.
        input_quantizer: Of the input, ``None`` where that is float.
    """

    node: fx.Node
    label: str
    weight: str
    bias: str | None
    quantizer: Affine
    input_quantizer: Quantizer | None

    def rows(self, value: Tensor, *, ones: bool) -> Tensor:
        """Return what the weight's rows are multiplied with, ``[M, I]``.

        Args:
            value: Input of the layer.
            ones: Add the column of ones that a bias is multiplied with, if there is a bias.
        """
        if is_op(self.node, ops.CONV):
            kernel = tuple(int(e) for e in info(node_argument(self.node, 1)).shape[2:])
            stride, padding, dilation, _ = _geometry(self.node)
            patches = F.unfold(value, kernel, dilation, padding, stride)
            rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
        else:
            rows = value.reshape(-1, value.shape[-1])
        return F.pad(rows, (0, 1), value=1.0) if ones and self.bias is not None else rows

    def matrix(self, graph: CapturedGraph) -> tuple[Tensor, int]:
        """Return weight and bias as one matrix, and how many columns are the weight's.

        Returns:
            ``[O, I]`` double, the bias as last column if there is one, and ``I`` or ``I - 1``.
        """
        weight = graph.parameter(self.weight)
        rows = weight.reshape(len(weight), -1).double()
        if self.bias is None:
            return rows, rows.shape[1]
        bias = graph.parameter(self.bias).double()
        return torch.cat([rows, bias[:, None]], dim=1), rows.shape[1]

    def store(self, graph: CapturedGraph, matrix: Tensor) -> None:
        """Replace weight and bias by those of a matrix as :meth:`matrix` returns it."""
        shape = graph.parameter(self.weight).shape
        columns = shape[1:].numel()
        graph.set_parameter(self.weight, matrix[:, :columns].float().reshape(shape))
        if self.bias is not None:
            graph.set_parameter(self.bias, matrix[:, columns].float())

    def rounding_sqnr_db(self, exact: Tensor, rounded: Tensor, columns: int) -> float:
        """Return the signal-to-noise ratio of the weight's rounding.

        Args:
            exact: Matrix before, as :meth:`matrix` returns it.
            rounded: Matrix after.
            columns: How many columns are the weight's.
        """
        signal, noise = exact[:, :columns], (rounded - exact)[:, :columns]
        return sqnr_db(float(signal.square().sum()), float(noise.square().sum()))

    def grid(self, weight: Tensor) -> Grid:
        """Return the values that the present parameters of the weight's quantizer allow."""
        granularity = self.quantizer.spec.granularity
        shape = granularity.view(weight).shape
        scale, zero_point = (
            granularity.broadcast(parameter, weight)
            .double()
            .expand(shape)
            .reshape(len(weight), -1)
            for parameter in (self.quantizer.scale, self.quantizer.zero_point)
        )
        return Grid(scale, zero_point, *self.quantizer.bounds)


def quantized_layers(
    graph: CapturedGraph,
) -> tuple[dict[fx.Node, QuantizedLayer], dict[str, str]]:
    """Return the layers that can be repaired, and why not the others, by their labels."""
    known = quantizers_of(graph)
    found: dict[fx.Node, QuantizedLayer] = {}
    skipped: dict[str, str] = {}
    for node in graph.graph.nodes:
        if not is_op(node, ops.LINEAR, ops.CONV):
            continue
        path = module_path(node).path
        taken = path in skipped or any(layer.label == path for layer in found.values())
        label = f"{path} ({node.name})" if taken else path
        operand = node_argument(node, 1)
        quantizer = known.get(str(operand.target)) if is_quantizer(operand) else None
        reason = _reason_against(node, operand, quantizer)
        if reason is not None:
            skipped[label] = reason
            continue
        assert isinstance(quantizer, Affine)
        source = node_argument(node, 0)
        bias = node.args[2] if len(node.args) > 2 else None
        stored = isinstance(bias, fx.Node) and bias.op == "get_attr" and len(bias.users) == 1
        found[node] = QuantizedLayer(
            node,
            label,
            str(node_argument(operand, 0).target),
            str(bias.target) if isinstance(bias, fx.Node) and stored else None,
            quantizer,
            known.get(str(source.target)) if is_quantizer(source) else None,
        )
    return found, skipped


def moment(rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean of ``a b^T`` over the rows of all pairs, ``[I, J]`` double."""
    total = sum((a.T @ b).double() for a, b in rows)
    assert isinstance(total, Tensor)
    return total / sum(len(a) for a, _ in rows)


def output_error(difference: Tensor, moment: Tensor) -> float:
    """Return the mean squared output error, summed over outputs, of a change of weights."""
    return float(((difference @ moment) * difference).sum())


def _reason_against(
    node: fx.Node, operand: fx.Node, quantizer: Quantizer | None
) -> str | None:
    if quantizer is None:
        return "its weight is float"
    if not isinstance(quantizer, Affine):
        return f"its weight is quantized as {quantizer.spec.describe()}"
    stored = node_argument(operand, 0)
    if stored.op != "get_attr":
        return "its weight is computed"
    if len(stored.users) > 1 or len(operand.users) > 1:
        return "its weight serves several layers"
    if is_op(node, ops.CONV):
        if node.target is not ops.convolution[2]:
            return "only plain two-dimensional convolutions are unfolded"
        if _geometry(node)[3] != 1:
            return "its convolution has groups"
    return None


_Pair = tuple[int, ...]


def _geometry(node: fx.Node) -> tuple[_Pair, _Pair, _Pair, int]:
    """Return stride, padding, dilation and groups of a two-dimensional convolution."""
    given: list[Any] = list(node.args[3:7])
    defaults: list[Any] = [(1, 1), (0, 0), (1, 1), 1]
    stride, padding, dilation, groups = given + defaults[len(given) :]
    return tuple(stride), tuple(padding), tuple(dilation), groups
