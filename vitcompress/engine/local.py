"""The engine of one machine."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx
from tqdm import tqdm

from vitcompress.calibration import CalibrationSource, Request, Statistics
from vitcompress.calibration.interpreter import Visit, run, walk
from vitcompress.calibration.observers import Observer
from vitcompress.engine.blocks import BlockWalk
from vitcompress.engine.checkpoint import Checkpoint
from vitcompress.graph import CapturedGraph, enumerate_sites
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.patterns import Block, blocks
from vitcompress.passes.blocks import (
    BlockOutcome,
    BlockRecord,
    BlockSettings,
    BlockTask,
    Inputs,
)

__all__ = ["LocalEngine"]


class LocalEngine:
    """Runs data through graphs in this process; see ``passes.base.Engine``.

    Args:
        checkpoint: Where blocks that are finished are kept, if anywhere.
    """

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        self._checkpoint = checkpoint

    def collect(
        self, graph: CapturedGraph, requests: Sequence[Request], source: CalibrationSource
    ) -> Statistics:
        """Run the source once, quantizers off, and return what was asked."""
        statistics = Statistics()
        if not requests:
            return statistics
        sites = enumerate_sites(graph)
        observers: dict[fx.Node, list[Observer]] = {}
        for request in requests:
            observer = request.observer()
            statistics.add(request.site, observer)
            observers.setdefault(sites[request.site].value, []).append(observer)
        taps = {node: _updater(listening) for node, listening in observers.items()}
        for batch in tqdm(source, desc="calibrating", disable=None, leave=False):
            run(graph, batch.images, taps=taps, bypass=True)
        return statistics

    def walk(
        self,
        graph: CapturedGraph,
        source: CalibrationSource,
        visit: Visit,
        *,
        taps: Mapping[fx.Node, Callable[[list[Tensor]], None]] | None = None,
    ) -> None:
        """Run the source once in step, quantizer by quantizer."""
        with tqdm(
            total=len(graph.quantizers()), desc="calibrating", disable=None, leave=False
        ) as bar:

            def visit_and_count(node: fx.Node, values: list[Tensor]) -> None:
                visit(node, values)
                bar.update(is_quantizer(node))

            images = (batch.images for batch in source)
            walk(graph, images, visit_and_count, taps=taps)

    @torch.no_grad()
    def logits(self, graph: CapturedGraph, source: CalibrationSource) -> Tensor:
        """Run the source once through the graph as it is and return the logits, ``[N, O]``."""
        return torch.cat([graph.logits(batch.images) for batch in source])

    def map_blocks(
        self,
        graph: CapturedGraph,
        teacher: CapturedGraph,
        source: CalibrationSource,
        fit: Callable[[BlockTask], BlockOutcome],
        *,
        inputs: Inputs,
        settings: BlockSettings,
        seed: int,
        answers: bool = False,
        units: Callable[[CapturedGraph], Sequence[Block]] = blocks,
    ) -> list[BlockRecord]:
        """Reconstruct the graph block by block, in network order."""
        stage = None if self._checkpoint is None else self._checkpoint.stage()
        blockwise = BlockWalk(graph, teacher, settings, seed, stage, units)
        return blockwise.run(source, inputs, fit, answers=answers)


def _updater(observers: list[Observer]) -> Callable[[Tensor], None]:
    def update(value: Tensor) -> None:
        for observer in observers:
            observer.update(value)

    return update
