"""Rotate the residual stream and the heads of a network, so that no channel stands out.

Source: GLF-Q, preprint 2026, "offline Hadamard rotation"; the steps follow Ashkboos et al.,
"SliceGPT", ICLR 2024, arXiv:2401.15024 (LayerNorm to RMSNorm) and "QuaRot", NeurIPS 2024,
arXiv:2404.00456. Every step folds into stored tensors: exact in float, free when it runs.

Row vectors, width C, M = I - (1/C) 1 1^T, R orthogonal:
``LN(x) = rms(x M) gamma + beta``, and ``rms(x R) = rms(x) R``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from vitcompress.calibration import Request
from vitcompress.errors import ConfigError
from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.edit import constant_node
from vitcompress.graph.heads import HeadMap, heads_of_operand, heads_of_output
from vitcompress.graph.metadata import list_argument, module_path, node_argument
from vitcompress.graph.patterns import Attention, attentions
from vitcompress.graph.residual import ResidualStream, residual_streams
from vitcompress.numerics.hadamard import random_rotation
from vitcompress.passes.base import Fact, PassContext, PassReport, register

__all__ = ["Hadamard", "HadamardConfig"]


@dataclass(frozen=True, kw_only=True)
class HadamardConfig:
    """Settings of hadamard.

    Attributes:
        residual: Make each LayerNorm that reads the residual stream an RMSNorm without affine,
            and rotate the stream.
        heads: Rotate queries and keys, and values, of each head.
    """

    residual: bool = True
    heads: bool = True

    def __post_init__(self) -> None:
        if not self.residual and not self.heads:
            raise ConfigError("residual and heads: expected at least one to be true")


@register
class Hadamard:
    """Rotate what the network writes and what reads it, by random Hadamard matrices."""

    name: ClassVar[str] = "hadamard"
    config_type: ClassVar[type] = HadamardConfig
    requires: ClassVar[frozenset[Fact]] = frozenset()
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTACHED})
    provides: frozenset[Fact] = frozenset()
    preserves_function: ClassVar[bool] = True

    def __init__(self, config: HadamardConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        return []

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        skipped: dict[str, str] = {}
        details: dict[str, Any] = {}
        if self.config.residual:
            streams, refused = residual_streams(graph)
            skipped.update(refused)
            details["streams"] = []
            for stream in streams:
                rotation = random_rotation(stream.channels, context.generator)
                norms = [module_path(group.norm).path for group in stream.norms]
                if rotation is None:
                    reason = f"there is no Hadamard matrix of size {stream.channels}"
                    skipped.update(dict.fromkeys(norms, reason))
                    continue
                fold_norms(graph, stream)
                rotate_stream(graph, stream, rotation)
                details["streams"].append({"channels": stream.channels, "norms": norms})
        if self.config.heads:
            details["heads"] = []
            for attention in list(attentions(graph)):
                path = module_path(attention.output).path
                reasons = rotate_heads(graph, attention, context.generator)
                skipped.update({f"{path}: {part}": why for part, why in reasons.items()})
                details["heads"] += [
                    f"{path}: {p}" for p in ("scores", "values") if p not in reasons
                ]
        graph.recompile()
        changed = len(details.get("heads", []))
        changed += sum(len(s["norms"]) for s in details.get("streams", []))
        return PassReport(
            changed=changed, found=changed + len(skipped), skipped=skipped, details=details
        )


# Step 1: "LayerNorm to RMSNorm"


def fold_norms(graph: CapturedGraph, stream: ResidualStream) -> None:
    """Move the affine of each norm into its readers, and the centring into the writers."""
    for group in stream.norms:
        norm = group.norm
        gamma, beta = (_stored(graph, norm, position) for position in (2, 3))
        for consumer in group.consumers:
            weight = _stored(graph, consumer.linear, 1)
            assert weight is not None
            if beta is not None:
                bias = _stored(graph, consumer.linear, 2)
                shift = weight @ beta
                _store(graph, consumer.linear, 2, shift if bias is None else bias + shift)
            if gamma is not None:
                _store(graph, consumer.linear, 1, weight * gamma)
        eps = norm.args[4] if len(norm.args) > 4 else 1e-5
        norm.target = ops.rms_norm
        norm.args = (norm.args[0], list_argument(norm, 1), None, eps)
    width = stream.channels
    centring = torch.eye(width, dtype=torch.float64) - 1.0 / width
    _map_writers(graph, stream, centring)


# Step 2: "residual rotation"


def rotate_stream(graph: CapturedGraph, stream: ResidualStream, rotation: Tensor) -> None:
    """Write ``x R`` instead of x, and let every reader undo it."""
    _map_writers(graph, stream, rotation)
    for group in stream.norms:
        for consumer in group.consumers:
            weight = _stored(graph, consumer.linear, 1)
            assert weight is not None
            _store(graph, consumer.linear, 1, weight @ rotation)


def _map_writers(graph: CapturedGraph, stream: ResidualStream, matrix: Tensor) -> None:
    """Multiply what is written into a stream by a matrix from the right."""
    for writer in stream.writers:
        weight, bias = _stored(graph, writer, 1), _stored(graph, writer, 2)
        assert weight is not None
        mapped = (matrix.T @ weight.flatten(1)).reshape(weight.shape)
        _store(graph, writer, 1, mapped)
        if bias is not None:
            _store(graph, writer, 2, bias @ matrix)
    for constant, axis in stream.constants.items():
        name = str(constant.target)
        value = graph.parameter(name)
        mapped = (value.double().movedim(axis, -1) @ matrix).movedim(-1, axis)
        graph.set_parameter(name, mapped.to(value.dtype).contiguous())


# Step 3: "per-head rotation"


def rotate_heads(
    graph: CapturedGraph, attention: Attention, generator: torch.Generator
) -> dict[str, str]:
    """Rotate queries with keys, and values with the projection behind them.

    Returns:
        Why ``scores`` or ``values`` were left as they are; empty if neither was.
    """
    skipped: dict[str, str] = {}
    if attention.scores is None:
        skipped["scores"] = "they are no product of queries and keys"
    else:
        query = heads_of_operand(attention.scores, 0, axis=-1)
        key = heads_of_operand(attention.scores, 1, axis=-2)
        reason = _rotate_rows(graph, [query, key], generator)
        if reason:
            skipped["scores"] = reason
    values = heads_of_operand(attention.output, 1 - attention.probs_index, axis=-1)
    readers = heads_of_output(attention.output)
    if attention.probs_index != 0:
        reason = "values are on the left of their product"
    else:
        reason = _rotate_rows(graph, [values], generator, readers)
    if reason:
        skipped["values"] = reason
    return skipped


def _rotate_rows(
    graph: CapturedGraph,
    producers: list[HeadMap | str],
    generator: torch.Generator,
    reader: HeadMap | str | None = None,
) -> str:
    """Rotate each head of what some linears compute, and the columns that read it.

    Returns:
        Why it cannot be done; empty if it was done.
    """
    maps: list[HeadMap] = []
    for found in (*producers, *(() if reader is None else (reader,))):
        if isinstance(found, str):
            return found
        maps.append(found)
    size = maps[0].channels.shape[1]
    if any(found.channels.shape[1] != size for found in maps):
        return "heads of different sizes meet"
    rotation = random_rotation(size, generator)
    if rotation is None:
        return f"there is no Hadamard matrix of size {size}"
    for index, found in enumerate(maps):
        weight = _stored(graph, found.linear, 1)
        assert weight is not None
        if index == len(producers):
            for columns in found.channels:
                weight[:, columns] = weight[:, columns] @ rotation
            _store(graph, found.linear, 1, weight)
            continue
        bias = _stored(graph, found.linear, 2)
        for rows in found.channels:
            weight[rows] = rotation.T @ weight[rows]
            if bias is not None:
                bias[rows] = bias[rows] @ rotation
        _store(graph, found.linear, 1, weight)
        if bias is not None:
            _store(graph, found.linear, 2, bias)
    return ""


# Tensors


def _stored(graph: CapturedGraph, reader: fx.Node, position: int) -> Tensor | None:
    """Return a copy of the tensor a node takes, in double precision; ``None`` without one."""
    node = reader.args[position] if len(reader.args) > position else None
    if not isinstance(node, fx.Node):
        return None
    return graph.parameter(str(node.target)).to(torch.float64, copy=True)


def _store(graph: CapturedGraph, reader: fx.Node, position: int, value: Tensor) -> None:
    """Replace the tensor a node takes, or give it one, in the precision of its weight."""
    weight = graph.parameter(str(node_argument(reader, 1).target))
    value = value.to(weight.dtype)
    if len(reader.args) > position and isinstance(reader.args[position], fx.Node):
        graph.set_parameter(str(node_argument(reader, position).target), value)
        return
    arguments = [*reader.args, *[None] * (position + 1 - len(reader.args))]
    arguments[position] = constant_node(graph, reader, "bias", value)
    reader.args = tuple(arguments)
