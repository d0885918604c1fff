"""Replace GELU by ReLU and train each MLP to compute what it did.

Source: Wu et al., "APHQ-ViT: Post-Training Quantization with Average Perturbation Hessian
Based Reconstruction for Vision Transformers", CVPR 2025, arXiv:2504.02508.
Deviation: plain means, as in GLF-Q, in the place of the Hessian of the MLP's output.
The float function changes, slightly: a choice, and one that the report names.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from vitcompress.calibration import Request
from vitcompress.errors import ConfigError
from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.metadata import module_path, node_argument
from vitcompress.graph.ops import is_op
from vitcompress.graph.patterns import Block
from vitcompress.numerics.metrics import kl_divergence
from vitcompress.passes.base import Fact, PassContext, PassReport, register
from vitcompress.passes.blocks import BlockOutcome, BlockSettings, BlockTask
from vitcompress.passes.training import (
    Group,
    block_report,
    descend,
    figures,
    held_out_error,
)

__all__ = ["MlpReconstruction", "MlpReconstructionConfig"]


@dataclass(frozen=True, kw_only=True)
class MlpReconstructionConfig(BlockSettings):
    """Settings of mlp_reconstruction.

    Attributes:
        iterations: Steps for each MLP.
        rate: Learning rate; falls to 0 as a cosine.
        clamp_quantile: The second half of the loss clamps what fc2 reads at this quantile of
            its positive inputs, as a quantizer will.
    """

    iterations: int = 20_000
    rate: float = 4e-5
    clamp_quantile: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ConfigError(f"iterations: expected at least 1, got {self.iterations}")
        if not self.rate > 0.0:
            raise ConfigError(f"rate: expected a value above 0, got {self.rate}")
        if not 0.0 < self.clamp_quantile <= 1.0:
            raise ConfigError(
                f"clamp_quantile: expected a value in (0, 1], got {self.clamp_quantile}"
            )


@dataclass(frozen=True)
class Mlp:
    """Two linears with a GELU between them, by the names of their nodes."""

    first: str
    activation: str
    second: str

    def block(self, graph: CapturedGraph) -> Block:
        """Return the three as a block of a graph, whatever the activation has become."""
        names = (self.first, self.activation, self.second)
        nodes = tuple(node for node in graph.graph.nodes if node.name in names)
        return Block(module_path(nodes[-1]).path, nodes)


def gelu_mlps(graph: CapturedGraph) -> tuple[list[Mlp], dict[str, str]]:
    """Return the MLPs, and each other GELU by module path, with the reason."""
    found, skipped = [], {}
    for node in graph.graph.nodes:
        if not is_op(node, ops.GELU):
            continue
        first, readers = node_argument(node, 0), list(node.users)
        path = module_path(node).path
        if not is_op(first, ops.LINEAR) or len(first.users) > 1:
            skipped[path] = f"reads {first.name}, not a linear of its own"
        elif len(readers) != 1 or not is_op(readers[0], ops.LINEAR):
            skipped[path] = f"read by {[reader.name for reader in readers]}, not one linear"
        elif any(_shared(linear) for linear in (first, readers[0])):
            skipped[path] = "a weight next to it serves another layer"
        else:
            found.append(Mlp(first.name, node.name, readers[0].name))
    return found, skipped


def _shared(linear: fx.Node) -> bool:
    tensors = [node for node in linear.args[1:3] if isinstance(node, fx.Node)]
    return any(node.op != "get_attr" or len(node.users) > 1 for node in tensors)


def mlp_loss(
    hidden: Tensor, second: Callable[[Tensor], Tensor], target: Tensor, limit: Tensor
) -> Tensor:
    """Return ``|fc2(h) - t|^2 + 2 |fc2(min(h, u)) - t|^2``, means.

    The clamped half alone would have no gradient above u.

    Args:
        hidden: h, ``[..., I]``, not negative.
        second: fc2.
        target: t, ``[..., O]``.
        limit: u, scalar.
    """
    plain = second(hidden) - target
    clamped = second(torch.minimum(hidden, limit)) - target
    return plain.square().mean() + 2.0 * clamped.square().mean()


@register
class MlpReconstruction:
    """Turn every MLP with GELU into one with ReLU."""

    name: ClassVar[str] = "mlp_reconstruction"
    config_type: ClassVar[type] = MlpReconstructionConfig
    requires: ClassVar[frozenset[Fact]] = frozenset()
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTACHED})
    provides: frozenset[Fact] = frozenset()
    preserves_function: ClassVar[bool] = False

    def __init__(self, config: MlpReconstructionConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        return []

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        teacher = graph.clone()
        mlps, skipped = gelu_mlps(graph)
        before = context.engine.logits(graph, context.source)
        for node in graph.graph.nodes:
            if node.name in {mlp.activation for mlp in mlps}:
                node.target, node.kwargs = ops.relu, {}
                node.args = node.args[:1]
        graph.recompile()
        records = context.engine.map_blocks(
            graph,
            teacher,
            context.source,
            self._fit,
            inputs="float",
            settings=self.config,
            seed=int(torch.randint(2**62, (), generator=context.generator)),
            units=lambda side: [mlp.block(side) for mlp in mlps],
        )
        after = context.engine.logits(graph, context.source)
        found = block_report([r for r in records if not r.skipped], {})
        agreement = (after.argmax(-1) == before.argmax(-1)).double().mean()
        return PassReport(
            changed=found.changed,
            found=found.changed + len(skipped),
            skipped=skipped,
            warnings=(f"the float function changed: ReLU for GELU in {found.changed} MLPs",),
            details={
                **found.details,
                "float_agreement_percent": round(100.0 * float(agreement), 2),
                "float_kl": float(kl_divergence(before, after).mean()),
            },
        )

    def _fit(self, task: BlockTask) -> BlockOutcome:
        first, second = (
            _Linear(task, node)
            for node in task.unit.module.graph.nodes
            if is_op(node, ops.LINEAR)
        )
        limit = self._limit(task, first)

        def step_loss(step: int, images: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.relu(first(task.float_inputs[0].take(images)))
            found = mlp_loss(hidden, second, task.targets.take(images), limit)
            return found, found

        def mlp(x: Tensor) -> Tensor:
            return second(torch.relu(first(x)))

        before = held_out_error(task, mlp)
        group = Group([*first.tensors.values(), *second.tensors.values()], self.config.rate)
        values = descend(task, [group], self.config.iterations, step_loss)
        details = figures(values, before, held_out_error(task, mlp), {})
        tensors = {**first.tensors, **second.tensors}
        return BlockOutcome(
            tensors={name: value.detach() for name, value in tensors.items()},
            details={**details, "clamp": float(limit)},
        )

    @torch.no_grad()
    def _limit(self, task: BlockTask, first: "_Linear") -> Tensor:
        """Return u: the quantile of what fc2 read behind GELU, where it was positive."""
        images = task.batches()[0]
        hidden = F.gelu(first(task.float_inputs[0].take(images)))
        positive = hidden[hidden > 0]
        rank = max(math.ceil(self.config.clamp_quantile * positive.numel()), 1)
        return positive.kthvalue(rank).values if positive.numel() else hidden.amax()


class _Linear:
    """A linear of a block with tensors of its own, to be trained.

    Attributes:
        tensors: By their names in the graph.
    """

    def __init__(self, task: BlockTask, linear: fx.Node) -> None:
        names = [str(node.target) for node in linear.args[1:3] if isinstance(node, fx.Node)]
        self.tensors = {
            name: task.unit.module.get_buffer(name).to(task.device, copy=True).requires_grad_()
            for name in names
        }

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.tensors.values())
