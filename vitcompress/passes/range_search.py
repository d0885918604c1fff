"""Range search: refine quantizers from coarse to fine by what their readers compute.

Source: Wu et al., "AdaLog: Post-Training Quantization for Vision Transformers with Adaptive
Logarithm Quantizer", ECCV 2024, arXiv:2407.12951, "Fast progressive combining search": scale
and zero point (for AdaLog: scale and base) are searched together, many combinations coarsely,
the best few again on a finer grid around them.
Deviations: zero points are codes, and tried around the one that calibration found; one operand
is judged with the other exact, so that none has to wait for the other and there are no
alternating rounds; fewer combinations are tried (the paper keeps 16 of 128 and tries 8 around
each, five times).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from vitcompress.calibration import Request, Samples, SecondMoment, Statistics
from vitcompress.errors import ConfigError
from vitcompress.graph import CapturedGraph, QuantizationSite, Role, enumerate_sites
from vitcompress.numerics.search import coarse_to_fine
from vitcompress.passes.base import Fact, PassContext, PassReport, quantizers_of, register
from vitcompress.quantizers import AdaLog, Affine, PerChannel, PerHead, PerTensor, Quantizer

__all__ = ["RangeSearch", "RangeSearchConfig"]


@dataclass(frozen=True, kw_only=True)
class RangeSearchConfig:
    """Settings of range_search.

    Attributes:
        roles: Where to search; ``weight`` means the rows of linears.
        images: Images on which activations are judged.
        tokens: Rows of a linear's input on which it is judged.
        points: Zero points (or bases) tried, the present one in the middle.
        scales: Scales tried with each.
        keep: Combinations refined.
        children: Scales tried around each of them, at least 2.
        rounds: Of refinement.
    """

    roles: tuple[Role, ...] = (
        Role.QUERY,
        Role.KEY,
        Role.VALUE,
        Role.PROBS,
        Role.PROJ_INPUT,
        Role.ACT_OUTPUT,
    )
    images: int = 8
    tokens: int = 1024
    points: int = 8
    scales: int = 12
    keep: int = 4
    children: int = 4
    rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("images", "tokens", "points", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("scales", "children"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name}: expected at least 2, got {getattr(self, name)}")
        if self.rounds < 0:
            raise ConfigError(f"rounds: expected at least 0, got {self.rounds}")


#: From trial parameters, each of the shape of one parameter, to the error of each group.
_Judge = Callable[[dict[str, Tensor]], Tensor]
#: What a combination consists of besides the scale, by format.
_POINTS: dict[type[Quantizer], str] = {Affine: "zero_point", AdaLog: "numerator"}
#: Distance of the bases that are tried, and their bounds in the paper.
_BASE_STEP, _LEAST_BASE, _LARGEST_BASE = 2, 10, 138


def combinations(
    quantizer: Quantizer, values: Tensor, config: RangeSearchConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the coarse grid: scales and points ``[K, G]``, and the step of scales ``[G]``.

    Scales lie between the widths of the middle 80 % and of all values; the present
    combination comes first.
    """
    groups = quantizer.spec.granularity.group(values)
    thinned = groups[:, :: max(1, groups.shape[1] // 100_000)]
    low, high = torch.quantile(thinned, 0.1, dim=1), torch.quantile(thinned, 0.9, dim=1)
    least, most = torch.aminmax(groups, dim=1)
    present = quantizer.get_buffer("scale").flatten()
    levels = 1
    if isinstance(quantizer, Affine):
        qmin, qmax = quantizer.bounds
        levels = qmax - qmin
        if quantizer.spec.symmetric:
            high, most = (torch.maximum(-a, b) for a, b in ((low, high), (least, most)))
            low, least = -high, -most
        centre = quantizer.zero_point.flatten()
        points = centre + torch.arange(config.points)[:, None] - config.points // 2
        points = centre[None] if quantizer.spec.symmetric else points.clamp(qmin, qmax)
    elif isinstance(quantizer, AdaLog):
        # Shifted values start at 0, so that only their upper end is searched.
        shift = quantizer.shift.flatten()
        high, most = high + shift, most + shift
        low = least = torch.zeros_like(low)
        around = torch.arange(config.points)[:, None] - config.points // 2
        points = quantizer.numerator.flatten() + _BASE_STEP * around
        points = points.clamp(_LEAST_BASE, _LARGEST_BASE)
    else:
        low = least = torch.zeros_like(low)
        points = torch.zeros(1, len(groups))
    narrow, wide = ((b - a).clamp(min=1e-8) / levels for a, b in ((low, high), (least, most)))
    fractions = torch.linspace(0.0, 1.0, config.scales)[:, None]
    scales = narrow + fractions * (wide - narrow)
    grid_scales = scales.repeat_interleave(len(points), dim=0)
    grid_points = points.repeat(config.scales, 1)
    name = _POINTS.get(type(quantizer))
    kept = torch.zeros_like(present) if name is None else getattr(quantizer, name).flatten()
    return (
        torch.cat([present[None], grid_scales]),
        torch.cat([kept[None], grid_points]),
        (wide - narrow) / (config.scales - 1),
    )


@dataclass(frozen=True)
class _Item:
    """A quantizer, the edges it serves, and the site of the other operand of each."""

    quantizer: Quantizer
    sites: tuple[QuantizationSite, ...]
    partners: tuple[QuantizationSite | None, ...]

    @property
    def stored(self) -> bool:
        return self.sites[0].stored


@register
class RangeSearch:
    """Search scale and zero point (or base) of calibrated quantizers by output error."""

    name: ClassVar[str] = "range_search"
    config_type: ClassVar[type] = RangeSearchConfig
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CALIBRATED})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.FINAL})
    provides: frozenset[Fact] = frozenset({Fact.CALIBRATED})
    preserves_function: ClassVar[bool] = True

    def __init__(self, config: RangeSearchConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        samples: dict[str, None] = {}
        moments: dict[str, None] = {}
        for item in self._items(graph)[0]:
            partners = [p.name for p in item.partners if p is not None and not p.stored]
            if item.stored:
                moments.update(dict.fromkeys(partners))
            else:
                samples.update(dict.fromkeys([item.sites[0].name, *partners]))
        return [
            *(Request(name, partial(Samples, self.config.images)) for name in samples),
            *(Request(name, SecondMoment) for name in moments),
        ]

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        items, skipped = self._items(graph)
        left: dict[str, float] = {}
        for item in items:
            if item.stored:
                values = graph.parameter(str(item.sites[0].value.target))
                judge = _judge_of_rows(item, values, context.statistics)
            else:
                values = _sampled(context.statistics, item.sites[0])
                judge = self._judge_of_readers(graph, item, values, context)
            left[item.quantizer.site] = self._search(item.quantizer, values, judge)
        granularities = Counter(item.quantizer.spec.describe() for item in items)
        return PassReport(
            changed=sum(share < 1.0 for share in left.values()),
            found=len(items) + len(skipped),
            skipped=skipped,
            details={"output_error_left": left, "formats": dict(granularities)},
        )

    def _items(self, graph: CapturedGraph) -> tuple[list[_Item], dict[str, str]]:
        """Return what can be searched, and why not the rest."""
        known = quantizers_of(graph)
        sites = enumerate_sites(graph)
        edges = {(site.reader, site.index): site for site in sites.values()}
        served: dict[str, list[QuantizationSite]] = {}
        for site in sites.values():
            if site.quantizer is not None:
                served.setdefault(site.quantizer, []).append(site)
        items: list[_Item] = []
        skipped: dict[str, str] = {}
        for target, group in served.items():
            if not any(site.role in self.config.roles for site in group):
                continue
            partners = tuple(edges.get((site.reader, 1 - site.index)) for site in group)
            item = _Item(known[target], tuple(group), partners)
            reason = _reason_against(item)
            if reason is None:
                items.append(item)
            else:
                skipped[item.quantizer.site] = reason
        return items, skipped

    def _search(self, quantizer: Quantizer, values: Tensor, judge: _Judge) -> float:
        """Leave the best parameters in place; return their error relative to before."""
        present: dict[str, Tensor] = {
            name: getattr(quantizer, name) for name in quantizer.parameter_names
        }
        shape = present["scale"].shape
        point = _POINTS.get(type(quantizer))

        def combined(scale: Tensor, extra: Tensor) -> dict[str, Tensor]:
            changed = {"scale": scale.reshape(shape)}
            if point is not None:
                changed[point] = extra.reshape(shape)
            return {**present, **changed}

        scales, points, step = combinations(quantizer, values, self.config)
        scale, extra, error = coarse_to_fine(
            scales,
            points,
            step,
            lambda s, p: judge(combined(s, p)),
            keep=self.config.keep,
            children=self.config.children,
            rounds=self.config.rounds,
        )
        before = judge(present).sum()
        quantizer.load(**combined(scale, extra))
        return float(error.sum() / before) if before > 0 else 1.0

    def _judge_of_readers(
        self, graph: CapturedGraph, item: _Item, values: Tensor, context: PassContext
    ) -> _Judge:
        """Return the error of all readers, the other operand exact."""
        quantizer = item.quantizer
        granularity = quantizer.spec.granularity
        if item.sites[0].operation == "linear":
            rows = values.reshape(-1, values.shape[-1])
            if len(rows) > self.config.tokens:
                chosen = torch.randperm(len(rows), generator=context.generator)
                rows = rows[chosen[: self.config.tokens]]
            weight = torch.cat([_weight(graph, site) for site in item.sites])

            def linear_error(parameters: dict[str, Tensor]) -> Tensor:
                error = _approximated(quantizer, rows, parameters) - rows
                return (error @ weight.T).square().mean().reshape(1)

            return linear_error
        others = [
            (site.index, _sampled(context.statistics, partner))
            for site, partner in zip(item.sites, item.partners, strict=True)
            if partner is not None
        ]
        axis = granularity.axis if isinstance(granularity, PerHead) else None

        def product_error(parameters: dict[str, Tensor]) -> Tensor:
            error = _approximated(quantizer, values, parameters) - values
            total = torch.zeros(1)
            for index, other in others:
                product = (error @ other if index == 0 else other @ error).square()
                if axis is None:
                    total = total + product.mean()
                else:
                    total = total + product.movedim(axis, 0).flatten(1).mean(dim=1)
            return total

        return product_error


def _judge_of_rows(item: _Item, weight: Tensor, statistics: Statistics) -> _Judge:
    """Return the output error of each row of a weight, its input exact."""
    partner = item.partners[0]
    assert partner is not None
    total, count = statistics.get(partner.name, SecondMoment)
    moment = (total / count).float()

    def row_error(parameters: dict[str, Tensor]) -> Tensor:
        error = _approximated(item.quantizer, weight, parameters) - weight
        return ((error @ moment) * error).sum(dim=1)

    return row_error


def _reason_against(item: _Item) -> str | None:
    quantizer, granularity = item.quantizer, item.quantizer.spec.granularity
    operations = {site.operation for site in item.sites}
    if item.stored:
        if operations != {"linear"} or len(item.sites) > 1:
            return "not the weight of one linear"
        if type(granularity) is not PerChannel or not isinstance(quantizer, Affine):
            return f"quantized as {quantizer.spec.describe()}"
        return None
    if type(granularity) not in (PerTensor, PerHead):
        return f"quantized as {quantizer.spec.describe()}"
    if isinstance(quantizer, AdaLog) and type(granularity) is PerHead:
        return "one base serves all heads"
    if operations == {"linear"}:
        stored = all(
            site.index == 0 and p is not None and p.stored
            for site, p in zip(item.sites, item.partners, strict=True)
        )
        if not stored or type(granularity) is PerHead:
            return "its readers have no stored weight"
        return None
    if "linear" in operations or any(op.startswith("conv") for op in operations):
        return "a convolution, or readers of several kinds"
    if any(partner is None for partner in item.partners):
        return "the other operand is stored"
    return None


def _weight(graph: CapturedGraph, site: QuantizationSite) -> Tensor:
    node = site.reader.args[1]
    return graph.parameter(_stored_name(node))


def _stored_name(node: object) -> str:
    """Return the name of a stored tensor, behind its quantizer if it has one."""
    assert isinstance(node, fx.Node)
    source = node if node.op == "get_attr" else node.args[0]
    assert isinstance(source, fx.Node)
    return str(source.target)


def _sampled(statistics: Statistics, site: QuantizationSite) -> Tensor:
    values = statistics.get(site.name, Samples)
    assert isinstance(values, Tensor)
    return values


def _approximated(
    quantizer: Quantizer, values: Tensor, parameters: dict[str, Tensor]
) -> Tensor:
    """Return what trial parameters make of values; the quantizer's own are not read."""
    granularity = quantizer.spec.granularity
    shaped = {name: granularity.broadcast(p, values) for name, p in parameters.items()}
    codes = quantizer.encode(granularity.view(values), **shaped)
    return quantizer.decode(codes, **shaped).reshape(values.shape)
