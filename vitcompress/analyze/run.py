"""Quantize once, measure every unit, rank them."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from torch import nn

import calib
from vitcompress.analyze.measuring import Bench, Search, Unit, harm
from vitcompress.analyze.records import Analysis, AnalysisEntry, Distance, Level, Mode
from vitcompress.api import bound_source, captured
from vitcompress.calibration import CalibrationSource
from vitcompress.effort import resolve_recipe
from vitcompress.engine import run_recipe
from vitcompress.errors import ConfigError
from vitcompress.graph import CapturedGraph
from vitcompress.models import LoadedModel
from vitcompress.models.identity import computing_versions, model_digest
from vitcompress.passes.base import Fact, quantizers_of
from vitcompress.recipe import Recipe, Scheme
from vitcompress.result import ImageSet

__all__ = ["analyze", "check_settings"]


def analyze(
    model: nn.Module | LoadedModel | CapturedGraph,
    *,
    bits: int | None = None,
    scheme: str | Scheme | None = None,
    recipe: str | Path | Recipe | None = None,
    source: calib.Source | CalibrationSource | None = None,
    evaluation: calib.Source | CalibrationSource | None = None,
    mode: Mode = "only",
    by: Level = "site",
    budget: float | None = None,
    overrides: Sequence[str] = (),
    model_id: str = "",
    command: str | None = None,
) -> Analysis:
    """Return how far each unit, quantized alone or left out, moves the logits.

    Args:
        model: As for ``quantize``; left as it was.
        bits: As for ``quantize``.
        scheme: As for ``quantize``.
        recipe: As for ``quantize``.
        source: Calibration images; 32 rendered ones if not given.
        evaluation: Images to measure on, kept in memory; the calibration images if not given.
        mode: ``only`` quantizes one unit at a time, ``except`` all but one.
        by: ``site`` (one quantizer), ``layer`` or ``block``.
        budget: Seconds for the measurements, quantization not counted. Blocks are measured
            first, then what the most harmful ones consist of, down to ``by``.
        overrides: As for ``quantize``.
        model_id: What to call the model.
        command: Command line, for the record.

    Raises:
        ConfigError: A setting is wrong.
        UnsupportedModelError: The model cannot be captured.
        PassError: A pass failed on this model.
    """
    check_settings(mode, by, budget)
    chosen = resolve_recipe(bits=bits, scheme=scheme, recipe=recipe, overrides=overrides)
    source = bound_source(model, source)
    images = source if evaluation is None else bound_source(model, evaluation)
    reference = captured(model, next(iter(source)).images[:2], model_id)
    # Codes cannot be switched back to the values they came from.
    open_passes = tuple(step for step in chosen.passes if Fact.FINAL not in step.provides)
    graph, _ = run_recipe(dataclasses.replace(chosen, passes=open_passes), reference, source)
    bench = Bench(graph, reference, list(images))
    started = time.perf_counter()
    all_on, all_off = bench.distance(frozenset()), bench.distance(frozenset(bench.targets))
    search = Search(bench, mode, by, None if budget is None else started + budget)
    measured = search.run()
    return Analysis(
        model=reference.provenance.model,
        model_digest=model_digest(model),
        recipe=chosen.label,
        scheme=str(chosen.scheme),
        resolved_recipe=chosen.to_yaml(),
        seed=chosen.seed,
        mode=mode,
        by=by,
        calibration=ImageSet.of(source),
        images=ImageSet.of(images),
        all_on=all_on,
        all_off=all_off,
        entries=_entries(graph, measured, mode),
        not_measured=tuple(
            unit.name for unit in search.units[by] if unit.targets not in search.known
        ),
        budget_seconds=budget,
        seconds=round(time.perf_counter() - started, 3),
        versions=computing_versions(),
        command=command,
    )


def check_settings(mode: str, by: str, budget: float | None) -> None:
    """Check what ``analyze`` takes besides the settings of ``quantize``.

    Raises:
        ConfigError: A word is unknown, or there is no time.
    """
    for name, value, known in (("mode", mode, get_args(Mode)), ("by", by, get_args(Level))):
        if value not in known:
            raise ConfigError(f"{name}: expected one of {list(known)}, got '{value}'")
    if budget is not None and not budget > 0:
        raise ConfigError(f"budget: expected seconds above 0, got {budget}")


def _entries(
    graph: CapturedGraph, measured: Sequence[tuple[Unit, Distance]], mode: Mode
) -> tuple[AnalysisEntry, ...]:
    quantizers = quantizers_of(graph)
    entries: list[AnalysisEntry] = []
    for level in get_args(Level):
        own = [(unit, distance) for unit, distance in measured if unit.level == level]
        by_kl = sorted(own, key=lambda pair: -harm(pair[1], mode)[0])
        by_sqnr = sorted(own, key=lambda pair: -harm(pair[1], mode)[1])
        places = {unit.name: place for place, (unit, _) in enumerate(by_sqnr, 1)}
        for place, (unit, distance) in enumerate(by_kl, 1):
            members = [q for target, q in quantizers.items() if target in unit.targets]
            entries.append(
                AnalysisEntry(
                    unit=unit.name,
                    level=level,
                    sites=tuple(q.site for q in members),
                    formats=tuple(dict.fromkeys(q.spec.describe() for q in members)),
                    distance=distance,
                    kl_rank=place,
                    sqnr_rank=places[unit.name],
                )
            )
    return tuple(entries)
