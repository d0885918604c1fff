"""A block whose rounding, scales and weights can be trained.

Sources: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization"
(AdaRound), ICML 2020, arXiv:2004.10568; Esser et al., "Learned Step Size Quantization", ICLR
2020, arXiv:1902.08153; Wei et al., "QDrop", ICLR 2022, arXiv:2203.05740.
Deviation: what is learned of a scale is its logarithm, so that one rate serves scales that lie
orders of magnitude apart. Zero points stay as they are: whole.
"""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from vitcompress.graph import ops
from vitcompress.graph.edit import is_quantizer
from vitcompress.graph.ops import is_op
from vitcompress.passes.blocks import BlockOutcome, BlockTask
from vitcompress.quantizers import Affine, Quantizer

__all__ = ["Coin", "SoftRounding", "TrainableBlock", "WeightMode"]

#: How weights are trained: not quantized at all; rounded up or down; through their rounding.
WeightMode = Literal["float", "adaround", "straight_through"]

#: The stretch of the sigmoid, beyond [0, 1] on either side (AdaRound, Eq. 23).
_STRETCH, _BELOW = 1.2, 0.1


# "Dropping quantization" (QDrop, Eq. 11)


class Coin:
    """Decides for each element of a tensor whether its quantized value is used.

    Args:
        probability: That the quantized value is used, in steps of 1/256.
        generator: Source of randomness.
    """

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        self._threshold = round(256 * probability)
        self._generator = generator
        #: Off, every quantized value is used.
        self.enabled = True

    def toss(self, like: Tensor) -> Tensor | None:
        """Return where to use the quantized value; ``None`` for everywhere."""
        if not self.enabled or self._threshold == 256:
            return None
        # Eight coins for the price of one random number.
        words = torch.empty(like.numel() // 8 + 1, dtype=torch.int64, device=like.device)
        # All 64 bits, the sign included.
        words.random_(-(2**63), None, generator=self._generator)
        coins = words.view(torch.uint8)[: like.numel()].reshape(like.shape)
        return coins < self._threshold

    def mix(self, quantized: Tensor, plain: Tensor) -> Tensor:
        """Return each element from one or the other."""
        use = self.toss(plain)
        return quantized if use is None else torch.where(use, quantized, plain)


# "Learned step size"


class _Quantized(torch.autograd.Function):
    """Affine fake quantization of some elements, the others unchanged.

    Gradients: of the input 1 where it is not clipped; of the scale as they follow from passing
    the gradient straight through the rounding.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bounds: tuple[int, int],
        use: Tensor | None,
    ) -> Tensor:
        ratio = x / scale
        codes = torch.round(ratio).add_(zero_point)
        inside = (codes >= bounds[0]).logical_and_(codes <= bounds[1])
        steps = codes.clamp_(*bounds).sub_(zero_point)
        found = steps * scale
        slope = None
        if ctx.needs_input_grad[1]:
            slope = steps.sub_(ratio.mul_(inside))
        if use is not None:
            found = torch.where(use, found, x)
            inside.logical_or_(use.logical_not())
            slope = None if slope is None else slope.mul_(use)
        ctx.save_for_backward(inside, slope)
        ctx.scale_shape = scale.shape
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inside, slope = ctx.saved_tensors
        of_scale = None
        if slope is not None:
            of_scale = (gradient * slope).sum_to_size(ctx.scale_shape)
        of_x = gradient * inside if ctx.needs_input_grad[0] else None
        return of_x, of_scale, None, None, None


class _LearnedScale(nn.Module):
    """An affine quantizer whose scale may be learned; gradients pass its rounding."""

    def __init__(self, quantizer: Affine, learned: bool, coin: Coin | None) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.coin = coin
        self.log_ratio = nn.Parameter(torch.zeros_like(quantizer.scale), requires_grad=learned)

    @property
    def scale(self) -> Tensor:
        """The scale as learned so far, of the shape of the parameter."""
        return self.quantizer.scale * torch.exp(self.log_ratio)

    def forward(self, x: Tensor) -> Tensor:
        granularity = self.quantizer.spec.granularity
        viewed = granularity.view(x.float())
        use = None if self.coin is None else self.coin.toss(viewed)
        scale, zero_point = (
            granularity.broadcast(parameter, x)
            for parameter in (self.scale, self.quantizer.zero_point)
        )
        arguments = (viewed, scale, zero_point, self.quantizer.bounds, use)
        found: Tensor = _Quantized.apply(*arguments)
        return found.reshape(x.shape)


class _PassedThrough(torch.autograd.Function):
    """A value of our own, with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: Tensor) -> Tensor:
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Straight(nn.Module):
    """A quantizer of another format: fixed, its gradient passed straight through."""

    def __init__(self, quantizer: Quantizer, coin: Coin | None) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.coin = coin

    def forward(self, x: Tensor) -> Tensor:
        plain = x.float()
        found: Tensor = self.quantizer(plain.detach())
        if self.coin is not None:
            found = self.coin.mix(found, plain.detach())
        passed: Tensor = _PassedThrough.apply(plain, found)
        return passed


# "Adaptive rounding"


class SoftRounding(nn.Module):
    """A weight between its two neighbours on the grid: AdaRound's Eq. 21 to 24.

    Args:
        quantizer: Of the weight; scale and zero point stay.
        weight: The weight, ``[O, ...]``.
    """

    def __init__(self, quantizer: Affine, weight: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        granularity = quantizer.spec.granularity
        self.shape = weight.shape
        self.scale = granularity.broadcast(quantizer.scale, weight)
        self.zero_point = granularity.broadcast(quantizer.zero_point, weight)
        ratio = granularity.view(weight) / self.scale
        self.floor = torch.floor(ratio)
        rest = ratio - self.floor
        #: Every share counts as 0 or 1.
        self.decided = False
        self.rounding = nn.Parameter(-torch.log(_STRETCH / (rest + _BELOW) - 1.0))

    def shares(self) -> Tensor:
        """Return h: how far each weight is on its way up, in [0, 1]."""
        shares: Tensor = _STRETCH * torch.sigmoid(self.rounding) - _BELOW
        return shares.clamp(0.0, 1.0)

    def forward(self, _: Tensor) -> Tensor:
        """Return the weight as rounded so far; the stored one is not read."""
        return self.hardened() if self.decided else self._weight(self.shares())

    def hardened(self) -> Tensor:
        """Return the weight with every share 0 or 1: on the grid."""
        return self._weight((self.rounding >= 0).float())

    def penalty(self, beta: float) -> Tensor:
        """Return ``sum(1 - |2h - 1|^beta)``, which is 0 where every share is 0 or 1."""
        return (1.0 - (2.0 * self.shares() - 1.0).abs().pow(beta)).sum()

    def _weight(self, shares: Tensor) -> Tensor:
        codes = (self.floor + shares + self.zero_point).clamp(*self.quantizer.bounds)
        return ((codes - self.zero_point) * self.scale).reshape(self.shape)


# The block


class TrainableBlock(nn.Module):
    """A copy of a block with quantizers that pass gradients, and weights that take them.

    Args:
        task: The block; its own tensors and quantizers are not changed.
        weights: How weights are trained. ``float`` leaves their quantizers out.
        scales: Learn the scales of affine quantizers: of activations, and of weights that are
            trained ``straight_through``.
        coin: Decides where activations are quantized; everywhere by default.

    Attributes:
        untrained: Weights that stay as they are, with the reason.
    """

    def __init__(
        self, task: BlockTask, *, weights: WeightMode, scales: bool, coin: Coin | None = None
    ) -> None:
        super().__init__()
        self.module = copy.deepcopy(task.unit.module).to(task.device)
        self.coin = coin
        self.untrained: dict[str, str] = {}
        self._shared = task.shared
        self._weights: dict[str, nn.Parameter] = {}
        self._biases: dict[str, nn.Parameter] = {}
        self._norms: dict[str, nn.Parameter] = {}
        self._rounded: dict[str, SoftRounding] = {}
        self._scaled: dict[str, _LearnedScale] = {}
        for node in self.module.graph.nodes:
            if is_quantizer(node):
                source = node.all_input_nodes[0]
                stored = str(source.target) if source.op == "get_attr" else None
                self._replace(str(node.target), stored, weights, scales)
        for node in self.module.graph.nodes:
            if is_op(node, ops.LINEAR, ops.CONV):
                if weights != "adaround":
                    self._train(node.args[1], self._weights)
                self._train(node.args[2] if len(node.args) > 2 else None, self._biases)
            elif is_op(node, ops.LAYER_NORM):
                for tensor in node.args[2:4]:
                    self._train(tensor, self._norms)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the output of the block as it is trained."""
        found: Tensor = self.module(*inputs)[0]
        return found

    def settled(self, *inputs: Tensor) -> Tensor:
        """Return the output with all activations quantized and roundings decided.

        It is what the graph computes with the outcome put in, bit for bit.
        """
        self._settle(True)
        try:
            return self.forward(*inputs)
        finally:
            self._settle(False)

    def quantized(self, *inputs: Tensor) -> Tensor:
        """Return the output with all activations quantized, roundings as far as they are."""
        if self.coin is None:
            return self.forward(*inputs)
        self.coin.enabled = False
        try:
            return self.forward(*inputs)
        finally:
            self.coin.enabled = True

    def quantizes(self) -> bool:
        """Return whether any value in the block is quantized."""
        return any(isinstance(m, (Quantizer, SoftRounding)) for m in self.module.modules())

    @property
    def rounding_parameters(self) -> list[nn.Parameter]:
        """Roundings of weights."""
        return [rounding.rounding for rounding in self._rounded.values()]

    @property
    def weight_parameters(self) -> list[nn.Parameter]:
        """Weights that are trained themselves."""
        return list(self._weights.values())

    @property
    def bias_parameters(self) -> list[nn.Parameter]:
        """Biases."""
        return list(self._biases.values())

    @property
    def norm_parameters(self) -> list[nn.Parameter]:
        """Weights and biases of LayerNorms."""
        return list(self._norms.values())

    @property
    def scale_parameters(self) -> list[nn.Parameter]:
        """Logarithms of scales."""
        return [s.log_ratio for s in self._scaled.values() if s.log_ratio.requires_grad]

    def penalty(self, beta: float) -> Tensor | float:
        """Return the sum of ``1 - |2h - 1|^beta`` over all roundings."""
        return sum(rounding.penalty(beta) for rounding in self._rounded.values())

    def undecided(self) -> float:
        """Return the share of roundings that are further than 0.01 from 0 and 1."""
        shares = [r.shares().detach().flatten() for r in self._rounded.values()]
        if not shares:
            return 0.0
        found = torch.cat(shares)
        return float(((found > 0.01) & (found < 0.99)).double().mean())

    @torch.no_grad()
    def outcome(self, details: dict[str, Any]) -> BlockOutcome:
        """Return what training has made of the block."""
        stored = {**self._weights, **self._biases, **self._norms}
        tensors = {name: p.detach().clone() for name, p in stored.items()}
        tensors.update({name: r.hardened() for name, r in self._rounded.items()})
        quantizers = {
            target: {"scale": s.scale.clone(), "zero_point": s.quantizer.zero_point.clone()}
            for target, s in self._scaled.items()
            if s.log_ratio.requires_grad
        }
        return BlockOutcome(tensors=tensors, quantizers=quantizers, details=details)

    def _settle(self, on: bool) -> None:
        if self.coin is not None:
            self.coin.enabled = not on
        for rounding in self._rounded.values():
            rounding.decided = on

    def _replace(
        self, target: str, stored: str | None, weights: WeightMode, scales: bool
    ) -> None:
        quantizer = self.module.get_submodule(target)
        if not isinstance(quantizer, Quantizer):
            return  # replaced already: it is called twice
        made: nn.Module
        if stored is not None and weights == "float":
            made = nn.Identity()
        elif stored is not None and weights == "adaround" and self._may_train(stored):
            if not isinstance(quantizer, Affine):
                self.untrained[stored] = f"format {quantizer.spec.format} has no neighbours"
                return
            made = SoftRounding(quantizer, self.module.get_buffer(stored))
            self._rounded[stored] = made
        elif isinstance(quantizer, Affine):
            learned = scales and (stored is None or weights == "straight_through")
            made = _LearnedScale(quantizer, learned, None if stored else self.coin)
            self._scaled[target] = made
        else:
            made = _Straight(quantizer, None if stored else self.coin)
        self.module.set_submodule(target, made)

    def _may_train(self, name: str) -> bool:
        if name in self._shared:
            self.untrained[name] = "another block reads it too"
        return name not in self._shared

    def _train(self, node: Any, found: dict[str, nn.Parameter]) -> None:
        """Make the tensor at a node a parameter, unless its rounding is one."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return
        name = str(node.target)
        if name in found or name in self._rounded or not self._may_train(name):
            return
        path, _, leaf = name.rpartition(".")
        owner = self.module.get_submodule(path)
        found[name] = nn.Parameter(getattr(owner, leaf).clone())
        delattr(owner, leaf)
        owner.register_parameter(leaf, found[name])
