"""RepQ-ViT: fold per-channel activation quantizers into LayerNorm and the linears behind it.

Source: Li, Xiao, Yang, Gu, "RepQ-ViT: Scale Reparameterization for Post-Training Quantization
of Vision Transformers", ICCV 2023, arXiv:2212.08254; section numbers as there.
Deviations of the default, strict mode, each because the published form is not a b-bit code
that a runtime can execute: the common zero point is rounded and clamped to the codes; scale
ratios are clipped; a constant channel is moved onto a code exactly. ``mode: paper`` keeps the
published real-valued zero point. In both, constant channels take the mean scale of the others.
The logarithm of section 3.3 is a number format (``log_sqrt2``), attached by the recipe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from vitcompress.calibration import RangeConfig, Request, search_range
from vitcompress.errors import ConfigError
from vitcompress.graph import CapturedGraph, ops
from vitcompress.graph.edit import call_after, constant_node, is_quantizer, replace_quantizer
from vitcompress.graph.metadata import list_argument, module_path, node_argument
from vitcompress.graph.patterns import Consumer, NormLinearGroup, norm_linear_groups
from vitcompress.passes.base import Fact, PassContext, PassReport, quantizers_of, register
from vitcompress.quantizers import Affine, PerChannel, PerTensor, QuantSpec

__all__ = ["Fold", "RepqVit", "RepqVitConfig", "fold_parameters"]


@dataclass(frozen=True, kw_only=True)
class RepqVitConfig(RangeConfig):
    """Settings of RepQ-ViT; the inherited ones re-search the weights behind a fold.

    Attributes:
        mode: ``strict`` or ``paper``.
        max_ratio: Largest ratio between a channel's scale and the common one, strict mode.
    """

    method: Literal["minmax", "percentile", "mse", "output_mse"] = "percentile"
    mode: Literal["strict", "paper"] = "strict"
    max_ratio: float = 1e4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_ratio <= 1.0:
            raise ConfigError(f"max_ratio: expected a value above 1, got {self.max_ratio}")
        if self.method == "output_mse":
            raise ConfigError("method: output_mse is for activations; weights take another")


# 3.2 "Scale reparam for LayerNorm activations"


@dataclass(frozen=True)
class Fold:
    """The per-tensor quantizer, and the map that takes the norm's output to it.

    Attributes:
        scale: Common scale, scalar.
        zero_point: Common zero point, scalar.
        ratio: r1 = s / s~, ``[C]``; divides the norm's affine, multiplies weight columns.
        shift: s * r2 with r2 = z - z~, ``[C]``; added to the norm's bias before the division.
    """

    scale: Tensor
    zero_point: Tensor
    ratio: Tensor
    shift: Tensor


def fold_parameters(
    scale: Tensor,
    zero_point: Tensor,
    *,
    qmin: int,
    qmax: int,
    degenerate: Tensor,
    config: RepqVitConfig,
) -> Fold:
    """Return the fold of a per-channel quantizer (Eq. 5 to 7).

    Args:
        scale: s, ``[C]`` float64, positive.
        zero_point: z, ``[C]`` float64, whole numbers.
        qmin: Least code.
        qmax: Largest code.
        degenerate: Channels whose range is empty, ``[C]`` bool; they do not enter the means.
        config: ``mode`` and ``max_ratio`` are read.

    Returns:
        The fold, float64. In strict mode the zero point is a code and r2 is whole but for
        constant channels, so that every code the quantizer gives stays what it was.
    """
    lively = ~degenerate if bool((~degenerate).any()) else torch.ones_like(degenerate)
    constant = (qmin - zero_point) * scale  # the value of a degenerate channel
    common = scale[lively].mean()
    if bool(degenerate.all()):
        common = (constant.abs().max() / (qmax - qmin)).clamp(min=float(common))
    ratio = scale / common
    if config.mode == "strict":
        ratio = ratio.clamp(1.0 / config.max_ratio, config.max_ratio)
    # The range of a constant channel is empty. A ratio from that would be extreme, and
    # multiply the rounding errors of the norm until they change codes.
    ratio = torch.where(degenerate, 1.0, ratio)
    adjusted = ratio * common
    # The lower end (qmin - z) * s stays where it is when a scale was adjusted.
    offsets = (qmin - zero_point) * scale / adjusted
    points = qmin - torch.round(offsets)
    middle = points[lively].mean()
    if config.mode == "strict":
        # A constant is moved onto a code exactly; nothing else has to stay where it was.
        points = torch.where(degenerate, qmin - offsets, points)
        middle = torch.round(middle).clamp(qmin, qmax)
    return Fold(common, middle, ratio, adjusted * (points - middle))


def fold_norm(weight: Tensor, bias: Tensor, fold: Fold) -> tuple[Tensor, Tensor]:
    """Return gamma / r1 and (beta + s r2) / r1, each ``[C]``."""
    return weight / fold.ratio, (bias + fold.shift) / fold.ratio


def fold_linear(weight: Tensor, bias: Tensor | None, fold: Fold) -> tuple[Tensor, Tensor]:
    """Return the weight ``[O, C]`` times r1 by columns, and the bias ``[O]`` less W (s r2)."""
    correction = weight @ fold.shift
    return weight * fold.ratio, -correction if bias is None else bias - correction


# "Quantization procedure"


@register
class RepqVit:
    """Turn per-channel activation quantizers behind LayerNorm into per-tensor ones."""

    name: ClassVar[str] = "repq_vit"
    config_type: ClassVar[type] = RepqVitConfig
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.FINAL})
    provides: frozenset[Fact] = frozenset({Fact.CALIBRATED})
    preserves_function: ClassVar[bool] = True

    def __init__(self, config: RepqVitConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        return []

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        groups, rejected = norm_linear_groups(graph)
        skipped = {module_path(norm).path: reason for norm, reason in rejected}
        warnings: list[str] = []
        folded: list[str] = []
        for group in groups:
            path = module_path(group.norm).path
            quantizers = _per_channel_quantizers(graph, group)
            if quantizers is None:
                skipped[path] = "its readers are quantized per tensor, or not at all"
                continue
            fold, degenerate = self._fold(quantizers)
            if degenerate:
                warnings.append(
                    f"{path}: channels {degenerate} are constant; kept out of the means"
                )
            self._rewrite(graph, group, fold)
            folded.append(path)
        warnings.extend(_flatten_leftovers(graph))
        graph.recompile()
        return PassReport(
            changed=len(folded),
            found=len(groups) + len(rejected),
            skipped=skipped,
            warnings=tuple(warnings),
            details={"mode": self.config.mode, "folded": folded},
        )

    def _fold(self, quantizers: dict[str, Affine]) -> tuple[Fold, list[int]]:
        first = next(iter(quantizers.values()))
        qmin, qmax = first.bounds
        scale, zero_point = _united(list(quantizers.values()))
        magnitude = torch.maximum(
            ((qmin - zero_point) * scale).abs(), ((qmax - zero_point) * scale).abs()
        )
        degenerate = scale <= torch.clamp(2e-6 * magnitude, min=2e-8)
        # A channel of zeros was given scale 1; it says nothing about the others either.
        degenerate |= (scale == 1.0) & (zero_point == 0.0)
        fold = fold_parameters(
            scale, zero_point, qmin=qmin, qmax=qmax, degenerate=degenerate, config=self.config
        )
        return fold, torch.nonzero(degenerate).flatten().tolist()

    def _rewrite(self, graph: CapturedGraph, group: NormLinearGroup, fold: Fold) -> None:
        weight, bias = _norm_affine(graph, group.norm)
        weight, bias = fold_norm(weight, bias, fold)
        _store(graph, group.norm, 2, "weight", weight)
        _store(graph, group.norm, 3, "bias", bias)
        for pad in {pad: None for consumer in group.consumers for pad in consumer.pads}:
            _pad_with(graph, pad, (fold.shift / fold.ratio).float())
        for consumer in group.consumers:
            self._rewrite_linear(graph, consumer, fold)

    def _rewrite_linear(self, graph: CapturedGraph, consumer: Consumer, fold: Fold) -> None:
        linear = consumer.linear
        name = str(_behind_quantizer(linear.args[1]).target)
        bias_node = linear.args[2] if len(linear.args) > 2 else None
        bias = None
        if isinstance(bias_node, fx.Node):
            bias = graph.parameter(str(bias_node.target)).double()
        weight, bias = fold_linear(graph.parameter(name).double(), bias, fold)
        graph.set_parameter(name, weight.float())
        _store(graph, linear, 2, "bias", bias)
        self._common_quantizer(graph, consumer, fold)
        self._search_weight(graph, linear.args[1], graph.parameter(name))

    def _common_quantizer(self, graph: CapturedGraph, consumer: Consumer, fold: Fold) -> None:
        assert consumer.quantizer is not None
        target = str(consumer.quantizer.target)
        old = graph.quantizers()[target]
        assert isinstance(old, Affine)
        if type(old.spec.granularity) is PerTensor:
            return  # shared with a consumer that was rewritten already
        spec = _per_tensor(old.spec, strict=self.config.mode == "strict")
        new = Affine(spec, old.site)
        new.load(scale=fold.scale, zero_point=fold.zero_point)
        replace_quantizer(graph, target, new)

    def _search_weight(self, graph: CapturedGraph, node: Any, weight: Tensor) -> None:
        if is_quantizer(node):
            quantizer = quantizers_of(graph)[str(node.target)]
            quantizer.set_range(*search_range(quantizer, weight, self.config))


def _united(quantizers: Sequence[Affine]) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, ``[C]`` float64, of a range that holds those of all.

    Readers behind different moves have quantizers of their own; one that reads the class token
    alone has seen less of each channel than the others. One affine map must serve them all.
    """
    scales, points = (
        torch.stack([getattr(q, name).double() for q in quantizers])
        for name in ("scale", "zero_point")
    )
    if len(quantizers) == 1:
        return scales[0], points[0]
    qmin, qmax = quantizers[0].bounds
    low = ((qmin - points) * scales).amin(dim=0)
    high = ((qmax - points) * scales).amax(dim=0)
    scale = ((high - low) / (qmax - qmin)).clamp(min=torch.finfo(torch.float32).tiny)
    return scale, qmin - torch.round(low / scale)


def _per_tensor(spec: QuantSpec, *, strict: bool) -> QuantSpec:
    return QuantSpec(bits=spec.bits, symmetric=spec.symmetric, strict=strict)


def _per_channel_quantizers(
    graph: CapturedGraph, group: NormLinearGroup
) -> dict[str, Affine] | None:
    """Return the activation quantizers of a group if all are affine and per channel."""
    found: dict[str, Affine] = {}
    known = quantizers_of(graph)
    for consumer in group.consumers:
        if consumer.quantizer is None:
            return None
        quantizer = known[str(consumer.quantizer.target)]
        if (
            not isinstance(quantizer, Affine)
            or type(quantizer.spec.granularity) is not PerChannel
        ):
            return None
        found[str(consumer.quantizer.target)] = quantizer
    return found


def _norm_affine(graph: CapturedGraph, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Return gamma and beta, float64; 1 and 0 where the norm has none."""
    channels = list_argument(norm, 1)[0]
    stored: list[Tensor] = []
    for position, default in ((2, 1.0), (3, 0.0)):
        node = norm.args[position] if len(norm.args) > position else None
        if isinstance(node, fx.Node):
            stored.append(graph.parameter(str(node.target)).double())
        else:
            stored.append(torch.full((channels,), default, dtype=torch.float64))
    return stored[0], stored[1]


def _store(
    graph: CapturedGraph, reader: fx.Node, position: int, name: str, value: Tensor
) -> None:
    """Replace the tensor that ``reader`` takes at ``position``, or create it there."""
    arguments = list(reader.args) + [None] * (position + 1 - len(reader.args))
    node = arguments[position]
    if isinstance(node, fx.Node) and node.op == "get_attr" and len(node.users) == 1:
        graph.set_parameter(str(node.target), value.float())
        return
    arguments[position] = constant_node(graph, reader, name, value.float())
    reader.args = tuple(arguments)


def _behind_quantizer(node: Any) -> fx.Node:
    source = node.args[0] if is_quantizer(node) else node
    assert isinstance(source, fx.Node)
    return source


def _pad_with(graph: CapturedGraph, pad: fx.Node, value: Tensor) -> None:
    """Make a zero padding pad with ``value`` along the channels: pad(x - value) + value."""
    source = node_argument(pad, 0)
    constant = constant_node(graph, pad, "pad_value", value)
    with graph.graph.inserting_before(pad):
        moved = graph.graph.call_function(ops.sub, (source, constant))
    moved.meta = dict(source.meta)
    pad.args = (moved, *pad.args[1:])
    back = call_after(graph, pad, ops.add, (pad, constant))
    pad.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)


def _flatten_leftovers(graph: CapturedGraph) -> list[str]:
    """Make per-channel activation quantizers that no fold reached per tensor; say which."""
    warnings = []
    for node in list(graph.nodes_of_kind("call_module")):
        target = str(node.target)
        quantizer = graph.quantizers().get(target)
        if not isinstance(quantizer, Affine) or _behind_quantizer(node).op == "get_attr":
            continue
        if type(quantizer.spec.granularity) is not PerChannel:
            continue
        qmin, qmax = quantizer.bounds
        low = ((qmin - quantizer.zero_point) * quantizer.scale).min().clamp(max=0.0)
        high = ((qmax - quantizer.zero_point) * quantizer.scale).max().clamp(min=0.0)
        new = Affine(_per_tensor(quantizer.spec, strict=quantizer.spec.strict), quantizer.site)
        new.set_range(low, high)
        replace_quantizer(graph, target, new)
        warnings.append(
            f"{quantizer.site}: no norm to fold into; per tensor over all channels"
        )
    return warnings
