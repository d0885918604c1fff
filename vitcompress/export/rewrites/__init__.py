"""Rewrites of a finished graph that keep its function and cost a runtime less."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitcompress.calibration.interpreter import run
from vitcompress.errors import ExportError
from vitcompress.export.rewrites.patches import linear_patches
from vitcompress.export.rewrites.projections import separate_projections
from vitcompress.export.rewrites.rows import keep_needed_rows
from vitcompress.graph import CapturedGraph
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.moves import simplify_moves

__all__ = ["REWRITES", "Rewritten", "rewritten"]

#: By name, in the order in which they are applied: later ones find what earlier ones leave.
REWRITES = {
    "linear_patches": linear_patches,
    "separate_projections": separate_projections,
    "keep_needed_rows": keep_needed_rows,
    "simplify_moves": simplify_moves,
}
#: Largest change of the outputs, relative to their largest magnitude, that counts as none.
FUNCTION_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph.

    Attributes:
        graph: A copy.
        changed: How many places each rewrite changed, by its name.
    """

    graph: CapturedGraph
    changed: dict[str, int]


def rewritten(captured: CapturedGraph, names: tuple[str, ...] = tuple(REWRITES)) -> Rewritten:
    """Return a copy of a finished graph that computes the same with less work.

    Args:
        captured: Weights frozen; not changed.
        names: Which of ``REWRITES`` to apply.

    Raises:
        ExportError: A rewrite fails, or the copy computes something else, activation
            quantizers off: defects.
    """
    graph, changed = captured.clone(), {}
    for name, rewrite in REWRITES.items():
        if name in names:
            try:
                changed[name] = rewrite(graph)
                graph.recompile()
            except Exception as error:  # of whatever type: a defect, named
                raise ExportError(
                    f"{captured.provenance.model}: rewrite {name} fails on the graph: "
                    f"{error!r}; please report it"
                ) from error
    images = captured.example(3)
    before, after = (_without_activation_codes(g, images) for g in (captured, graph))
    for own, other in zip(before, after, strict=True):
        largest = own.abs().max().clamp(min=1e-12)
        change = float(torch.max((own - other).abs()) / largest)
        if not change <= FUNCTION_TOLERANCE:
            raise ExportError(
                f"{captured.provenance.model}: rewriting the graph moved its outputs by "
                f"{change:.1e} relative to their largest; please report it"
            )
    return Rewritten(graph, changed)


def _without_activation_codes(captured: CapturedGraph, images: Tensor) -> tuple[Tensor, ...]:
    """Run a graph with stored weights as they are and activations left float.

    Codes would turn differences in the last bit of a float into whole steps.
    """
    quantizers = captured.quantizers()
    passed = {
        node: lambda value: value
        for node in captured.graph.nodes
        if is_quantizer(node) and not getattr(quantizers[str(node.target)], "frozen", False)
    }
    return run(captured, images, replaced=passed)
