"""The engine of one machine."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from tqdm import tqdm

from vitcompress.calibration import CalibrationSource, Request, Statistics
from vitcompress.calibration.interpreter import Visit, run, walk
from vitcompress.calibration.observers import Observer
from vitcompress.graph import CapturedGraph, enumerate_sites
from vitcompress.graph.edit import is_quantizer

__all__ = ["LocalEngine"]


class LocalEngine:
    """Runs data through graphs in this process; see ``passes.base.Engine``."""

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
        beside: CapturedGraph | None = None,
    ) -> None:
        """Run the source once in step, quantizer by quantizer."""
        with tqdm(
            total=len(graph.quantizers()), desc="calibrating", disable=None, leave=False
        ) as bar:

            def visit_and_count(
                node: fx.Node, values: list[Tensor], floats: list[Tensor]
            ) -> None:
                visit(node, values, floats)
                bar.update(is_quantizer(node))

            walk(graph, (batch.images for batch in source), visit_and_count, beside=beside)

    @torch.no_grad()
    def logits(self, graph: CapturedGraph, source: CalibrationSource) -> Tensor:
        """Run the source once through the graph as it is and return the logits, ``[N, O]``."""
        return torch.cat([graph.logits(batch.images) for batch in source])


def _updater(observers: list[Observer]) -> Callable[[Tensor], None]:
    def update(value: Tensor) -> None:
        for observer in observers:
            observer.update(value)

    return update
