"""Switch quantizers by units and measure: everything, or the coarse before the fine."""

import heapq
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from vitcompress.analyze.records import Distance, Level, Mode
from vitcompress.calibration import Batch
from vitcompress.calibration.interpreter import run
from vitcompress.graph import CapturedGraph
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.patterns import blocks
from vitcompress.numerics.metrics import kl_divergence, sqnr_db
from vitcompress.passes.base import quantizers_of

__all__ = ["Bench", "Search", "Unit", "harm"]


class Bench:
    """The quantized graph, its switches, and the images.

    Attributes:
        graph: The quantized graph.
        targets: Its quantizers.
        slowest: Seconds of the slowest measurement so far.
    """

    def __init__(
        self, graph: CapturedGraph, reference: CapturedGraph, batches: Sequence[Batch]
    ) -> None:
        self.graph = graph
        self.targets = tuple(quantizers_of(graph))
        self._batches = batches
        self.slowest = 0.0
        names = graph.output_names
        self._output = names.index("logits") if "logits" in names else 0
        with torch.no_grad():
            self._expected = torch.cat([reference.logits(b.images) for b in batches])

    def distance(self, off: frozenset[str]) -> Distance:
        """Return the distance of the logits with some quantizers bypassed."""
        started = time.perf_counter()
        bypassed = {
            node: _same
            for node in self.graph.graph.nodes
            if is_quantizer(node) and str(node.target) in off
        }
        found = torch.cat(
            [
                run(self.graph, batch.images, replaced=bypassed)[self._output]
                for batch in self._batches
            ]
        )
        expected = self._expected
        self.slowest = max(self.slowest, time.perf_counter() - started)
        agreed = found.argmax(dim=-1) == expected.argmax(dim=-1)
        return Distance(
            mean_kl=float(kl_divergence(expected, found).mean()),
            logits_sqnr_db=sqnr_db(
                float(expected.double().square().sum()),
                float((found - expected).double().square().sum()),
            ),
            agreement_percent=100.0 * float(agreed.double().mean()),
        )


def _same(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Unit:
    """Quantizers that are switched together."""

    name: str
    level: Level
    targets: frozenset[str]


def _units(graph: CapturedGraph) -> dict[Level, list[Unit]]:
    """Return the units of every level in graph order; each level covers all quantizers."""
    paths = [block.path for block in blocks(graph)]
    grouped: dict[Level, dict[str, list[str]]] = {"block": {}, "layer": {}, "site": {}}
    for target, quantizer in quantizers_of(graph).items():
        module = quantizer.site.partition(":")[0]
        inside = (p for p in paths if module == p or module.startswith(f"{p}."))
        names: dict[Level, str] = {
            "block": next(inside, module),
            "layer": module,
            "site": quantizer.site,
        }
        for level, name in names.items():
            grouped[level].setdefault(name, []).append(target)
    return {
        level: [Unit(name, level, frozenset(targets)) for name, targets in groups.items()]
        for level, groups in grouped.items()
    }


class Search:
    """Measures units, the coarse ones first where time is short.

    Attributes:
        units: All of them by level.
        known: What was measured, by quantizers; a block of one layer is measured once.
    """

    def __init__(self, bench: Bench, mode: Mode, by: Level, deadline: float | None) -> None:
        self.units = _units(bench.graph)
        self.known: dict[frozenset[str], Distance] = {}
        self._bench = bench
        self._mode = mode
        self._by = by
        self._deadline = deadline

    def run(self) -> list[tuple[Unit, Distance]]:
        """Return what was measured before the deadline, if there is one."""
        found: list[tuple[Unit, Distance]] = []
        total = len(self.units[self._by])
        with tqdm(total=total, desc="measuring", disable=None, leave=False) as bar:
            for unit in self._order(found):
                distance = self._measure(unit)
                if distance is None:
                    break
                found.append((unit, distance))
                bar.update(unit.level == self._by)
        listed = {unit for unit, _ in found}
        # A block of a single quantizer has told of that one as well.
        found += [
            (unit, self.known[unit.targets])
            for unit in self.units[self._by]
            if unit not in listed and unit.targets in self.known
        ]
        return found

    def _order(self, found: list[tuple[Unit, Distance]]) -> Iterator[Unit]:
        """Yield units: all of one level, or blocks and then the parts of the worst ones."""
        if self._deadline is None:
            yield from self.units[self._by]
            return
        waiting: list[tuple[float, int, Unit]] = []
        count = 0
        parts = self.units["block"]
        while True:
            for unit in parts:
                yield unit
                count += 1
                damage, _ = harm(found[-1][1], self._mode)
                heapq.heappush(waiting, (-damage, count, unit))
            while waiting and waiting[0][2].level == self._by:
                heapq.heappop(waiting)
            if not waiting:
                return
            parts = self._parts(heapq.heappop(waiting)[2])

    def _parts(self, unit: Unit) -> list[Unit]:
        finer: Level = "layer" if unit.level == "block" else "site"
        return [part for part in self.units[finer] if part.targets <= unit.targets]

    def _measure(self, unit: Unit) -> Distance | None:
        """Return the distance with a unit alone or left out; ``None`` if time is up."""
        if unit.targets not in self.known:
            now = time.perf_counter()
            if self._deadline is not None and now + self._bench.slowest > self._deadline:
                return None
            everything = frozenset(self._bench.targets)
            off = unit.targets if self._mode == "except" else everything - unit.targets
            self.known[unit.targets] = self._bench.distance(off)
        return self.known[unit.targets]


def harm(distance: Distance, mode: Mode) -> tuple[float, float]:
    """Return what a unit does by KL and by noise; larger is worse."""
    sign = 1.0 if mode == "only" else -1.0
    return sign * distance.mean_kl, -sign * distance.logits_sqnr_db
