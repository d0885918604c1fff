"""What counts as an error of a block: losses that reconstruction passes choose by name.

z is the float output of a block, dz what quantization adds to it, both flattened to d = N C
for each image. The float rest of the network tells which errors matter: g is the gradient at z
of the KL divergence between its answers with and without the error, at temperature tau = 20.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcompress.numerics.curvature import DiagonalFit, RankOneFit, row_sums
from vitcompress.passes.blocks import BlockTask, Rows

__all__ = ["LOSSES", "AnswersLoss", "BlockLoss", "answers_divergence"]

#: Flattens the softmax: without it, gradients vanish on images the network is sure of.
TEMPERATURE = 20.0

Block = Callable[..., Tensor]


def answers_divergence(found: Tensor, expected: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean of KL(softmax(expected) || softmax(found)) over logits ``[B, O]``."""
    target = F.log_softmax(expected / temperature, dim=-1)
    return F.kl_div(
        F.log_softmax(found / temperature, dim=-1),
        target,
        log_target=True,
        reduction="batchmean",
    )


class BlockLoss(ABC):
    """The loss of one block. Each of its terms is divided by its first value."""

    name: ClassVar[str]
    #: How often during training :meth:`refresh` is wanted, besides at the start.
    refreshes: ClassVar[int] = 0
    #: Whether it looks at the block on the inputs of the float network.
    needs_float_inputs: ClassVar[bool] = False
    #: Whether it looks at what the float network answers in the end.
    needs_answers: ClassVar[bool] = False

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}

    def prepare(self, task: BlockTask, block: Block) -> None:  # noqa: B027 - need not
        """Look at the data before training.

        Args:
            task: The block.
            block: Computes the quantized block.
        """

    def refresh(self, task: BlockTask, block: Block) -> None:  # noqa: B027 - need not
        """Look at the data again, during training."""

    @abstractmethod
    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        """Return the loss of a batch.

        Args:
            output: Of the quantized block, ``[B, ...]``.
            target: Of the float block.
            images: Their numbers.
        """

    def _normalised(self, term: str, value: Tensor) -> Tensor:
        first = self._first.setdefault(term, value.detach().clamp(min=1e-12))
        return value / first


# The error itself


class MeanSquaredError(BlockLoss):
    """QDrop: the squared error, summed over tokens, mean over images and channels."""

    name: ClassVar[str] = "mse"

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        return self._normalised("error", (output - target).square().mean())


class AnswersLoss(BlockLoss):
    """KL divergence of the answers, for the block that gives them."""

    name: ClassVar[str] = "answers"

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        return self._normalised("answers", answers_divergence(output, target))


# Gradients at the output of a block


def _answers_gradient(task: BlockTask, output: Tensor, images: Tensor) -> Tensor:
    """Return g, ``[B, d]``: per image, of the loss summed over the batch."""
    assert task.answers is not None, "the loss asks for no answers"
    output = output.detach().requires_grad_()
    expected = task.answers.take(images)
    loss = answers_divergence(task.rest.logits(output), expected, TEMPERATURE) * len(output)
    (gradient,) = torch.autograd.grad(loss, output)
    return gradient.flatten(1)


def _error_pairs(task: BlockTask, block: Block) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield image numbers, g and dz of each batch, nothing but this block quantized."""
    for images in task.batches():
        target = task.targets.take(images)
        with torch.no_grad():
            output = block(*(rows.take(images) for rows in task.float_inputs))
        gradient = _answers_gradient(task, output, images)
        yield images, gradient, (output - target).flatten(1)


# BRECQ


class DiagonalFisher(BlockLoss):
    """Sum of ``dz_i^2 g_i^2``, g of each image at the output of the block as first quantized.

    Source: Li et al., "BRECQ", ICLR 2021, arXiv:2102.05426, Eq. 10.
    """

    name: ClassVar[str] = "fisher_diagonal"
    needs_float_inputs: ClassVar[bool] = True
    needs_answers: ClassVar[bool] = True

    def prepare(self, task: BlockTask, block: Block) -> None:
        self._squares: Rows | None = None
        for images, gradient, _ in _error_pairs(task, block):
            if self._squares is None:
                self._squares = task.new_rows((gradient.shape[1],))
                # The loss is normalised: only ratios matter, and half precision has a floor.
                self._unit = gradient.square().mean().clamp(min=1e-30)
            self._squares.put(images, gradient.square() / self._unit)

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        assert self._squares is not None
        error = (output - target).flatten(1)
        weighted = error.square() * self._squares.take(images)
        return self._normalised("error", weighted.sum(dim=1).mean())


# APHQ-ViT


class AveragePerturbationHessian(BlockLoss):
    """Mean of ``dz^2 H``, H the row sums of the Hessian of the answers at z.

    Source: Wu et al., "APHQ-ViT", CVPR 2025, arXiv:2504.02508.
    Deviation: delta is relative to z; see :func:`row_sums`.
    """

    name: ClassVar[str] = "aph"
    needs_answers: ClassVar[bool] = True

    def prepare(self, task: BlockTask, block: Block) -> None:
        images = torch.zeros(0)

        def points() -> Iterator[Tensor]:
            nonlocal images
            for images in task.batches():
                yield task.targets.take(images)

        def gradient(z: Tensor) -> Tensor:
            return _answers_gradient(task, z, images).reshape(z.shape)

        self._hessian = row_sums(gradient, points())

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        weighted = (output - target).square() * self._hessian
        return self._normalised("error", weighted.mean())


# FIMA-Q


class LowRankFisher(BlockLoss):
    """Diagonal and low-rank Fisher matrix from mean magnitudes of g and dz.

    Source: Wu et al., "FIMA-Q", CVPR 2025, arXiv:2506.11543.
    Deviation: the inverted matrix gets 1e-8 of its mean diagonal added.
    """

    name: ClassVar[str] = "fima"
    needs_float_inputs: ClassVar[bool] = True
    needs_answers: ClassVar[bool] = True
    refreshes: ClassVar[int] = 5

    def prepare(self, task: BlockTask, block: Block) -> None:
        self._gradients: list[Tensor] = []
        self._errors: list[Tensor] = []
        self.refresh(task, block)

    def refresh(self, task: BlockTask, block: Block) -> None:
        sums = [torch.zeros(()), torch.zeros(())]
        for _, gradient, error in _error_pairs(task, block):
            for index, value in enumerate((gradient, error)):
                sums[index] = sums[index].to(value.device) + value.abs().sum(dim=0)
        self.observe(sums[0] / task.training, sums[1] / task.training)

    def observe(self, gradient: Tensor, error: Tensor) -> None:
        """Take in the mean magnitudes of g and dz, ``[d]`` each; start the scale anew."""
        self._gradients.append(gradient)
        self._errors.append(error)
        errors = torch.stack(self._errors).double()
        gram = errors @ errors.T
        ridge = 1e-8 * gram.diagonal().mean()
        ridge = ridge.clamp(min=torch.finfo(torch.float64).tiny)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self._inverse = torch.linalg.inv(gram + ridge * eye).float()
        self._first.clear()

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        gradients = torch.stack(self._gradients)
        error = (output - target).flatten(1).abs()
        along = error @ gradients.T
        low_rank = torch.einsum("bs,st,bt->b", along, self._inverse, along).mean()
        diagonal = (error.square() * gradients.mean(dim=0)).mean()
        return self._normalised("low rank", low_rank) + self._normalised("diagonal", diagonal)


# LS-ViT


class LeastSquaresHessian(BlockLoss):
    """Half of ``sum H_i dz_i^2 + (u^T dz)^2``, H and u fitted to pairs of g and dz.

    Source: LS-ViT, CVPR 2026, as reported by others.
    Deviation: the sign of ``u^T dz`` is aligned; see :class:`RankOneFit`.
    """

    name: ClassVar[str] = "least_squares"
    needs_float_inputs: ClassVar[bool] = True
    needs_answers: ClassVar[bool] = True

    def prepare(self, task: BlockTask, block: Block) -> None:
        diagonal, rank_one = DiagonalFit(), RankOneFit()
        for _, gradient, error in _error_pairs(task, block):
            diagonal.update(gradient, error)
            rank_one.update(gradient, error)
        self.use(diagonal.result(), rank_one.result())

    def use(self, diagonal: Tensor, rank_one: Tensor) -> None:
        """Take H and u, ``[d]`` each."""
        self._diagonal, self._rank_one = diagonal, rank_one

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        error = (output - target).flatten(1)
        weighted = error.square() @ self._diagonal + (error @ self._rank_one).square()
        return self._normalised("error", 0.5 * weighted.mean())


# GLF-Q


class GlobalLocal(BlockLoss):
    """Error of what the classifier will read, and twice the error of the block itself.

    Source: GLF-Q, preprint 2026. Gradients flow through the float rest of the network.
    """

    name: ClassVar[str] = "global_local"

    def prepare(self, task: BlockTask, block: Block) -> None:
        self._features = task.rest.features

    def __call__(self, output: Tensor, target: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            expected = self._features(target)
        distant = (self._features(output) - expected).square().mean()
        local = (output - target).square().mean()
        return self._normalised("global", distant) + 2.0 * self._normalised("local", local)


#: By the name recipes use.
LOSSES: dict[str, type[BlockLoss]] = {
    loss.name: loss
    for loss in (
        MeanSquaredError,
        DiagonalFisher,
        AveragePerturbationHessian,
        LowRankFisher,
        LeastSquaresHessian,
        GlobalLocal,
    )
}
