"""One result: what a model, a recipe and a seed gave on a set of images, and its origin.

A sweep writes one such file for each cell; gates, comparisons and reports read them. A result
keeps what happened to each image, because two results are compared image by image.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from vitcompress.calibration import CalibrationSource
from vitcompress.errors import InputError
from vitcompress.numerics.metrics import kl_divergence
from vitcompress.report import CompressionReport

__all__ = ["ImageSet", "Origin", "Outcomes", "Result", "read_result"]

SCHEMA = 1


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ImageSet(_Entry):
    """Which images, in which order, as the model sees them.

    Attributes:
        source: What they are, for people.
        ids: Name of each, in order.
        digest: SHA-256 over names, labels, contents and preprocessing.
    """

    source: str
    ids: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, source: CalibrationSource) -> "ImageSet":
        """Return name, ids and digest of the images of a source."""
        describe = getattr(source, "describe", None)
        return cls(
            source=str(describe()) if callable(describe) else type(source).__name__,
            ids=tuple(getattr(source, "sample_ids", ())),
            digest=source.digest(),
        )


class Origin(_Entry):
    """Everything that decides a result, but for the rounding of float operations.

    Rounding differs between processors and batch sizes; on one machine, equal origins give
    equal results.

    Attributes:
        model: What it is called.
        model_digest: SHA-256 over tensors and structure of the float model, found without
            capturing it; ``models.identity`` says what it covers.
        recipe: Name of the recipe.
        scheme: E.g. ``W4A8``.
        resolved_recipe: The recipe as YAML, every default written out.
        seed: Of the recipe and of the choice of calibration images.
        calibration: Images that the passes saw.
        evaluation: Images that the outcomes are about.
        versions: Of every library that computes.
    """

    model: str
    model_digest: str
    recipe: str
    scheme: str
    resolved_recipe: str
    seed: int
    calibration: ImageSet
    evaluation: ImageSet
    versions: dict[str, str]

    def key(self) -> str:
        """Return the SHA-256 under which a result with this origin is stored."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class Outcomes(_Entry):
    """What happened to each image, in the order of ``Origin.evaluation.ids``.

    Attributes:
        labels: Class of each image; ``None`` where it is not known.
        predictions: Most likely class by the compressed model.
        in_top5: Whether the label is among the five most likely; ``None`` without a label.
        reference_predictions: Most likely class by the float model.
        kl: KL divergence of the compressed model's distribution from the float model's, nats.
    """

    labels: tuple[int | None, ...]
    predictions: tuple[int, ...]
    in_top5: tuple[bool | None, ...]
    reference_predictions: tuple[int, ...]
    kl: tuple[float, ...]

    @classmethod
    def of(cls, logits: Tensor, reference: Tensor, labels: Tensor | None) -> "Outcomes":
        """Return what two models made of the same images.

        Args:
            logits: Of the compressed model, ``[N, O]``.
            reference: Of the float model, ``[N, O]``.
            labels: ``[N]`` int64, or ``None`` where they are not known.
        """
        in_top5: list[bool | None] = [None] * len(logits)
        if labels is not None:
            ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
            in_top5 = (ranked == labels[:, None]).any(dim=-1).tolist()
        return cls(
            labels=tuple([None] * len(logits) if labels is None else labels.tolist()),
            predictions=tuple(logits.argmax(dim=-1).tolist()),
            in_top5=tuple(in_top5),
            reference_predictions=tuple(reference.argmax(dim=-1).tolist()),
            kl=tuple(kl_divergence(reference, logits).tolist()),
        )

    @model_validator(mode="after")
    def _of_one_length(self) -> "Outcomes":
        lengths = {name: len(getattr(self, name)) for name in type(self).model_fields}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"lists of different lengths: {lengths}")
        return self


class Result(_Entry):
    """One cell of a sweep.

    Attributes:
        schema_version: Version of this layout.
        origin: Where it came from.
        execution: Who computed the outcomes; see ``report.EvaluationEntry``.
        outcomes: Image by image.
        report: The compression's own report; its evaluations summarise ``outcomes``.
        latency_ratio: How many times faster than the float32 network, if it was measured.
        seconds: Wall time of compression and evaluation.
        command: Command line that made it, if one did.
    """

    schema_version: int = SCHEMA
    origin: Origin
    execution: Literal["simulated", "executed"]
    outcomes: Outcomes
    report: CompressionReport
    latency_ratio: float | None = None
    seconds: float
    command: str | None = None

    @model_validator(mode="after")
    def _outcomes_are_of_these_images(self) -> "Result":
        images, found = len(self.origin.evaluation.ids), len(self.outcomes.labels)
        if images != found:
            raise ValueError(f"outcomes of {found} images, but {images} are named")
        return self

    def to_json(self) -> str:
        """Return the result as JSON text."""
        return self.model_dump_json(indent=1) + "\n"


def read_result(path: Path) -> Result:
    """Return the result that a file holds.

    Raises:
        InputError: It is missing, damaged, or of another schema.
    """
    if not path.is_file():
        raise InputError(f"{path}: file is missing")
    try:
        result = Result.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        where = f"{path}: {location}" if location else str(path)
        raise InputError(f"{where}: {first['msg']}; is it a result of a sweep?") from error
    if result.schema_version != SCHEMA:
        raise InputError(
            f"{path}: schema_version {result.schema_version}; this version reads {SCHEMA}"
        )
    return result
