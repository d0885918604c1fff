"""Accuracy, agreement and distance from a reference, on one set of images."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnxruntime
import torch
from torch import Tensor
from tqdm import tqdm

from vitcompress.calibration import CalibrationSource
from vitcompress.errors import InputError
from vitcompress.graph import OutputDict
from vitcompress.numerics.metrics import kl_divergence, sqnr_db
from vitcompress.report import EvaluationEntry

__all__ = ["Predictor", "Recorder", "Replay", "evaluate", "logits_of", "onnx_predictor"]

#: Maps preprocessed images ``[B, C, H, W]`` to logits ``[B, O]``, bare or among named outputs.
Predictor = Callable[[Tensor], Any]


def evaluate(
    model: Predictor,
    source: CalibrationSource,
    *,
    reference: Predictor | None = None,
    execution: Literal["float", "simulated", "executed"] = "simulated",
    data: str = "",
) -> EvaluationEntry:
    """Return top-1 and top-5 where there are labels, and distances where there is a reference.

    Args:
        model: Compressed model, module, or any function of images that gives logits.
        source: Preprocessed images, with labels or without.
        reference: The float model; sees the same images, so the comparison is paired.
        execution: Who computes: see :class:`vitcompress.report.EvaluationEntry`.
        data: What to call the images in the report.

    Raises:
        InputError: A label is not a class of the model.
    """
    tally = _Tally()
    predict = logits_of(model)
    compare = None if reference is None else logits_of(reference)
    started = time.perf_counter()
    with torch.no_grad():
        for batch in tqdm(source, desc="evaluating", disable=None, leave=False):
            logits = predict(batch.images)
            expected = None if compare is None else compare(batch.images)
            tally.add(logits, expected, batch.labels, batch.ids)
    skipped = {s.id: s.reason for s in getattr(source, "skipped", ())}
    return EvaluationEntry(
        data=data or _description(source),
        images=tally.images,
        labelled=tally.labelled > 0,
        execution=execution,
        seconds=round(time.perf_counter() - started, 3),
        skipped=skipped,
        **tally.figures(),
    )


def logits_of(model: Predictor) -> Callable[[Tensor], Tensor]:
    """Return a function to logits, whatever form the model's output has."""

    def predict(images: Tensor) -> Tensor:
        output = model(images)
        if isinstance(output, Tensor):
            return output
        if isinstance(output, OutputDict):
            return output["logits"] if "logits" in output else next(iter(output.values()))
        found = getattr(output, "logits", None)
        if not isinstance(found, Tensor):
            found = next(iter(output))
        assert isinstance(found, Tensor)
        return found

    return predict


def onnx_predictor(path: Path) -> Callable[[Tensor], Tensor]:
    """Return a function that runs an ONNX file in onnxruntime on the CPU.

    Raises:
        InputError: The file is missing or cannot be run.
    """
    if not path.is_file():
        raise InputError(f"{path}: file is missing")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's exception types are not public
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: onnxruntime cannot load it: {reason}") from error
    feed, shape = session.get_inputs()[0].name, session.get_inputs()[0].shape
    names = [output.name for output in session.get_outputs()]
    output = "logits" if "logits" in names else names[0]

    def predict(images: Tensor) -> Tensor:
        found = list(images.shape)
        fixed = [extent if isinstance(extent, int) else None for extent in shape]
        if len(found) != len(fixed) or any(
            extent not in (None, own) for extent, own in zip(fixed, found, strict=True)
        ):
            raise InputError(f"{path}: expected images of {shape}, found {found}")
        return torch.from_numpy(session.run([output], {feed: images.numpy()})[0])

    return predict


class Replay:
    """Gives known logits again, batch by batch, instead of computing them.

    Args:
        logits: Of all images in the order of the source, ``[N, O]``.
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self._position = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of the next ``len(images)`` images."""
        start, self._position = self._position, self._position + len(images)
        return self._logits[start : self._position]


class Recorder:
    """Computes logits, and keeps them.

    Args:
        model: What computes.
    """

    def __init__(self, model: Predictor) -> None:
        self._predict = logits_of(model)
        self._kept: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of ``images``, ``[B, O]``."""
        self._kept.append(self._predict(images))
        return self._kept[-1]

    def logits(self) -> Tensor:
        """Return the logits of everything seen so far, ``[N, O]``."""
        return torch.cat(self._kept)


@dataclass
class _Tally:
    """Running sums over batches."""

    images: int = 0
    labelled: int = 0
    top1: int = 0
    top5: int = 0
    reference_top1: int = 0
    agreed: int = 0
    kl: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    compared: bool = False

    def add(
        self,
        logits: Tensor,
        expected: Tensor | None,
        labels: Tensor | None,
        ids: Iterable[str],
    ) -> None:
        self.images += len(logits)
        best = logits.argmax(dim=-1)
        if labels is not None:
            self._check_labels(labels, logits.shape[-1], ids)
            self.labelled += len(labels)
            self.top1 += int((best == labels).sum())
            ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
            self.top5 += int((ranked == labels[:, None]).any(dim=-1).sum())
        if expected is not None:
            self.compared = True
            self.agreed += int((best == expected.argmax(dim=-1)).sum())
            self.kl += float(kl_divergence(expected, logits).sum())
            self.signal += float(expected.double().square().sum())
            self.noise += float((logits - expected).double().square().sum())
            if labels is not None:
                self.reference_top1 += int((expected.argmax(dim=-1) == labels).sum())

    @staticmethod
    def _check_labels(labels: Tensor, classes: int, ids: Iterable[str]) -> None:
        for label, name in zip(labels.tolist(), ids, strict=True):
            if not 0 <= label < classes:
                raise InputError(
                    f"{name}: label {label} is no class of this model, which has {classes}; "
                    "do the labels belong to it?"
                )

    def figures(self) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        if self.labelled:
            found["top1_percent"] = 100.0 * self.top1 / self.labelled
            found["top5_percent"] = 100.0 * self.top5 / self.labelled
        if self.compared:
            found["agreement_percent"] = 100.0 * self.agreed / self.images
            found["mean_kl"] = self.kl / self.images
            found["logits_sqnr_db"] = sqnr_db(self.signal, self.noise)
        if self.labelled and self.compared:
            reference = 100.0 * self.reference_top1 / self.labelled
            found["reference_top1_percent"] = reference
            found["top1_drop_pp"] = 100.0 * (self.reference_top1 - self.top1) / self.labelled
        return found


def _description(source: CalibrationSource) -> str:
    describe = getattr(source, "describe", None)
    return str(describe()) if callable(describe) else f"{len(source)} images"
