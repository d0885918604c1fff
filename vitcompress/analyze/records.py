"""What an analysis found, and the file it is kept in."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vitcompress.errors import InputError
from vitcompress.result import ImageSet

__all__ = ["Analysis", "AnalysisEntry", "Distance", "Level", "Mode", "read_analysis"]

SCHEMA = 1
Mode = Literal["only", "except"]
Level = Literal["block", "layer", "site"]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Distance(_Entry):
    """How far logits are from those of the float model, over all images."""

    mean_kl: float
    logits_sqnr_db: float
    agreement_percent: float


class AnalysisEntry(_Entry):
    """One unit that was measured.

    Attributes:
        unit: Name of a site, module or block.
        level: Which of them.
        sites: First site of each of its quantizers.
        formats: What the quantizers are, each once.
        distance: With this unit alone, or with all but this one.
        kl_rank: Place among the units of its level, 1 for the most harmful, by mean KL.
        sqnr_rank: The same by signal-to-noise ratio of the logits.
    """

    unit: str
    level: Level
    sites: tuple[str, ...]
    formats: tuple[str, ...]
    distance: Distance
    kl_rank: int
    sqnr_rank: int


class Analysis(_Entry):
    """What each unit of a quantized model does to its logits.

    Attributes:
        schema_version: Version of this layout.
        model: What it is called.
        model_digest: As in ``result.Origin``.
        recipe: Name and scheme.
        scheme: E.g. ``W4A4``.
        resolved_recipe: YAML, every default written out.
        seed: Of the recipe.
        mode: ``only``: each entry has this unit quantized alone; ``except``: all but it.
        by: Finest level that was asked for.
        calibration: Images that ranges were found on.
        images: Images that distances were measured on.
        all_on: Everything quantized.
        all_off: Quantizers bypassed; what is left is what passes did to float tensors.
        entries: In order of level, then of harm by KL.
        not_measured: Units of level ``by`` that the time budget did not reach.
        budget_seconds: For the measurements, if there was one.
        seconds: What they took.
        versions: Of what computes.
        command: Command line, if one was used.
    """

    schema_version: int = SCHEMA
    model: str
    model_digest: str
    recipe: str
    scheme: str
    resolved_recipe: str
    seed: int
    mode: Mode
    by: Level
    calibration: ImageSet
    images: ImageSet
    all_on: Distance
    all_off: Distance
    entries: tuple[AnalysisEntry, ...]
    not_measured: tuple[str, ...]
    budget_seconds: float | None
    seconds: float
    versions: dict[str, str]
    command: str | None = None


def read_analysis(path: str | Path) -> Analysis:
    """Return the analysis that a file holds.

    Raises:
        InputError: It is missing, damaged, or of another schema.
    """
    try:
        analysis = Analysis.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {location}: {first['msg']}; is it an analysis?") from error
    if analysis.schema_version != SCHEMA:
        raise InputError(
            f"{path}: schema_version {analysis.schema_version}; this version reads {SCHEMA}"
        )
    return analysis
