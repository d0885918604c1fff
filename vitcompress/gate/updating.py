"""Write results into a baseline file; comments, order and tolerances of what is there stay."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from vitcompress.artifact import write_file
from vitcompress.errors import InputError
from vitcompress.gate.baseline import (
    PAIRED,
    Baseline,
    load_document,
    pack_bits,
    read_baseline,
    round_trip_yaml,
)
from vitcompress.gate.judging import missing_figure
from vitcompress.result import Origin, Result
from vitcompress.results import METRICS, CellName, cells_of, figure_of, image_outcomes

__all__ = ["update_baseline"]

#: Tolerances of new cells, for their owner to change. Seeds of one recipe differ by about the
#: first two; the size of one recipe does not change by itself; timings of quiet machines do.
DEFAULT_TOLERANCE = {"top1": 1.0, "agreement": 1.0, "size": 0, "latency_ratio": 0.2}

HEADER = """\
# Accepted figures, checked by `vitcompress gate`. Tolerances are yours to edit; everything
# else is written by `vitcompress gate --update-baseline`.
# top1, agreement: percent, tolerance in percentage points. size: bytes. latency_ratio: times
# faster than float32. seeds: one bit for each image, whether it was right.
"""


def update_baseline(path: Path, results: Sequence[Result]) -> dict[str, str]:
    """Write the figures of results into a baseline file, whole or not at all.

    Args:
        path: A baseline, or no file yet. Cells without a result stay as they are.
        results: Cells of a sweep, or one.

    Returns:
        What was done to each cell, in words.

    Raises:
        ConfigError: The file is no baseline, or cannot be written.
        InputError: Results do not belong together, a figure that a cell limits was not
            measured, or cells without a result would be left with another model or images.
    """
    if not results:
        raise InputError("gate: no results; sweep at least one cell")
    cells = cells_of(results)
    if path.exists():
        known, document = read_baseline(path), load_document(path)
    else:
        known = Baseline(schema=1, models={})
        document = CommentedMap({"schema": known.schema_version, "models": CommentedMap()})
        document.yaml_set_start_comment(HEADER.replace("# ", "").rstrip())
    _check_left_over(known, cells)
    done: dict[str, str] = {}
    for name, group in cells.items():
        entry = _child(document["models"], name.model)
        _describe(entry, group[0].origin)
        recipes = _child(_child(entry, "schemes"), name.scheme)
        done[str(name)] = "changed" if name.recipe in recipes else "added"
        before = repr(recipes.get(name.recipe))
        _write_cell(name, _child(recipes, name.recipe), group)
        if repr(recipes[name.recipe]) == before:
            done[str(name)] = "as it was"
    done |= {
        str(name): "kept; it has no result" for name in known.cells() if name not in cells
    }
    text = io.StringIO()
    round_trip_yaml().dump(document, text)
    write_file(path, lambda draft: _write(draft, text.getvalue()))
    return done


def _check_left_over(known: Baseline, cells: Mapping[CellName, Sequence[Result]]) -> None:
    origins = {name.model: group[0].origin for name, group in cells.items()}
    for name in known.cells():
        if name in cells or name.model not in origins:
            continue
        entry, origin = known.models[name.model], origins[name.model]
        digests = origin.model_digest, origin.evaluation.digest
        if (entry.digest, entry.images.digest) != digests:
            raise InputError(
                f"{name}: has no result, and the model or the images of the others are new; "
                "sweep it as well, or delete it from the baseline"
            )


def _describe(entry: CommentedMap, origin: Origin) -> None:
    _set(entry, "digest", DoubleQuotedScalarString(origin.model_digest))
    images = _child(entry, "images")
    _set(images, "source", DoubleQuotedScalarString(origin.evaluation.source))
    _set(images, "count", len(origin.evaluation.ids))
    _set(images, "digest", DoubleQuotedScalarString(origin.evaluation.digest))


def _write_cell(name: CellName, cell: CommentedMap, group: Sequence[Result]) -> None:
    is_new = not cell
    _set(cell, "execution", group[0].execution)
    for metric in METRICS:
        value = figure_of(group, metric)
        if metric in cell and value is None:
            raise InputError(
                f"{name}: the baseline limits {metric}, but {missing_figure(metric)}"
            )
        if value is not None and (is_new or metric in cell):
            limit = _child(cell, metric)
            _set(limit, "value", int(value) if metric == "size" else round(value, 4))
            limit.setdefault("tolerance", DEFAULT_TOLERANCE[metric])
            if is_new:
                limit.fa.set_flow_style()
    seeds = _child(cell, "seeds")
    for seed in set(seeds) - {result.origin.seed for result in group}:
        del seeds[seed]
    for result in group:
        bits = _child(seeds, result.origin.seed)
        for metric, field in PAIRED.items():
            outcomes = image_outcomes(result, metric)
            if outcomes is not None:
                _set(bits, field, DoubleQuotedScalarString(pack_bits(outcomes)))
            else:
                bits.pop(field, None)


def _child(parent: CommentedMap, key: Any) -> CommentedMap:
    """Return the mapping under a key, made if it is not there."""
    if parent.get(key) is None:
        parent[key] = CommentedMap()
    found: CommentedMap = parent[key]
    return found


def _set(parent: CommentedMap, key: str, value: Any) -> None:
    """Set a value that differs; the spelling of an equal one stays."""
    if parent.get(key) != value:
        parent[key] = value


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
