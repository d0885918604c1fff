"""Finished graphs for tests of what follows: every site at eight bits, weights stored."""

from functools import cache
from typing import Any

import torch
from drawn import Drawing
from families import FAMILIES, family_graph
from small import noise
from tiny import make_source, ranged, relative_error, run_steps
from torch import fx
from zoo import zoo_graph

from vitcompress.export.rewrites import _without_activation_codes
from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import node_argument
from vitcompress.graph.ops import is_op
from vitcompress.numerics.metrics import cosine

#: Everything per tensor, but for weights.
EVERYTHING = (
    {"sites": ["*"]},
    {"roles": ["weight"], "granularity": "per_channel"},
)


def frozen(graph: CapturedGraph, *rules: dict[str, Any]) -> CapturedGraph:
    """Return a finished copy of a graph: ``EVERYTHING``, then rules that win over it."""
    steps = [
        {"pass": "attach", "rules": [*EVERYTHING, *rules]},
        {"pass": "calibrate", "method": "minmax"},
        {"pass": "freeze"},
    ]
    source = make_source(noise(4, *graph.input_shape))
    return run_steps(steps, graph, source, scheme="W8A8")[0]


@cache
def frozen_network(name: str) -> CapturedGraph:
    """Return a finished small network of a library. Not to be changed: clone it."""
    return frozen(family_graph(name) if name in FAMILIES else zoo_graph(name))


def stored_weight(draw: Drawing, rows: int, columns: int, **spec: Any) -> fx.Node:
    """Return a stored weight of eight bits, one scale a row by default."""
    count = len([node for node in draw.graph.nodes if node.op == "call_module"])
    codes = noise(rows, columns, seed=count).mul(40).round().clamp(-127, 127)
    quantizer = ranged(torch.tensor(-1.0), torch.tensor(1.0), bits=8, symmetric=True, **spec)
    shape = quantizer.spec.granularity.parameter_shape((rows, columns))
    scale = torch.linspace(0.005, 0.015, torch.Size(shape).numel()).reshape(shape)
    quantizer.load(scale=scale, zero_point=torch.zeros(shape))
    quantizer.frozen = True
    return draw.quantized(draw.tensor(codes), quantizer, f"weight_{count}")


def bytes_of(draw: Drawing, value: fx.Node, site: str, **spec: Any) -> fx.Node:
    """Return a value at eight bits, one scale by default."""
    quantizer = ranged(torch.tensor(-4.0), torch.tensor(4.0), bits=8, **spec)
    return draw.quantized(value, quantizer, site)


@torch.no_grad()
def assert_same_function(before: CapturedGraph, after: CapturedGraph) -> None:
    """Compare graphs with activations in float, and with their codes.

    A code may be another one where the last bit of a float decides: hence the cosine.
    """
    for batch in (1, 3):
        x = noise(batch, *before.input_shape, seed=batch + 100)
        pairs = zip(
            _without_activation_codes(before, x),
            _without_activation_codes(after, x),
            strict=True,
        )
        for expected, found in pairs:
            assert relative_error(found, expected) <= 1e-5
        for expected, found in zip(before.module(x), after.module(x), strict=True):
            assert found.shape == expected.shape
            assert cosine(found, expected) > 0.999


def weighted(graph: CapturedGraph) -> dict[str, list[fx.Node]]:
    """Return the linears and convolutions by the site of their weight's quantizer."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if is_op(node, ops.LINEAR, ops.CONV) and is_quantizer(node.args[1]):
            quantizer = graph.quantizers()[str(node_argument(node, 1).target)]
            found.setdefault(str(quantizer.site), []).append(node)
    return found
