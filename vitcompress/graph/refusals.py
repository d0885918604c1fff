"""What no pass, artefact or runtime could handle is refused at capture, by name and place."""

import torch
from torch import fx

from vitcompress.errors import UnsupportedModelError
from vitcompress.graph.metadata import TensorInfo, module_path
from vitcompress.graph.ops import op_name

__all__ = ["refuse_foreign_operators"]

COMPLEX = ("complex32", "complex64", "complex128")


def refuse_foreign_operators(graph: fx.Graph, model: str) -> None:
    """Check that a graph holds ATen operators on real numbers alone.

    Args:
        graph: A graph with our metadata.
        model: What to call the model in the message.

    Raises:
        UnsupportedModelError: It holds others; each kind is named with its first place.
    """
    found: dict[str, tuple[str, int]] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        reason = _reason_against(node)
        if reason is not None:
            place = module_path(node)
            where = f"{place.path or 'the model'}: {node.target}, {place.source}: {reason}"
            first, count = found.get(str(node.target), (where, 0))
            found[str(node.target)] = first, count + 1
    if found:
        listed = "; ".join(
            f"{where}{f' ({count} such nodes)' if count > 1 else ''}"
            for where, count in found.values()
        )
        raise UnsupportedModelError(f"{model}: cannot be compressed: {listed}")


def _reason_against(node: fx.Node) -> str | None:
    infos: tuple[TensorInfo, ...] = node.meta.get("infos", ())
    if "info" in node.meta:
        infos = (node.meta["info"],)
    if any(entry.dtype in COMPLEX for entry in infos):
        return (
            "it yields complex numbers, for which there are no quantizers and no integer "
            "kernels; write the spectral filter as a convolution or as products with real "
            "and imaginary parts"
        )
    try:
        op_name(node.target)
    except ValueError:
        library = _library(node.target)
        return (
            f"an operator of the extension '{library}', which cannot be stored or exported; "
            "switch the model to its implementation in plain PyTorch operators"
        )
    return None


def _library(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target.namespace)
    return str(getattr(target, "__module__", type(target).__name__))
