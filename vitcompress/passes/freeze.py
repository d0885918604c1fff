"""Freeze weights: replace each quantized weight by its integer codes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from vitcompress.calibration import Request
from vitcompress.errors import PassError
from vitcompress.graph import CapturedGraph
from vitcompress.numerics.metrics import sqnr_db
from vitcompress.passes.base import Fact, PassContext, PassReport, quantizers_of, register

__all__ = ["Freeze", "FreezeConfig"]


@dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """Freeze has no settings."""


#: Above this a weight lay on its codes before; what is left is single precision.
ON_CODES_DB = 100.0


@register
class Freeze:
    """Store weights as codes; the graph then reads them through ``dequantize``."""

    name: ClassVar[str] = "freeze"
    config_type: ClassVar[type] = FreezeConfig
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.FINAL})
    provides: frozenset[Fact] = frozenset({Fact.FINAL})
    preserves_function: ClassVar[bool] = True

    def __init__(self, config: FreezeConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        return []

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        quantizers = quantizers_of(graph)
        frozen: set[str] = set()
        warnings: list[str] = []
        signal_to_noise: dict[str, float] = {}
        for node in graph.nodes_of_kind("call_module"):
            target = str(node.target)
            weight = node.all_input_nodes[0]
            if target not in quantizers or weight.op != "get_attr":
                continue
            name, quantizer = str(weight.target), quantizers[target]
            if name in frozen:
                raise PassError(
                    f"{name}: two quantizers of different settings read this weight"
                )
            if any(str(user.target) not in quantizers for user in weight.users):
                raise PassError(
                    f"{name}: also read without a quantizer; quantize every reader"
                )
            values = graph.parameter(name)
            codes = quantizer.quantize(values)
            if codes.dtype not in (torch.int8, torch.uint8):
                raise PassError(f"{quantizer.site}: weights must be strict; set strict: true")
            noise = quantizer.dequantize(codes) - values
            ratio = sqnr_db(
                float(values.square().sum(dtype=torch.float64)),
                float(noise.square().sum(dtype=torch.float64)),
            )
            # A pass that has put a weight on its codes tells itself what that cost.
            if ratio < ON_CODES_DB:
                signal_to_noise[quantizer.site] = ratio
            graph.set_parameter(name, codes)
            quantizer.frozen = True
            frozen.add(name)
        for quantizer in quantizers.values():
            defect = quantizer.defect()
            if defect is not None:
                warnings.append(
                    f"{quantizer.site}: not strictly {quantizer.spec.bits} bits: {defect}"
                )
        return PassReport(
            changed=len(frozen),
            found=len(frozen),
            warnings=tuple(warnings),
            details={"weight_sqnr_db": signal_to_noise},
        )
