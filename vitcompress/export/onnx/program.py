"""From a compressed graph to ONNX with marker nodes where our formats and linears stand.

Markers live in a domain of their own, so the exporter and its optimiser pass them through, and
what they become is decided afterwards, on ONNX, where shapes and initializers are in view.
"""

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vitcompress.errors import ExportError
from vitcompress.export.onnx.attention import (
    FusedAttention,
    fusable_attentions,
    place_attention,
)
from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import module_path
from vitcompress.graph.ops import is_op
from vitcompress.quantizers import Quantizer

__all__ = ["DOMAIN", "marked_model"]

DOMAIN = "vitcompress"


class _QuantizerMarker(nn.Module):
    """Stands for a quantizer: it quantizes activations and dequantizes stored weights."""

    def __init__(self, target: str, frozen: bool) -> None:
        super().__init__()
        self.target = target
        self.kind = "Weight" if frozen else "Quantize"

    def forward(self, x: Tensor) -> Tensor:
        return _marker(self.kind, (x,), self.target, tuple(x.shape))


class _LinearMarker(nn.Module):
    """Stands for a linear layer with a stored weight."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        tensors = (x, weight) if bias is None else (x, weight, bias)
        return _marker("Linear", tensors, self.path, (*x.shape[:-1], weight.shape[0]))


class _AttentionMarker(nn.Module):
    """Stands for a fused attention core; see ``attention.FusedAttention``."""

    def __init__(self, path: str, fused: FusedAttention) -> None:
        super().__init__()
        self.path = path
        self.fused = fused

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *bias: Tensor) -> Tensor:
        attributes: dict[str, int | float] = {"scale": self.fused.scale}
        if query.dim() == 3:
            attributes["num_heads"] = self.fused.heads
        shape = (*query.shape[:-1], value.shape[-1])
        inputs = (query, key, value, *bias)
        return _marker("Attention", inputs, self.path, shape, attributes)


def _marker(
    kind: str,
    inputs: tuple[Tensor, ...],
    target: str,
    shape: tuple[int, ...],
    attributes: Mapping[str, int | float] | None = None,
) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}",
        inputs,
        {"target": target, **(attributes or {})},
        dtype=torch.float32,
        shape=shape,
        version=1,
    )
    return result


def marked_model(
    captured: CapturedGraph, *, opset: int, fuse_attention: bool = False
) -> ir.Model:
    """Return the graph as ONNX with markers.

    Args:
        captured: A finished graph; not changed.
        opset: Opset to export at.
        fuse_attention: Whether attention cores without quantizers become one marker each.

    Raises:
        ExportError: The exporter cannot translate an operation.
    """
    graph = captured.clone()
    for target, quantizer in graph.quantizers().items():
        assert isinstance(quantizer, Quantizer)
        graph.module.set_submodule(target, _QuantizerMarker(target, quantizer.frozen))
    if fuse_attention:
        for index, fused in enumerate(fusable_attentions(graph)[0]):
            name = f"attention_markers.{index}"
            path = module_path(fused.result).path
            graph.module.add_submodule(name, _AttentionMarker(path, fused))
            place_attention(graph, fused, name)
    seen: Counter[str] = Counter()
    for index, node in enumerate(list(graph.graph.nodes)):
        if is_op(node, ops.LINEAR) and is_quantizer(node.args[1]):
            name = f"linear_markers.{index}"
            path = module_path(node).path
            # One module may call several linears; their names must differ.
            label = f"{path}:{seen[path]}" if seen[path] else path
            seen[path] += 1
            graph.module.add_submodule(name, _LinearMarker(label))
            with graph.graph.inserting_before(node):
                marker = graph.graph.call_module(name, node.args)
            node.replace_all_uses_with(marker)
            graph.graph.erase_node(node)
    graph.recompile()
    outputs = [name or "output" for name in captured.output_names]
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                graph.module,
                (graph.example(),),
                dynamic_shapes=({0: Dim("batch", min=1)},),
                strict=False,
            )
            exported = torch.onnx.export(
                _decomposed(program),
                dynamo=True,
                opset_version=opset,
                input_names=["images"],
                output_names=outputs,
                verbose=False,
            )
    except Exception as error:  # the exporter's types are not public
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ExportError(
            f"{captured.provenance.model}: torch.onnx cannot translate the graph: {reason}"
        ) from error
    assert exported is not None
    return exported.model


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """Spare the exporter decomposing a program of whole, functional operators.

    It would trace everything anew, which takes longer than all else that it does.
    """
    decompose: Callable[..., ExportedProgram] = program.run_decompositions
    operators = {node.target for node in program.graph.nodes if node.op == "call_function"}

    def run_decompositions(table: dict[Any, Any] | None = None) -> ExportedProgram:
        if table is None or any(op in table or _changes_operands(op) for op in operators):
            return decompose(table)
        return program

    program.run_decompositions = run_decompositions
    return program


def _changes_operands(operator: Any) -> bool:
    return isinstance(operator, torch._ops.OpOverload) and operator._schema.is_mutable


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's banner, warnings and log lines off the terminal."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
