"""Where one worker computes cells, one after the other."""

import time
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path

import yaml
from torch import Tensor, fx

from vitcompress import api
from vitcompress.calibration import CalibrationSource, Request, Statistics
from vitcompress.engine import LocalEngine
from vitcompress.evaluate import Recorder, Replay, evaluate
from vitcompress.graph import CapturedGraph
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import node_argument
from vitcompress.recipe import Recipe
from vitcompress.report import CompressionReport
from vitcompress.result import Origin, Outcomes, Result
from vitcompress.sweep.shared import SharedFiles, StoredImages

__all__ = ["Bench", "SharingEngine", "peak_bytes"]


class Bench:
    """Computes the cells of one sweep from its shared files.

    Args:
        folder: What :class:`vitcompress.sweep.shared.SharedFiles` wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.shared = SharedFiles(folder)
        self.graph = self.shared.graph()
        self.engine = SharingEngine(self.graph, self.shared)

    def compute(self, origin: Origin, command: str | None) -> Result:
        """Return the result of one cell.

        Raises:
            VitcompressError: A pass failed.
        """
        started = time.perf_counter()
        recipe = Recipe.from_dict(yaml.safe_load(origin.resolved_recipe), where=origin.recipe)
        calibration = self.shared.images(origin.calibration)
        images = self.shared.images(origin.evaluation)
        compressed = api.compress(
            recipe,
            self.graph,
            calibration,
            engine=self.engine,
            model_digest=origin.model_digest,
            expected=self.shared.logits(calibration),
        )
        reference = self.shared.logits(images)
        recorder = Recorder(compressed.graph.logits)
        entry = evaluate(recorder, images, reference=Replay(reference))
        report = compressed.report
        protocol = report.protocol.model_copy(update={"command": command})
        return Result(
            origin=origin,
            execution="simulated",
            outcomes=Outcomes.of(recorder.logits(), reference, images.labels),
            report=report.model_copy(
                update={"protocol": protocol, "evaluations": (*report.evaluations, entry)}
            ),
            seconds=round(time.perf_counter() - started, 3),
            command=command,
        )


def peak_bytes(report: CompressionReport) -> int:
    """Return the largest resident size that a report tells of."""
    passes = [entry.peak_memory_bytes for entry in report.passes]
    return max(passes + [entry.peak_memory_bytes for entry in report.stages], default=0)


class SharingEngine(LocalEngine):
    """Answers from memory what does not depend on a cell's recipe.

    The float model's logits were computed once for all cells. The latest statistics of the
    untouched float model are kept, since cells of one recipe and seed ask for the same at
    every width. Passes that look at a changed graph, or walk it in step, get answers of their
    own.
    """

    def __init__(self, reference: CapturedGraph, shared: SharedFiles) -> None:
        self._reference = reference
        self._shared = shared
        self._question: Hashable = None
        self._answer = Statistics()

    def collect(
        self, graph: CapturedGraph, requests: Sequence[Request], source: CalibrationSource
    ) -> Statistics:
        """Return statistics, those in memory if the same were asked before."""
        question = _question(requests) if self._computes_the_same(graph) else None
        if question is None:
            return super().collect(graph, requests, source)
        if self._question != (question, source.digest()):
            self._answer = super().collect(graph, requests, source)
            self._question = question, source.digest()
        return self._answer

    def logits(self, graph: CapturedGraph, source: CalibrationSource) -> Tensor:
        """Return logits, those in the shared files for the float model."""
        if graph is self._reference and isinstance(source, StoredImages):
            return self._shared.logits(source)
        return super().logits(graph, source)

    def _computes_the_same(self, graph: CapturedGraph) -> bool:
        """Return whether a graph is the float model with, at most, quantizers attached."""
        known, found = self._reference.tensors(), graph.tensors()
        return (
            known.keys() == found.keys()
            and all(found[name].data_ptr() == known[name].data_ptr() for name in known)
            and _program(graph) == _program(self._reference)
        )


def _program(graph: CapturedGraph) -> list[tuple[str, object, str]]:
    """Return the nodes and what they read, quantizers looked through."""

    def name(node: fx.Node) -> str:
        return node_argument(node, 0).name if is_quantizer(node) else node.name

    return [
        (node.name, node.target, str(fx.map_arg((node.args, node.kwargs), name)))
        for node in graph.graph.nodes
        if not is_quantizer(node)
    ]


def _question(requests: Sequence[Request]) -> Hashable:
    """Return what is asked in a form that can be compared; ``None`` where it cannot be."""
    asked = []
    for request in requests:
        observer = request.observer
        arguments: tuple[object, ...] = ()
        kind: object = observer
        if isinstance(observer, partial):
            kind = observer.func
            arguments = (*observer.args, *sorted(observer.keywords.items()))
        elif not isinstance(observer, type):
            return None  # a closure says nothing about what it holds
        if not all(isinstance(value, (int, float, str, tuple)) for value in arguments):
            return None
        asked.append((request.site, kind, arguments))
    return tuple(asked) or None
