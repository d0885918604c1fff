"""Walk the blocks of a graph in network order, and give each to a pass to be reconstructed.

Values live as long as a later block reads them: memory grows with one block, not with depth.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from tqdm import tqdm

from vitcompress.calibration import CalibrationSource
from vitcompress.engine.cache import CachedRows, ConstantRows, RowStore
from vitcompress.engine.checkpoint import StageCheckpoint
from vitcompress.errors import ConfigError, PassError, UnsupportedModelError
from vitcompress.graph import CapturedGraph
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.metadata import info
from vitcompress.graph.partition import BlockProgram, batch_factor, chain, extract_block
from vitcompress.graph.patterns import Block
from vitcompress.passes.base import quantizers_of
from vitcompress.passes.blocks import (
    BlockOutcome,
    BlockRecord,
    BlockSettings,
    BlockTask,
    FloatRest,
    Inputs,
    Progress,
    numbered,
)

__all__ = ["BlockWalk", "chosen_device"]

_Values = dict[fx.Node, CachedRows | ConstantRows]


def chosen_device(name: str) -> torch.device:
    """Return the device that a setting names.

    Raises:
        ConfigError: It is a GPU, and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is not available here; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass
class _Side:
    """One of the two networks: its chain of blocks, and the values that are alive."""

    graph: CapturedGraph
    chain: Sequence[Block]
    values: _Values


class BlockWalk:
    """One walk through the blocks of a graph.

    Args:
        graph: Quantized; outcomes are put into it.
        teacher: Float, with the same blocks.
        settings: How data are kept.
        seed: Of all that is random; each block derives its own.
        checkpoint: Where finished blocks are kept, if anywhere.
        units: The blocks of a graph; what lies between them counts where it is quantized.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        teacher: CapturedGraph,
        settings: BlockSettings,
        seed: int,
        checkpoint: StageCheckpoint | None,
        units: Callable[[CapturedGraph], Sequence[Block]],
    ) -> None:
        self.quantized = _Side(graph, chain(graph, units(graph)), {})
        self.float = _Side(teacher, chain(teacher, units(teacher)), {})
        self._units = {block.path for block in units(graph)}
        _check_alike(self.quantized, self.float)
        self.settings = settings
        self.seed = seed
        self.checkpoint = checkpoint
        self.device = chosen_device(settings.device)

    def run(
        self,
        source: CalibrationSource,
        inputs: Inputs,
        fit: Callable[[BlockTask], BlockOutcome],
        *,
        answers: bool,
    ) -> list[BlockRecord]:
        """Give each block to ``fit`` and return how it went.

        Raises:
            PassError: There are too few images.
        """
        limit = self.settings.cache_memory_mb * 2**20
        with RowStore(len(source), limit, self.settings.cache_half, self.device) as store:
            self._store = store
            images = self._recorded_images(source)
            held_out = round(store.images * self.settings.held_out)
            self._training = store.images - held_out
            if self._training < 1:
                raise PassError(
                    f"{store.images} images, {held_out} held out: none is left to train on"
                )
            self.float.values = {self.float.graph.input_node: images}
            self.quantized.values = {self.quantized.graph.input_node: images}
            self._answers = self._recorded_answers(images) if answers else None
            return [self._visit(index, inputs, fit) for index in range(len(self.float.chain))]

    def _visit(
        self, index: int, inputs: Inputs, fit: Callable[[BlockTask], BlockOutcome]
    ) -> BlockRecord:
        block, float_block = self.quantized.chain[index], self.float.chain[index]
        program = extract_block(self.quantized.graph, block)
        float_program = extract_block(self.float.graph, float_block)
        outputs = self._computed(float_program, self.float.values)
        record = BlockRecord(path=block.path, skipped=self._reason_against(program, block))
        if not record.skipped:
            started = time.perf_counter()
            outcome = self.checkpoint.read(index) if self.checkpoint else None
            if outcome is None:
                task = self._task(index, program, float_block, float_program, outputs, inputs)
                outcome = fit(task)
                seconds = time.perf_counter() - started
                outcome.details["seconds"] = round(seconds, 2)
                if self.checkpoint is not None:
                    self.checkpoint.write(index, outcome)
            _put(self.quantized.graph, outcome)
            program = extract_block(self.quantized.graph, block)
            record = BlockRecord(path=block.path, details=outcome.details)
        self.float.values.update(outputs)
        if inputs != "float" and index < len(self.float.chain) - 1:
            self.quantized.values.update(self._computed(program, self.quantized.values))
        self._forget(index)
        return record

    def _task(
        self,
        index: int,
        program: BlockProgram,
        float_block: Block,
        float_program: BlockProgram,
        outputs: _Values,
        inputs: Inputs,
    ) -> BlockTask:
        path = self.quantized.chain[index].path
        generator = torch.Generator(self.device)
        generator.manual_seed((self.seed + index * 1_000_003) % 2**63)

        @contextmanager
        def progress(total: int) -> Iterator[Progress]:
            title = f"{path} ({index + 1}/{len(self.quantized.chain)})"
            with tqdm(total=total, desc=title, disable=None, leave=False) as bar:
                yield bar

        def values(side: _Side, wanted: BlockProgram) -> tuple[CachedRows | ConstantRows, ...]:
            return tuple(side.values[node] for node in wanted.inputs)

        return BlockTask(
            path=path,
            unit=program,
            inputs=() if inputs == "float" else values(self.quantized, program),
            float_inputs=() if inputs == "quantized" else values(self.float, float_program),
            targets=outputs[float_program.outputs[0]],
            answers=self._answers,
            training=self._training,
            images=self._store.images,
            batch_size=self.settings.batch_size,
            is_last=index == len(self.quantized.chain) - 1,
            shared=_shared_tensors(self.quantized.graph, self.quantized.chain[index]),
            rest=FloatRest(self.float.graph, float_block, self.device),
            device=self.device,
            generator=generator,
            new_rows=lambda shape: self._store.room(shape, torch.float32),
            progress=progress,
        )

    def _reason_against(self, program: BlockProgram, block: Block) -> str:
        quantized = any(is_quantizer(node) for node in block.nodes)
        if not quantized and block.path not in self._units:
            return "nothing in it is quantized"
        if len(program.outputs) != 1:
            return f"{len(program.outputs)} values leave it at once"
        return ""

    # Values

    def _recorded_images(self, source: CalibrationSource) -> CachedRows:
        rows: CachedRows | None = None
        first = 0
        for batch in source:
            if rows is None:
                rows = self._store.room(tuple(batch.images.shape[1:]), batch.images.dtype)
            rows.put(torch.arange(first, first + len(batch.images)), batch.images)
            first += len(batch.images)
        assert rows is not None
        # A source leaves out files that it cannot read, and learns of them on the way.
        self._store.images = first
        return rows

    @torch.no_grad()
    def _recorded_answers(self, images: CachedRows) -> CachedRows:
        """Return the float network's logits, from the images: the same if a run is resumed."""
        rows: CachedRows | None = None
        module = self.float.graph.module.to(self.device)
        for chosen in numbered(self._store.images, self.settings.batch_size):
            logits = self.float.graph.logits(images.take(chosen))
            rows = rows or self._store.room(tuple(logits.shape[1:]), logits.dtype)
            rows.put(chosen, logits)
        module.to("cpu")
        assert rows is not None
        return rows

    @torch.no_grad()
    def _computed(self, program: BlockProgram, known: _Values) -> _Values:
        """Run a block on all images and return the values behind it."""
        module = program.module.to(self.device)
        found: _Values = {}
        for images in numbered(self._store.images, self.settings.batch_size):
            results = module(*(known[node].take(images) for node in program.inputs))
            for node, value in zip(program.outputs, results, strict=True):
                if node not in found:
                    found[node] = self._room_for(node, value)
                found[node].put(images, value)
        module.to("cpu")
        return found

    def _room_for(self, node: fx.Node, value: Tensor) -> CachedRows | ConstantRows:
        shape = info(node).shape
        if not any(isinstance(extent, str) for extent in shape):
            return ConstantRows(value)
        parts = batch_factor(shape[0])
        if parts is None or any(isinstance(extent, str) for extent in shape[1:]):
            raise UnsupportedModelError(
                f"cannot record '{node.name}' of shape {list(shape)}: its leading axis is not "
                "that of the images"
            )
        rest = tuple(value.shape[1:])
        return self._store.room(rest, value.dtype, parts if parts > 1 else 0)

    def _forget(self, index: int) -> None:
        """Release the values that no later block reads."""
        for side in (self.quantized, self.float):
            read = {
                source
                for block in side.chain[index + 1 :]
                for node in block.nodes
                for source in node.all_input_nodes
            }
            side.values = {n: v for n, v in side.values.items() if n in read}
        answers = () if self._answers is None else (self._answers,)
        values = (*self.quantized.values.values(), *self.float.values.values())
        self._store.keep_only((*answers, *values))


def _check_alike(quantized: _Side, teacher: _Side) -> None:
    for side_block, other in zip(quantized.chain, teacher.chain, strict=False):
        if side_block.path != other.path:
            raise PassError(
                f"{side_block.path}: the float network has '{other.path}' in this place"
            )
    if len(quantized.chain) != len(teacher.chain):
        raise PassError(
            f"{len(quantized.chain)} blocks, but the float network has {len(teacher.chain)}"
        )


def _shared_tensors(graph: CapturedGraph, block: Block) -> frozenset[str]:
    """Return the stored tensors that nodes outside a block read as well."""
    own = set(block.nodes)
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for node in graph.nodes_of_kind("get_attr"):
        for user in node.users:
            names[user in own].add(str(node.target))
    return frozenset(names[True] & names[False])


def _put(graph: CapturedGraph, outcome: BlockOutcome) -> None:
    for name, value in outcome.tensors.items():
        graph.set_parameter(name, value.cpu())
    quantizers = quantizers_of(graph)
    for target, parameters in outcome.quantizers.items():
        quantizers[target].load(**{name: p.cpu() for name, p in parameters.items()})
