"""Which products of an optimised graph multiply integers, and which linears fell out.

A runtime tells an operator by its type; OpenVINO by its type and the precision of the kernel
that runs it, e.g. ``FullyConnected i8``.
"""

from collections.abc import Mapping, Sequence

__all__ = ["coverage", "float_products", "integer_ops", "is_integer_product"]

#: Fused operators of onnxruntime that multiply integers.
INTEGER_OPS = (
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
    "QLinearConv",
    "ConvInteger",
)
#: Operators of onnxruntime that multiply floats; fused attention has two products.
FLOAT_OPS = (
    *("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "TransposeMatMul", "Einsum"),
    *("Conv", "FusedConv", "MatMulNBits", "MatMulBnb4"),
    *("Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention"),
)
#: Products in OpenVINO, where the kernel tells integers from floats. Attention that it
#: fuses into a subgraph with other operators is not seen.
OPENVINO_PRODUCTS = ("FullyConnected", "MatMul", "Convolution", "ScaledDotProductAttention")
OPENVINO_INTEGERS = ("i8", "u8")


def is_integer_product(op: str) -> bool:
    """Return whether an operator of an optimised graph multiplies integers."""
    kind, _, precision = op.partition(" ")
    if precision:
        return kind in OPENVINO_PRODUCTS and precision in OPENVINO_INTEGERS
    return op in INTEGER_OPS


def integer_ops(ops: Mapping[str, int]) -> dict[str, int]:
    """Return how often each integer product occurs among the operators of a graph, by type."""
    return {op: count for op, count in ops.items() if count and is_integer_product(op)}


def float_products(ops: Mapping[str, int]) -> int:
    """Return how many products among the operators of a graph compute with floats."""
    found = 0
    for op, count in ops.items():
        kind, _, precision = op.partition(" ")
        known = OPENVINO_PRODUCTS if precision else FLOAT_OPS
        if kind in known and not is_integer_product(op):
            found += count
    return found


def coverage(
    nodes: Sequence[Sequence[str]], linears: Sequence[str], reasons: Mapping[str, str]
) -> tuple[int, dict[str, str]]:
    """Return how many linears run as integers, and the others with the reason.

    Args:
        nodes: Operator and name of each node of an optimised graph; a node that was fused
            from several may stand there once for each.
        linears: Names of the quantized linears in the file.
        reasons: Why some of them are known not to be integer products.
    """
    integer = {name for op, name in nodes if is_integer_product(op)}
    others = {name: op for op, name in nodes if not is_integer_product(op)}
    fell_out = {}
    for name in linears:
        if not any(
            found == name or found.startswith((f"{name}_", f"{name}/")) for found in integer
        ):
            seen = (
                f"runs as {others[name]}"
                if name in others
                else "was fused into something else"
            )
            fell_out[name] = reasons.get(name, seen)
    return len(linears) - len(fell_out), fell_out
