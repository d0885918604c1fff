"""The contract of a pass: declare statistics, apply, report; the facts that order passes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, fx

from vitcompress.calibration import CalibrationSource, Request, Statistics
from vitcompress.calibration.interpreter import Visit
from vitcompress.graph import CapturedGraph
from vitcompress.graph.patterns import Block, blocks
from vitcompress.passes.blocks import (
    BlockOutcome,
    BlockRecord,
    BlockSettings,
    BlockTask,
    Inputs,
)
from vitcompress.quantizers import Quantizer

__all__ = [
    "PASSES",
    "Engine",
    "Fact",
    "Pass",
    "PassContext",
    "PassReport",
    "holds",
    "quantizers_of",
    "register",
]


class Fact(StrEnum):
    """Predicates that are checked on the graph itself."""

    ATTACHED = "attached"
    CALIBRATED = "calibrated"
    FINAL = "final"


def quantizers_of(graph: CapturedGraph) -> dict[str, Quantizer]:
    """Return the quantizers of a graph by target, in graph order."""
    return {t: q for t, q in graph.quantizers().items() if isinstance(q, Quantizer)}


def holds(fact: Fact, graph: CapturedGraph) -> bool:
    """Return whether a fact is true of a graph."""
    found = quantizers_of(graph)
    if fact is Fact.ATTACHED:
        return bool(found)
    if fact is Fact.CALIBRATED:
        return bool(found) and all(q.calibrated for q in found.values())
    # Every weight is stored as codes; activations are quantized as they come.
    stored = [
        found[str(node.target)]
        for node in graph.nodes_of_kind("call_module")
        if str(node.target) in found and node.all_input_nodes[0].op == "get_attr"
    ]
    return bool(found) and all(q.frozen for q in stored)


class Engine(Protocol):
    """The only roads from a pass to the data."""

    def collect(
        self, graph: CapturedGraph, requests: Sequence[Request], source: CalibrationSource
    ) -> Statistics:
        """Run the source once through the graph, quantizers off, and return what was asked."""

    def walk(
        self,
        graph: CapturedGraph,
        source: CalibrationSource,
        visit: Visit,
        *,
        taps: Mapping[fx.Node, Callable[[list[Tensor]], None]] | None = None,
    ) -> None:
        """Run the source once through the graph in step; see ``calibration.interpreter``."""

    def logits(self, graph: CapturedGraph, source: CalibrationSource) -> Tensor:
        """Run the source once through the graph as it is and return the logits, ``[N, O]``."""

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
        """Reconstruct a graph block by block, in network order.

        Args:
            graph: Quantized; each outcome is put into it before the next block begins.
            teacher: Float network of the same blocks: what the blocks are to compute.
            source: Images.
            fit: Reconstructs one block.
            inputs: What blocks are fed with. Those of the quantized network come from the
                blocks in front as they were left.
            settings: How data are kept.
            seed: Of all that is random.
            answers: Whether to record what the float network answers, for all blocks.
            units: The blocks of a graph; what lies between them counts where it is quantized.

        Returns:
            One record for each block: its figures, or why it was left alone.
        """


@dataclass(frozen=True, kw_only=True)
class PassContext:
    """What a pass is given besides the graph.

    Attributes:
        statistics: Answers to the pass's requests.
        source: Calibration images.
        reference: The float model, as captured.
        teacher: The float network in the graph's own coordinates: as earlier passes had left
            it when quantizers were attached.
        engine: Runs data through graphs.
        generator: Seeded; the only source of randomness.
    """

    statistics: Statistics
    source: CalibrationSource
    reference: CapturedGraph
    teacher: CapturedGraph
    engine: Engine
    generator: torch.Generator


@dataclass(frozen=True, kw_only=True)
class PassReport:
    """What a pass did.

    Attributes:
        changed: How many places it changed.
        found: How many it looked at.
        skipped: Places left alone, with the reason.
        warnings: What the user should know.
        details: Figures of the pass's own, JSON types.
    """

    changed: int
    found: int
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Pass(Protocol):
    """One method. Facts are checked before and after; claims are verified by the engine."""

    name: ClassVar[str]
    config_type: ClassVar[type]
    requires: ClassVar[frozenset[Fact]]
    forbids: ClassVar[frozenset[Fact]]
    provides: frozenset[Fact]  # an instance may claim less than its class, by its settings
    preserves_function: ClassVar[bool]
    config: Any  # an instance of ``config_type``

    def __init__(self, config: Any) -> None: ...

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        """Return what the pass needs to know about the data; empty for data-free passes."""

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        """Edit the graph in place and return what was done."""


_PassType = TypeVar("_PassType", bound=type[Pass])

#: Registered passes by name.
PASSES: dict[str, type[Pass]] = {}


def register(cls: _PassType) -> _PassType:
    """Class decorator: make a pass known under its name."""
    PASSES[cls.name] = cls
    return cls
