"""Apply the passes of a recipe in order, and check after each what it claimed."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from vitcompress.calibration import CalibrationSource
from vitcompress.calibration.interpreter import run
from vitcompress.engine.local import LocalEngine
from vitcompress.engine.memory import PeakMemory
from vitcompress.errors import ConfigError, PassError, VitcompressError
from vitcompress.graph import CapturedGraph
from vitcompress.passes.base import Fact, Pass, PassContext, PassReport, holds
from vitcompress.recipe import Recipe

__all__ = ["PassRecord", "run_recipe"]

#: Largest change of the outputs, relative to their largest magnitude, that counts as none.
FUNCTION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class PassRecord:
    """One pass as it ran.

    Attributes:
        name: Registered name.
        report: What it reported.
        seconds: Wall time, data included.
        peak_memory_bytes: Largest resident memory of the process while it ran.
        function_change: Largest relative change of the float outputs; ``None`` if not checked.
    """

    name: str
    report: PassReport
    seconds: float
    peak_memory_bytes: int
    function_change: float | None


def run_recipe(
    recipe: Recipe,
    reference: CapturedGraph,
    source: CalibrationSource,
    engine: LocalEngine | None = None,
) -> tuple[CapturedGraph, list[PassRecord]]:
    """Return the compressed graph and a record of each pass.

    Args:
        recipe: Passes in order.
        reference: The float model; not changed.
        source: Calibration images.
        engine: Runs data through graphs; one without memory by default.

    Raises:
        PassError: A pass failed, or did not do what it claims.
    """
    graph = reference.clone()
    engine = engine or LocalEngine()
    generator = torch.Generator().manual_seed(recipe.seed)
    records: list[PassRecord] = []
    for index, step in enumerate(recipe.passes):
        started = time.perf_counter()
        where = f"passes[{index}] '{step.name}'"
        with PeakMemory() as memory:
            before = _outputs(graph, step)
            try:
                statistics = engine.collect(graph, step.statistics(graph), source)
                context = PassContext(
                    statistics=statistics,
                    source=source,
                    reference=reference,
                    engine=engine,
                    generator=generator,
                )
                report = step.apply(graph, context)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
            except VitcompressError as error:
                done = ", ".join(record.name for record in records) or "none"
                raise PassError(f"{where}: {error} (passes done before: {done})") from error
            change = _check(graph, step, before, where)
        records.append(
            PassRecord(
                step.name, report, time.perf_counter() - started, memory.peak_bytes, change
            )
        )
    return graph, records


def _outputs(graph: CapturedGraph, step: Pass) -> tuple[Tensor, ...] | None:
    """Return the outputs on noise that the pass promises to keep.

    Until weights are codes the promise is about the float function, quantizers off. Freezing
    promises the quantized function.
    """
    if not step.preserves_function:
        return None
    return run(graph, graph.example(), bypass=Fact.FINAL not in step.provides)


def _check(
    graph: CapturedGraph, step: Pass, before: tuple[Tensor, ...] | None, where: str
) -> float | None:
    graph.graph.lint()
    missing = [fact for fact in sorted(step.provides) if not holds(fact, graph)]
    if missing:
        raise PassError(f"{where}: claims {missing}, but the graph says otherwise")
    if before is None:
        graph.check()
        return None
    after = run(graph, graph.example(), bypass=Fact.FINAL not in step.provides)
    changes = [
        (a - b).abs().max() / b.abs().max().clamp(min=1e-12)
        for a, b in zip(after, before, strict=True)
    ]
    change = float(torch.stack(changes).max())  # NaN if any is, unlike the built-in max
    if not change <= FUNCTION_TOLERANCE:
        raise PassError(
            f"{where}: promises to keep the function, but outputs moved by {change:.2e} "
            f"relative to their largest; tolerance {FUNCTION_TOLERANCE:.0e}"
        )
    return change
