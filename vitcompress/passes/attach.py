"""Attach quantizers to sites, chosen by role and by name."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from torch import fx

from vitcompress.calibration import Request
from vitcompress.errors import ConfigError
from vitcompress.graph import (
    CapturedGraph,
    QuantizationSite,
    Role,
    enumerate_sites,
    unlisted_products,
)
from vitcompress.graph.edit import insert_quantizer
from vitcompress.passes.base import Fact, PassContext, PassReport, register
from vitcompress.quantizers import (
    FORMATS,
    Granularity,
    PerChannel,
    PerGroup,
    PerHead,
    PerTensor,
    QuantSpec,
    make_quantizer,
)

__all__ = ["Attach", "AttachConfig", "AttachRule"]

#: Roles whose tensors are ``[..., H, N, D]``.
_PER_HEAD_ROLES = frozenset({Role.QUERY, Role.KEY, Role.PROBS, Role.VALUE})


@dataclass(frozen=True, kw_only=True)
class AttachRule:
    """Which sites get which quantizer.

    Attributes:
        roles: Roles the rule applies to; a role that the model lacks is no error.
        sites: Site names or globs; one that matches nothing is an error.
        bits: Width of a code, 2 to 8.
        format: Number format.
        granularity: ``per_tensor``, ``per_channel`` (output rows of a weight, features of an
            activation), ``per_head`` (operands of attention), ``per_group`` (weights).
        group_size: Values in a group, for ``per_group``.
        symmetric: Signed codes around 0.
        strict: See :class:`vitcompress.quantizers.QuantSpec`.
        skip: Leave the sites in float.
    """

    roles: tuple[Role, ...] = ()
    sites: tuple[str, ...] = ()
    bits: int = 8
    format: str = "affine"
    granularity: Literal["per_tensor", "per_channel", "per_head", "per_group"] = "per_tensor"
    group_size: int = 64
    symmetric: bool = False
    strict: bool = True
    skip: bool = False

    def __post_init__(self) -> None:
        if not self.roles and not self.sites:
            raise ConfigError("a rule needs roles or sites; it names neither")
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"bits: expected 2 to 8, got {self.bits}")
        if self.format not in FORMATS:
            raise ConfigError(
                f"format: expected one of {sorted(FORMATS)}, got '{self.format}'"
            )
        if self.granularity == "per_group" and set(self.roles) != {Role.WEIGHT}:
            raise ConfigError("granularity: per_group is for role weight alone")

    def matches(self, site: QuantizationSite) -> bool:
        """Return whether the rule applies to a site."""
        return site.role in self.roles or any(fnmatchcase(site.name, g) for g in self.sites)

    def spec(self, site: QuantizationSite) -> QuantSpec:
        """Return the spec of a site's quantizer.

        Raises:
            ConfigError: The site has no heads.
        """
        return QuantSpec(
            bits=self.bits,
            format=self.format,
            symmetric=self.symmetric,
            granularity=self._granularity(site),
            strict=self.strict,
        )

    def _granularity(self, site: QuantizationSite) -> Granularity:
        if self.granularity == "per_channel":
            return PerChannel(site.channel_axis)
        if self.granularity == "per_group":
            return PerGroup(self.group_size)
        if self.granularity == "per_head":
            if site.role not in _PER_HEAD_ROLES:
                raise ConfigError(f"{site.name}: role {site.role} has no heads")
            axis = len(site.shape) - 3
            if axis < 0 or site.shape[axis] is None:
                raise ConfigError(
                    f"{site.name}: heads have no axis of their own in {site.shape}"
                )
            return PerHead(axis)
        return PerTensor()


@dataclass(frozen=True, kw_only=True)
class AttachConfig:
    """Settings of attach.

    Attributes:
        rules: Later rules win. Sites that no rule matches stay float and are reported.
    """

    rules: tuple[AttachRule, ...]


@register
class Attach:
    """Put quantizers on sites."""

    name: ClassVar[str] = "attach"
    config_type: ClassVar[type] = AttachConfig
    requires: ClassVar[frozenset[Fact]] = frozenset()
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.ATTACHED})
    provides: frozenset[Fact] = frozenset({Fact.ATTACHED})
    preserves_function: ClassVar[bool] = True

    def __init__(self, config: AttachConfig) -> None:
        self.config = config

    def statistics(self, graph: CapturedGraph) -> Sequence[Request]:
        return []

    def apply(self, graph: CapturedGraph, context: PassContext) -> PassReport:
        sites = enumerate_sites(graph)
        self._check_globs(sites)
        # Edges that read one value in one format share one quantizer: one tensor, one scale.
        shared: dict[tuple[fx.Node | str, QuantSpec], list[QuantizationSite]] = {}
        skipped = unlisted_products(graph)
        for site in sites.values():
            rule = next((r for r in reversed(self.config.rules) if r.matches(site)), None)
            if rule is None or rule.skip:
                skipped[site.name] = "no rule matches" if rule is None else "skipped by a rule"
                continue
            value = site.value
            key = str(value.target) if value.op == "get_attr" else value
            shared.setdefault((key, rule.spec(site)), []).append(site)
        if not shared:
            raise ConfigError(
                f"rules: each of {len(sites)} sites stays float, skipped or matched by none; "
                "`vitcompress inspect` lists them with their roles"
            )
        for (_, spec), group in shared.items():
            readers = [(site.reader, site.index) for site in group]
            quantizer = make_quantizer(spec, group[0].name)
            insert_quantizer(graph, group[0].value, readers, group[0].name, quantizer)
        graph.recompile()
        quantized = sum(len(group) for group in shared.values())
        return PassReport(
            changed=quantized,
            found=quantized + len(skipped),
            skipped=skipped,
            details={"formats": dict(Counter(spec.describe() for _, spec in shared))},
        )

    def _check_globs(self, sites: dict[str, QuantizationSite]) -> None:
        for position, rule in enumerate(self.config.rules):
            for glob in rule.sites:
                if not any(fnmatchcase(name, glob) for name in sites):
                    raise ConfigError(
                        f"rules[{position}].sites: '{glob}' matches none of "
                        f"{len(sites)} sites; `vitcompress inspect` lists them"
                    )
