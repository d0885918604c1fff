"""What is different between two results, site by site, and whether it cost accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict

from vitcompress import api
from vitcompress.artifact import is_artifact
from vitcompress.errors import InputError
from vitcompress.numerics.paired import paired_difference
from vitcompress.report import CompressionReport, SiteEntry
from vitcompress.result import Result, read_result
from vitcompress.results import image_outcomes

__all__ = ["Change", "Comparison", "PairedChange", "SiteChange", "compare"]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Change(_Entry):
    """A setting or figure that differs; ``None`` where one side has none."""

    key: str
    a: str | int | float | bool | None
    b: str | int | float | bool | None


class SiteChange(_Entry):
    """A site on both sides.

    Attributes:
        site: Its name.
        role: What it is; that of A where the two differ.
        spec_a: Number format in A; ``None`` is float.
        spec_b: The same in B.
        sqnr_db_a: Signal to noise in A; ``None`` where it is float.
        sqnr_db_b: The same in B.
        sqnr_change_db: B less A; ``None`` unless both were measured.
        range_a: Least and largest value seen in A; ``None`` for stored tensors.
        range_b: The same in B.
        changed: Whether anything differs.
    """

    site: str
    role: str
    spec_a: str | None
    spec_b: str | None
    sqnr_db_a: float | None
    sqnr_db_b: float | None
    sqnr_change_db: float | None
    range_a: tuple[float, float] | None
    range_b: tuple[float, float] | None
    changed: bool


class PairedChange(_Entry):
    """A share of the same images, in percent; see ``numerics.paired``."""

    metric: str
    a: float
    b: float
    difference_pp: float
    low_pp: float
    high_pp: float
    p_value: float
    gained: int
    lost: int


class Comparison(_Entry):
    """Two results beside each other.

    Attributes:
        schema_version: Version of this layout.
        a: What the first is called.
        b: What the second is called.
        protocol: Model, images, seeds, versions: what differs of the conditions.
        recipe: Settings that differ, by their place in the recipe.
        size: Storage figures that differ.
        sites: All sites that both have, in the order of A.
        only_a: Sites that only A has.
        only_b: Sites that only B has.
        accuracy: B against A, image by image.
        not_paired: Why there is no ``accuracy``.
    """

    schema_version: int = 1
    a: str
    b: str
    protocol: tuple[Change, ...]
    recipe: tuple[Change, ...]
    size: tuple[Change, ...]
    sites: tuple[SiteChange, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    accuracy: tuple[PairedChange, ...]
    not_paired: str | None

    def changed_sites(self) -> list[SiteChange]:
        """Return the sites that differ, those that lost most first."""
        changed = [site for site in self.sites if site.changed]
        return sorted(changed, key=lambda site: site.sqnr_change_db or 0.0)


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Return how two results differ.

    Args:
        a: The file of a result, or an artefact directory.
        b: What is compared with it.

    Raises:
        InputError: A result is missing or damaged, or some of its images have no label.
        ArtifactError: An artefact is damaged.
    """
    first, second = _open(Path(a)), _open(Path(b))
    sites_a = {site.site: site for site in first.report.sites}
    sites_b = {site.site: site for site in second.report.sites}
    accuracy, reason = _accuracy(first, second)
    return Comparison(
        a=first.name,
        b=second.name,
        protocol=_changes(first.protocol, second.protocol),
        recipe=_changes(first.recipe, second.recipe),
        size=_changes(_size(first.report), _size(second.report)),
        sites=tuple(
            _site_change(site, sites_b[name])
            for name, site in sites_a.items()
            if name in sites_b
        ),
        only_a=tuple(name for name in sites_a if name not in sites_b),
        only_b=tuple(name for name in sites_b if name not in sites_a),
        accuracy=accuracy,
        not_paired=reason,
    )


# Reading


@dataclass(frozen=True)
class _Side:
    """One of the two: its name, conditions, recipe and figures."""

    name: str
    protocol: dict[str, Any]
    recipe: dict[str, Any]
    report: CompressionReport
    result: Result | None


def _open(path: Path) -> _Side:
    if is_artifact(path):
        model = api.load(path)
        return _Side(
            name=str(path),
            protocol=_protocol(model.report),
            recipe=_flat(model.recipe.to_dict()),
            report=model.report,
            result=None,
        )
    if path.is_dir():
        raise InputError(
            f"{path}: is a directory but no artefact; name the file of a result, such as one "
            "of a sweep's cells/"
        )
    result = read_result(path)
    origin = result.origin
    protocol = {
        **_protocol(result.report),
        **_flat({"versions": origin.versions}),
        "model_digest": origin.model_digest,
        "calibration": origin.calibration.source,
        "calibration digest": origin.calibration.digest,
        "evaluation": origin.evaluation.source,
        "evaluation digest": origin.evaluation.digest,
        "seed": origin.seed,
        "execution": result.execution,
        "command": result.command,
    }
    try:
        recipe = _flat(yaml.safe_load(origin.resolved_recipe))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: origin.resolved_recipe: not valid YAML") from error
    return _Side(str(path), protocol, recipe, result.report, result)


def _protocol(report: CompressionReport) -> dict[str, Any]:
    """Return the conditions of a report; recipes are compared on their own."""
    known = {"source", "source_digest", "sample_ids", "resolved_recipe"}
    return {
        "model": report.model,
        "scheme": report.scheme,
        "calibration": report.protocol.source,
        "calibration digest": report.protocol.source_digest,
        **_flat(report.protocol.model_dump(mode="json", exclude=known)),
    }


def _size(report: CompressionReport) -> dict[str, Any]:
    return _flat(report.size.model_dump(exclude={"largest_float_tensors"}))


def _flat(value: Any, place: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings and lists by their dotted place."""
    if isinstance(value, Mapping) and value:
        items = list(value.items())
    elif isinstance(value, list) and value and isinstance(value[0], (Mapping, list)):
        items = list(enumerate(value))
    else:
        return {place: value}
    return {
        name: leaf
        for key, item in items
        for name, leaf in _flat(item, f"{place}.{key}" if place else str(key)).items()
    }


# Differences


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Change, ...]:
    keys = dict.fromkeys([*a, *b])
    return tuple(
        Change(key=key, a=_leaf(a.get(key)), b=_leaf(b.get(key)))
        for key in keys
        if a.get(key) != b.get(key)
    )


def _leaf(value: Any) -> str | int | float | bool | None:
    return value if isinstance(value, (str, int, float)) or value is None else str(value)


def _site_change(a: SiteEntry, b: SiteEntry) -> SiteChange:
    change = None
    if a.sqnr_db is not None and b.sqnr_db is not None:
        # Two sites without noise are equal, though the difference of infinities is none.
        change = 0.0 if a.sqnr_db == b.sqnr_db else b.sqnr_db - a.sqnr_db
    return SiteChange(
        site=a.site,
        role=a.role,
        spec_a=a.spec,
        spec_b=b.spec,
        sqnr_db_a=a.sqnr_db,
        sqnr_db_b=b.sqnr_db,
        sqnr_change_db=change,
        range_a=_range(a),
        range_b=_range(b),
        changed=a != b,
    )


def _range(site: SiteEntry) -> tuple[float, float] | None:
    return None if site.low is None or site.high is None else (site.low, site.high)


def _accuracy(a: _Side, b: _Side) -> tuple[tuple[PairedChange, ...], str | None]:
    for side in (a, b):
        if side.result is None:
            return (), f"{side.name} is an artefact, which keeps no outcomes of single images"
    assert a.result is not None
    assert b.result is not None
    origin_a, origin_b = a.result.origin, b.result.origin
    if origin_a.evaluation.digest != origin_b.evaluation.digest:
        return (), (
            f"{a.name} is about {origin_a.evaluation.source}, {b.name} about "
            f"{origin_b.evaluation.source}, whose digest differs"
        )
    metrics = ["top1"]
    if origin_a.model_digest == origin_b.model_digest:
        metrics.append("agreement")
    found = []
    for metric in metrics:
        before, after = image_outcomes(a.result, metric), image_outcomes(b.result, metric)
        if before is None or after is None:
            continue
        paired = paired_difference(before[None], after[None])
        found.append(
            PairedChange(
                metric=metric,
                a=100.0 * float(np.mean(before)),
                b=100.0 * float(np.mean(after)),
                difference_pp=paired.difference_pp,
                low_pp=paired.low_pp,
                high_pp=paired.high_pp,
                p_value=paired.p_value,
                gained=paired.gained,
                lost=paired.lost,
            )
        )
    if not found:
        return (), "these images have no labels, and the two float models differ"
    return tuple(found), None
