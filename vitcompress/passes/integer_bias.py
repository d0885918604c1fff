"""Integer bias: round each bias to whole steps of the product it is added to.

Ours, after what integer kernels do (ONNX ``QLinearConv``, onnxruntime's ``QGemm``): a bias is
added to the int32 accumulator, so it is a whole number of steps ``s_x s_w``. Left out of a
simulation, the simulated and the executed model differ systematically, by up to half a step in
every output; at 4 bits that is a percent of the next quantizer's step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from vitcompress.calibration import Request
from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import module_path
from vitcompress.graph.ops import is_op
from vitcompress.passes.base import Fact, PassContext, PassReport, quantizers_of, register
from vitcompress.quantizers import Affine, PerGroup, PerTensor

__all__ = ["IntegerBias", "IntegerBiasConfig", "rounded_bias"]

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class IntegerBiasConfig:
    """Integer bias has no settings."""


def rounded_bias(bias: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor | None:
    """Return the bias in whole steps of ``s_x s_w``, or ``None`` where int32 cannot hold it.

    Args:
        bias: ``[O]`` float.
        x_scale: Scale of the input, scalar.
        w_scale: Scale of the weight, scalar or ``[O]``.

    Returns:
        ``[O]`` float32.
    """
    # The steps are float32 in the file; the codes are found in double precision.
    steps = (x_scale.double() * w_scale.double()).float().double()
    codes = torch.round(bias.double() / steps)
    if bool((codes.abs() > _INT32_MAX).any()):
        return None
    return (codes * steps).float()


@register
class IntegerBias:
    """Round the biases of linears and convolutions whose input and weight are quantized."""

    name: ClassVar[str] = "integer_bias"
    config_type: ClassVar[type] = IntegerBiasConfig
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.FINAL})
    provides: frozenset[Fact] = frozenset({Fact.CALIBRATED})
    preserves_function: ClassVar[bool] = False

    def __init__(self, config: IntegerBiasConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        return []

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        changed, skipped = 0, {}
        layers = [node for node in graph.graph.nodes if is_op(node, ops.LINEAR, ops.CONV)]
        for node in layers:
            reason = self._round(graph, node)
            if reason is None:
                changed += 1
            else:
                path = module_path(node).path
                skipped[f"{path} ({node.name})" if path in skipped else path] = reason
        return PassReport(changed=changed, found=len(layers), skipped=skipped)

    def _round(self, graph: CapturedGraph, node: fx.Node) -> str | None:
        """Round one bias in the graph; return why not if it stays as it is."""
        known = quantizers_of(graph)
        x, weight, *rest = node.args
        bias = rest[0] if rest else None
        if not isinstance(bias, fx.Node) or bias.op != "get_attr":
            return "it has no stored bias"
        if len(bias.users) > 1:
            return "its bias serves another node"
        pair = []
        for operand in (x, weight):
            if not isinstance(operand, fx.Node) or not is_quantizer(operand):
                return "its input or weight is float"
            pair.append(known[str(operand.target)])
        first, second = pair
        if not isinstance(first, Affine) or type(first.spec.granularity) is not PerTensor:
            return f"its input is quantized as {first.spec.describe()}"
        if not isinstance(second, Affine) or isinstance(second.spec.granularity, PerGroup):
            return f"its weight is quantized as {second.spec.describe()}"
        name = str(bias.target)
        rounded = rounded_bias(graph.parameter(name), first.scale, second.scale)
        if rounded is None:
            return "its bias does not fit 32 bits at this scale"
        graph.set_parameter(name, rounded)
        return None
