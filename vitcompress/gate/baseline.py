"""The baseline: what a sweep gave when its figures were last accepted, as YAML.

Keyed model, scheme, recipe. Besides the figures and their tolerances it keeps which images
were right, one bit each, since a difference is judged image by image.
"""

import difflib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from vitcompress.errors import ConfigError
from vitcompress.results import METRICS, CellName

__all__ = [
    "PAIRED",
    "Baseline",
    "Cell",
    "Limit",
    "ModelEntry",
    "SeedBits",
    "load_document",
    "pack_bits",
    "read_baseline",
    "round_trip_yaml",
    "unpack_bits",
]

#: Metrics judged image by image, and the bits of a seed that they read.
PAIRED = {"top1": "correct", "agreement": "agrees"}
#: ``value`` is written with four decimals.
ROUNDING = 1e-3


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Limit(_Entry):
    """A figure and how far it may move, both ways, in its own unit."""

    value: float
    tolerance: Annotated[float, Field(ge=0)]


class SeedBits(_Entry):
    """One bit for each image, as hexadecimal text.

    Attributes:
        correct: Whether the compressed model named the label; ``None`` without labels.
        agrees: Whether it named the class that the float model names.
    """

    correct: str | None = None
    agrees: str


class Cell(_Entry):
    """The limits of one model, scheme and recipe.

    Attributes:
        execution: Who computed; see ``result.Result``.
        top1: Percent; the tolerance in percentage points.
        agreement: Of the predicted class with the float model's; units of ``top1``.
        size: Bytes of the compressed model.
        latency_ratio: How many times faster than the float32 network.
        seeds: The images, seed by seed.
    """

    execution: Literal["simulated", "executed"] = "simulated"
    top1: Limit | None = None
    agreement: Limit | None = None
    size: Limit | None = None
    latency_ratio: Limit | None = None
    seeds: dict[int, SeedBits]

    @property
    def limits(self) -> dict[str, Limit]:
        """The metrics that are limited, by name."""
        found = {name: getattr(self, name) for name in METRICS}
        return {name: limit for name, limit in found.items() if limit is not None}


class ImagesEntry(_Entry):
    """The images of all cells of a model; see ``result.ImageSet``."""

    digest: str
    count: Annotated[int, Field(ge=1)]
    source: str = ""


class ModelEntry(_Entry):
    """A float model, its images, and its cells by scheme and recipe."""

    digest: str
    images: ImagesEntry
    schemes: dict[str, dict[str, Cell]]

    @model_validator(mode="after")
    def _figures_are_those_of_the_images(self) -> Self:
        for scheme, recipes in self.schemes.items():
            for recipe, cell in recipes.items():
                try:
                    _check_cell(cell, self.images.count)
                except ValueError as error:
                    raise ValueError(f"{scheme} / {recipe}: {error}") from error
        return self


class Baseline(_Entry):
    """The content of a baseline file."""

    schema_version: Literal[1] = Field(alias="schema")
    models: dict[str, ModelEntry]

    def cells(self) -> dict[CellName, Cell]:
        """Return every cell by name, in the order of the file."""
        return {
            CellName(model, scheme, recipe): cell
            for model, entry in self.models.items()
            for scheme, recipes in entry.schemes.items()
            for recipe, cell in recipes.items()
        }


def _check_cell(cell: Cell, images: int) -> None:
    if not cell.limits:
        raise ValueError(f"limits nothing; give one of {list(METRICS)}")
    if not cell.seeds:
        raise ValueError("has no seeds")
    for metric, field in PAIRED.items():
        limit: Limit | None = getattr(cell, metric)
        if limit is None:
            continue
        rows = []
        for seed, bits in cell.seeds.items():
            text: str | None = getattr(bits, field)
            if text is None:
                raise ValueError(f"seed {seed} lacks '{field}', which {metric} needs")
            rows.append(unpack_bits(text, images))
        share = 100.0 * float(np.mean(rows))
        if abs(share - limit.value) > ROUNDING:
            raise ValueError(
                f"{metric} says {limit.value:g} %, its images say {share:.4g} %; only "
                "tolerances are edited by hand, figures by --update-baseline"
            )


# Bits


def pack_bits(outcomes: Iterable[bool]) -> str:
    """Return one bit for each image as hexadecimal text, the last byte filled up with 0."""
    return np.packbits(np.fromiter(outcomes, dtype=np.bool_)).tobytes().hex()


def unpack_bits(text: str, images: int) -> NDArray[np.bool_]:
    """Return what :func:`pack_bits` was given, ``[images]``.

    Raises:
        ValueError: The text is not hexadecimal, or of another number of images.
    """
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    if len(packed) != -(-images // 8):
        raise ValueError(f"expected bits of {images} images, found {8 * len(packed)}")
    return np.unpackbits(packed, count=images).astype(np.bool_)


# The file


def round_trip_yaml() -> YAML:
    """Return a reader and writer that keeps comments, order and quotes."""
    yaml = YAML(typ="rt")
    yaml.width = 10_000  # lines are as long as their author made them
    yaml.preserve_quotes = True
    return yaml


def load_document(path: Path) -> CommentedMap:
    """Return the content of a baseline file with its comments.

    Raises:
        ConfigError: It is missing, empty, or not YAML.
    """
    try:
        document = round_trip_yaml().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: file is missing; --update-baseline writes one from the results"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem}") from error
    except (YAMLError, ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML: {detail}") from error
    if document is None:
        raise ConfigError(
            f"{path}: is empty; delete it, and --update-baseline writes one from the results"
        )
    if not isinstance(document, CommentedMap):
        raise ConfigError(f"{path}:1: expected a mapping with keys 'schema' and 'models'")
    return document


def read_baseline(path: Path) -> Baseline:
    """Return the baseline that a file holds.

    Raises:
        ConfigError: It is missing, empty or malformed; the message names the line.
    """
    document = load_document(path)
    try:
        return Baseline.model_validate(_plain(document))
    except ValidationError as error:
        found = error.errors()
        # A misspelt key is missing as well; what is there says more.
        first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
        place = first["loc"]
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = f"unknown key{_nearest(str(place[-1]), _keys_at(place[:-1]))}"
        elif first["type"] == "missing":
            reason = f"key '{place[-1]}' is missing"
            place = place[:-1]
        where = f"{path}:{_line_of(document, place)}"
        name = ".".join(str(part) for part in place)
        raise ConfigError(
            f"{where}: {name}: {reason}" if name else f"{where}: {reason}"
        ) from (error)


def _plain(value: Any) -> Any:
    """Return the content of a document in Python's own types."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _line_of(document: Any, place: tuple[int | str, ...]) -> int:
    """Return the line of a key, or of the nearest one above it that is there."""
    line = 0
    for part in place:
        if not isinstance(document, CommentedMap) or part not in document:
            break
        line = document.lc.key(part)[0]
        document = document[part]
    return line + 1


def _keys_at(place: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the layout knows at a place."""
    kind: Any = Baseline
    for part in place:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation
        else:  # a mapping from names that users choose
            kind = typing.get_args(kind)[1]
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        if len(options) == 1:  # an entry that may be left out
            (kind,) = options
    return [field.alias or name for name, field in kind.model_fields.items()]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint}; known: {known}"
