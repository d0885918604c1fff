"""One block at a time: what a reconstruction pass is given of it, and what it gives back.

The engine owns the data: it records what goes into each block and what the float network
makes of it, in bounded memory, walks the blocks in network order, puts results into the graph
and keeps them in a checkpoint. A pass brings the mathematics: a function from a task to an
outcome.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx

from vitcompress.errors import ConfigError, UnsupportedModelError
from vitcompress.graph import CapturedGraph, Role, enumerate_sites
from vitcompress.graph.metadata import list_argument
from vitcompress.graph.partition import BlockProgram, extract_block
from vitcompress.graph.patterns import Block

__all__ = [
    "BlockOutcome",
    "BlockRecord",
    "BlockSettings",
    "BlockTask",
    "FloatRest",
    "Inputs",
    "Progress",
    "Rows",
    "numbered",
]

#: Which values a block is fed with: of the float network, of the quantized one, or either.
Inputs = Literal["float", "quantized", "both"]


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """How the engine keeps the data of a reconstruction pass.

    Attributes:
        held_out: Share of the images on which blocks are judged and not trained, in [0, 1).
        batch_size: Images in a step of training, and in every other run of a block.
        device: Where blocks run; ``auto`` takes a GPU if there is one.
        cache_memory_mb: Memory for recorded values; what goes beyond lies in temporary files.
        cache_half: Record values in half precision.
    """

    held_out: float = 0.125
    batch_size: int = 32
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache_memory_mb: int = 2048
    cache_half: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.held_out < 1.0:
            raise ConfigError(f"held_out: expected a share in [0, 1), got {self.held_out}")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, got {self.batch_size}")
        if self.cache_memory_mb < 0:
            raise ConfigError(
                f"cache_memory_mb: expected at least 0, got {self.cache_memory_mb}"
            )


def numbered(count: int, batch_size: int, *, first: int = 0) -> list[Tensor]:
    """Return the numbers from ``first`` up to ``count``, batch by batch."""
    starts = range(first, count, batch_size)
    return [torch.arange(start, min(start + batch_size, count)) for start in starts]


class Rows(Protocol):
    """One value for every image."""

    def take(self, images: Tensor) -> Tensor:
        """Return the value for some images, given by number, as one batch on the device."""

    def put(self, images: Tensor, values: Tensor) -> None:
        """Store the value for some images."""


class Progress(Protocol):
    """Shows how far the training of a block has come."""

    def update(self, n: int = 1) -> object:
        """Count ``n`` steps."""

    def set_postfix_str(self, s: str) -> None:
        """Show a few words behind the bar."""


@dataclass(frozen=True, kw_only=True)
class BlockTask:
    """One block to reconstruct.

    Attributes:
        path: Module path of the block.
        unit: The quantized block; its tensors and quantizers are the graph's own: copy them.
        inputs: Its inputs in the quantized network; empty if the pass did not ask for them.
        float_inputs: Its inputs in the float network; empty if the pass did not ask for them.
        targets: What the float network computes from the latter.
        answers: What the float network answers in the end: logits, ``[B, O]``; none if the
            pass did not ask for them.
        training: Number of images to train on: those from 0.
        images: Number of all images; the others are held out.
        batch_size: Images in a batch.
        is_last: The output is that of the network.
        shared: Tensors that another block reads too: must stay as they are.
        rest: The float network behind the block.
        device: Where to compute.
        generator: The only source of randomness; its seed belongs to this block alone.
        new_rows: Makes room for one value of the given shape for every image.
        progress: Shows the training, given its number of steps.
    """

    path: str
    unit: BlockProgram
    inputs: tuple[Rows, ...]
    float_inputs: tuple[Rows, ...]
    targets: Rows
    answers: Rows | None
    training: int
    images: int
    batch_size: int
    is_last: bool
    shared: frozenset[str]
    rest: "FloatRest"
    device: torch.device
    generator: torch.Generator
    new_rows: Callable[[tuple[int, ...]], Rows]
    progress: Callable[[int], AbstractContextManager[Progress]]

    def batches(self, *, held_out: bool = False) -> list[Tensor]:
        """Return the numbers of the training (or held-out) images, batch by batch."""
        if held_out:
            return numbered(self.images, self.batch_size, first=self.training)
        return numbered(self.training, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class BlockOutcome:
    """What became of a block.

    Attributes:
        tensors: New values of tensors of the graph, by name.
        quantizers: New parameters of quantizers, by target and parameter name.
        details: Figures, JSON types.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    quantizers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """One block as it went.

    Attributes:
        path: Module path of the block.
        skipped: Why it was left alone; empty if it was not.
        seconds: Wall time; of the first run, if the outcome comes from a checkpoint.
        details: Figures of the pass.
    """

    path: str
    skipped: str = ""
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


class FloatRest:
    """The float network from the output of a block on.

    Args:
        teacher: The float network.
        block: The block in it.
        device: Where to compute.
    """

    def __init__(self, teacher: CapturedGraph, block: Block, device: torch.device) -> None:
        self._teacher = teacher
        self._block = block
        self._device = device

    def logits(self, output: Tensor) -> Tensor:
        """Return the classifier's output, ``[B, O]``, for outputs of the block.

        Raises:
            UnsupportedModelError: The rest reads other values besides.
        """
        return self._run(self._whole, output)[0]

    def features(self, output: Tensor) -> Tensor:
        """Return what the classifier reads, ``[B, C]``, for outputs of the block.

        Raises:
            UnsupportedModelError: The rest reads other values besides, or ends in no linear.
        """
        return torch.cat([f.flatten(1) for f in self._run(self._trunk, output)], dim=1)

    @cached_property
    def _whole(self) -> "_Rest":
        names = self._teacher.output_names
        index = names.index("logits") if "logits" in names else 0
        return self._program([list_of_outputs(self._teacher)[index]])

    @cached_property
    def _trunk(self) -> "_Rest":
        sites = enumerate_sites(self._teacher).values()
        values = dict.fromkeys(s.value for s in sites if s.role is Role.HEAD_INPUT)
        if not values:
            raise UnsupportedModelError(
                f"{self._block.path}: the network ends in no linear layer, so there are no "
                "features in front of it; choose another loss"
            )
        return self._program(list(values))

    def _program(self, wanted: list[fx.Node]) -> "_Rest":
        own = set(self._block.nodes)
        starts: dict[fx.Node, None] = {}
        members: set[fx.Node] = set()
        pending = list(wanted)
        while pending:
            node = pending.pop()
            if node in own or node.op == "placeholder":
                starts[node] = None
            elif node not in members and node.op != "get_attr" and "symbol" not in node.meta:
                members.add(node)
                pending.extend(node.all_input_nodes)
        if len(starts) != 1 or not own.issuperset(starts):
            raise UnsupportedModelError(
                f"{self._block.path}: what follows also reads {[n.name for n in starts]}, so "
                "it is no function of this block's output; choose the loss 'mse'"
            )
        nodes = tuple(n for n in self._teacher.graph.nodes if n in members)
        if not nodes:
            return _Rest(None, (0,) * len(wanted))
        program = extract_block(self._teacher, Block(self._block.path, nodes))
        program.module.to(self._device)
        return _Rest(program, tuple(program.outputs.index(node) for node in wanted))

    @staticmethod
    def _run(rest: "_Rest", output: Tensor) -> list[Tensor]:
        values = (output,) if rest.program is None else rest.program.module(output)
        return [values[place] for place in rest.places]


@dataclass(frozen=True)
class _Rest:
    """A program and which of its outputs are wanted; no program if the input is wanted."""

    program: BlockProgram | None
    places: tuple[int, ...]


def list_of_outputs(graph: CapturedGraph) -> list[fx.Node]:
    """Return the nodes whose values are the outputs, in order."""
    return list(list_argument(graph.output_node, 0))
