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
        runtime: What is to run the file; empty for any runtime.
        opset: ONNX opset of the file, unless 2-bit storage needs a later one.
        storage: Containers of weights of 2 to 4 bits. ``cast`` stores INT4 and casts to INT8
            before use, which runtimes fold when they load and then run as INT8; ``direct``
            dequantizes INT4 itself; ``int8`` has no narrower container.
        int2: Whether 2-bit weights are stored as INT2, cast like INT4.
        signed: What must be INT8 with zero point 0: codes less their zero points.
        linear: ``integer`` writes a linear as onnxruntime's ``MatMulIntegerToFloat``,
            ``matmul`` as ``MatMul`` and ``Add`` of floats between quantizers.
        attention: ``fused`` writes attention without quantizers as one ``Attention`` (opset
            23); ``products`` as two products and a softmax.
        rewrites: Names in ``export.rewrites.REWRITES``, applied to the graph first.
        residual: ``sum`` writes the additions in front of norms as ``Sum``, which keeps
            onnxruntime from a slow fusion.
        description: One line for people.
    """

    name: str
    runtime: Literal["onnxruntime", "OpenVINO", "TensorRT", ""]
    opset: int = 21
    storage: Literal["cast", "direct", "int8"]
    int2: bool = False
    signed: Literal["nothing", "weights", "everything"] = "nothing"
    linear: Literal["integer", "matmul"]
    attention: Literal["fused", "products"]
    rewrites: tuple[str, ...] = ()
    residual: Literal["add", "sum"] = "add"
    description: str


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="ort-cpu",
            opset=23,
            runtime="onnxruntime",
            storage="cast",
            int2=True,
            linear="integer",
            attention="fused",
            rewrites=tuple(REWRITES),
            residual="sum",
            description=(
                "onnxruntime on CPUs: its integer product, fused attention, INT4 cast to INT8"
            ),
        ),
        Target(
            name="openvino",
            runtime="OpenVINO",
            storage="cast",
            signed="weights",
            linear="matmul",
            attention="products",
            rewrites=("separate_projections", "keep_needed_rows"),
            description=(
                "OpenVINO on CPUs: weights without zero points, INT4 storage cast to INT8"
            ),
        ),
        Target(
            name="tensorrt",
            runtime="TensorRT",
            storage="int8",
            signed="everything",
            linear="matmul",
            attention="products",
            description="TensorRT: everything INT8 with zero point 0, no narrower type",
        ),
        Target(
            name="generic",
            runtime="",
            storage="direct",
            linear="matmul",
            attention="products",
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
