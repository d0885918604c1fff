"""Targets as data: what a runtime wants to see. No class per target."""

from dataclasses import dataclass
from typing import Literal

from vitcompress.errors import ConfigError
from vitcompress.export.rewrites import REWRITES

__all__ = ["TARGETS", "Target", "find_target"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """How a graph is spelled.

    Attributes:
        name: Name on the command line.
        opset: ONNX opset of the file, unless 2-bit storage needs a later one.
        low_bit_weights: ``cast`` stores INT4 or INT2 and casts to INT8 before dequantizing,
            which runtimes fold when they load and then run as INT8; ``direct`` dequantizes the
            stored type itself.
        linear: ``integer`` writes a linear as onnxruntime's ``MatMulIntegerToFloat``; ``gemm``
            as ``Gemm`` with an int32 bias, which its CPU kernels fuse; ``matmul`` as
            ``MatMul`` and ``Add``.
        attention: ``fused`` writes attention without quantizers as one ``Attention`` (opset
            23); ``products`` as two products and a softmax.
        rewrites: Names in ``export.rewrites.REWRITES``, applied to the graph first.
        residual: ``sum`` writes the additions in front of norms as ``Sum``, which keeps
            onnxruntime from a slow fusion.
        description: One line for people.
    """

    name: str
    opset: int = 21
    low_bit_weights: Literal["cast", "direct"]
    linear: Literal["integer", "gemm", "matmul"]
    attention: Literal["fused", "products"]
    rewrites: tuple[str, ...]
    residual: Literal["add", "sum"]
    description: str


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="ort-cpu",
            opset=23,
            low_bit_weights="cast",
            linear="integer",
            attention="fused",
            rewrites=tuple(REWRITES),
            residual="sum",
            description=(
                "onnxruntime on CPUs: its integer product, fused attention, INT4 cast to INT8"
            ),
        ),
        Target(
            name="generic",
            low_bit_weights="direct",
            linear="matmul",
            attention="products",
            rewrites=(),
            residual="add",
            description="plain QDQ of standard operators, INT4 weights dequantized directly",
        ),
    )
}


def find_target(name: str) -> Target:
    """Return the target called ``name``.

    Raises:
        ConfigError: There is none.
    """
    if name not in TARGETS:
        raise ConfigError(f"target: expected one of {sorted(TARGETS)}, got '{name}'")
    return TARGETS[name]
