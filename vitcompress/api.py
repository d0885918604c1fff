"""The Python door: quantize, load, evaluate, save, export."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import calib
from vitcompress.artifact import StoredModel, read_artifact, write_artifact, write_files
from vitcompress.calibration import CalibrationSource
from vitcompress.effort import resolve_recipe
from vitcompress.engine import Checkpoint, LocalEngine, run_recipe
from vitcompress.engine.memory import PeakMemory
from vitcompress.errors import ArtifactError, ConfigError
from vitcompress.evaluate import Replay, evaluate
from vitcompress.export.onnx import ExportResult
from vitcompress.export.onnx import export_onnx as write_onnx
from vitcompress.graph import CapturedGraph, OutputDict, capture
from vitcompress.measure import measure_activations
from vitcompress.models import LoadedModel
from vitcompress.models.identity import model_digest
from vitcompress.models.preprocessing import from_attributes
from vitcompress.recipe import Recipe, Scheme
from vitcompress.report import (
    CompressionReport,
    ExportEntry,
    ProtocolEntry,
    StageEntry,
    pass_entry,
    site_entries,
    size_of,
)

__all__ = [
    "CompressedModel",
    "capture_model",
    "export_onnx",
    "load",
    "quantize",
]

#: Calibration images where the caller names no source.
DEFAULT_SAMPLES = 32
#: Images on which an exported file is compared with its model.
VERIFY_IMAGES = 16


class CompressedModel:
    """A compressed model: callable, savable, exportable.

    Attributes:
        graph: The graph, weights stored as codes.
        recipe: What made it, every default written out.
        report: Figures and protocol.
        preprocessing: How images become its input; ``None`` if the caller prepares them.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        recipe: Recipe,
        report: CompressionReport,
        preprocessing: calib.Preprocessing | None,
    ) -> None:
        self.graph = graph
        self.recipe = recipe
        self.report = report
        self.preprocessing = preprocessing

    def __call__(self, images: Tensor) -> Tensor | OutputDict:
        """Return the output for ``[B, C, H, W]`` images: a tensor, or named tensors."""
        return self.graph(images)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the artefact directory, whole or not at all.

        Raises:
            ConfigError: The destination is taken or cannot be written.
        """
        settings = {
            "preprocessing": None
            if self.preprocessing is None
            else self.preprocessing.to_dict()
        }
        documents = {
            "recipe.yaml": self.recipe.to_yaml(),
            "report.json": self.report.to_json(),
        }
        stored = StoredModel(self.graph, settings, documents)
        write_artifact(Path(path), stored, overwrite=overwrite)

    def export_onnx(
        self,
        path: str | Path,
        *,
        target: str = "ort-cpu",
        batch: int | None = None,
        leftovers: str = "float32",
        ir: bool = False,
        images: Tensor | None = None,
        overwrite: bool = True,
    ) -> ExportResult:
        """Write and verify an ONNX file; nothing is left behind if verification fails.

        Args:
            path: File to write.
            target: ``ort-cpu``, ``openvino``, ``tensorrt`` or ``generic``.
            batch: Images in one inference; any number by default.
            leftovers: How tables that no quantizer reads (position embeddings, class tokens)
                are stored: ``float32``, ``float16`` or ``int8``.
            ir: Write OpenVINO's own form beside the file as well, as ``.xml`` and ``.bin``.
            images: Preprocessed images for the comparison; rendered ones by default.
            overwrite: Replace existing files.

        Raises:
            ConfigError: A setting is unknown, or a file cannot be written.
            ExportError: The model cannot be written for the target, or the file is wrong.
        """
        results: list[ExportResult] = []
        if images is None:
            images = self._verification_images()
        metadata = {
            "model": self.graph.provenance.model,
            "recipe": self.recipe.label,
            "preprocessing": None
            if self.preprocessing is None
            else self.preprocessing.to_dict(),
        }

        def write(*drafts: Path) -> None:
            results.append(
                write_onnx(
                    self.graph,
                    drafts[0],
                    images,
                    target=target,
                    batch=batch,
                    leftovers=leftovers,
                    ir_path=drafts[1] if ir else None,
                    metadata=metadata,
                )
            )

        destination = Path(path)
        beside = [destination.with_suffix(ending) for ending in (".xml", ".bin") if ir]
        write_files([destination, *beside], write, overwrite=overwrite)
        entry = ExportEntry.of(results[0])
        self.report = self.report.model_copy(update={"exports": (*self.report.exports, entry)})
        return results[0]

    def _verification_images(self) -> Tensor:
        if self.preprocessing is None:
            return self.graph.example(VERIFY_IMAGES)
        source = calib.open_source(
            "synthetic", samples=VERIFY_IMAGES, preprocessing=self.preprocessing
        )
        return torch.cat([batch.images for batch in source])


def quantize(
    model: nn.Module | LoadedModel | CapturedGraph,
    *,
    bits: int | None = None,
    scheme: str | Scheme | None = None,
    effort: str | None = None,
    recipe: str | Path | Recipe | None = None,
    source: calib.Source | CalibrationSource | None = None,
    overrides: Sequence[str] = (),
    model_id: str = "",
    checkpoint: str | Path | None = None,
) -> CompressedModel:
    """Return a quantized copy of a model, with a report.

    Args:
        model: Any module from images to logits, or a graph captured from one (which saves the
            capture where one model is quantized several times); left as it was.
        bits: Weight bits; activations take 8, which is what runtimes execute.
        scheme: Both widths, e.g. ``W4A4``; instead of ``bits``.
        effort: ``fast`` (the default), ``balanced`` or ``best``: chooses the recipe for the
            scheme; see :mod:`vitcompress.effort`.
        recipe: Name, file or object; instead of ``effort``.
        source: Calibration images; 32 rendered ones if not given.
        overrides: Recipe settings such as ``passes.1.method=minmax``.
        model_id: What to call the model in files.
        checkpoint: Directory of finished blocks; the same call again goes on from there.

    Raises:
        ConfigError: A setting is wrong, or the checkpoint is that of another run.
        InputError: The model's weights are not finite.
        UnsupportedModelError: The model cannot be captured.
        PassError: A pass failed on this model.
    """
    chosen = resolve_recipe(
        bits=bits, scheme=scheme, effort=effort, recipe=recipe, overrides=overrides
    )
    stages: list[StageEntry] = []
    source = bound_source(model, source)
    with _stage("read images", stages):
        first = next(iter(source)).images
    with _stage("capture", stages):
        reference = captured(model, first[:2], model_id)
    kept = None
    if checkpoint is not None:
        kept = Checkpoint.of_run(Path(checkpoint), chosen, reference, source)
    return compress(
        chosen,
        reference,
        source,
        engine=LocalEngine(kept),
        model_digest=model_digest(model),
        stages=stages,
    )


def compress(
    recipe: Recipe,
    reference: CapturedGraph,
    source: CalibrationSource,
    *,
    engine: LocalEngine,
    model_digest: str,
    stages: Sequence[StageEntry] = (),
    expected: Tensor | None = None,
) -> CompressedModel:
    """Return what a recipe makes of a captured model, with a report.

    Args:
        recipe: Passes in order.
        reference: The float model; not changed.
        source: Calibration images.
        engine: Runs data through graphs; it may know some answers already.
        model_digest: Of the float model, for the report.
        stages: What was done before, for the report.
        expected: Logits of the float model on the source, if they are known, ``[N, O]``.

    Raises:
        ConfigError: A setting is wrong.
        PassError: A pass failed on this model.
    """
    stages = list(stages)
    with _stage("compress", stages):
        graph, records = run_recipe(recipe, reference, source, engine)
    with _stage("measure", stages):
        measurements = measure_activations(graph, source)
    with _stage("compare", stages):
        known = reference.logits if expected is None else Replay(expected)
        entry = evaluate(graph.logits, source, reference=known)
    weights: dict[str, float] = {}
    for record in records:
        weights.update(record.report.details.get("weight_sqnr_db", {}))
    preprocessing = getattr(source, "preprocessing", None)
    float_bytes = sum(t.numel() * t.element_size() for t in reference.tensors().values())
    report = CompressionReport(
        model=graph.provenance.model,
        recipe=recipe.label,
        scheme=str(recipe.scheme),
        protocol=ProtocolEntry(
            source=_describe(source),
            sample_ids=tuple(getattr(source, "sample_ids", ())),
            source_digest=source.digest(),
            preprocessing=None if preprocessing is None else preprocessing.to_dict(),
            seed=recipe.seed,
            versions=graph.provenance.versions,
            model_digest=model_digest,
            resolved_recipe=recipe.to_yaml(),
        ),
        passes=tuple(pass_entry(record) for record in records),
        stages=tuple(stages),
        sites=site_entries(graph, measurements, weights),
        size=size_of(graph, float_bytes),
        evaluations=(entry.model_copy(update={"data": f"calibration: {entry.data}"}),),
    )
    return CompressedModel(graph, recipe, report, preprocessing)


def load(path: str | Path) -> CompressedModel:
    """Return the model saved in an artefact directory. Nothing in it is executed.

    Raises:
        ArtifactError: It is incomplete, damaged or of an unknown version.
    """
    folder = Path(path)
    stored = read_artifact(folder)
    try:
        recipe = Recipe.from_dict(
            yaml.safe_load(stored.documents["recipe.yaml"]), where=str(folder / "recipe.yaml")
        )
        report = CompressionReport.from_json(
            stored.documents["report.json"], str(folder / "report.json")
        )
        fields = stored.settings["preprocessing"]
        preprocessing = None if fields is None else calib.Preprocessing.from_dict(fields)
    except KeyError as error:
        raise ArtifactError(
            f"{folder}: lacks {error}; it was not written by this library"
        ) from error
    except (ConfigError, calib.SourceError, yaml.YAMLError, TypeError) as error:
        raise ArtifactError(f"{folder}: {error}") from error
    return CompressedModel(stored.graph, recipe, report, preprocessing)


def export_onnx(
    model: CompressedModel,
    path: str | Path,
    *,
    target: str = "ort-cpu",
    leftovers: str = "float32",
    ir: bool = False,
) -> ExportResult:
    """Write and verify an ONNX file; see :meth:`CompressedModel.export_onnx`."""
    return model.export_onnx(path, target=target, leftovers=leftovers, ir=ir)


def capture_model(model: nn.Module | LoadedModel) -> CapturedGraph:
    """Return the float graph of a model whose input size is known from its preprocessing."""
    module = model.module if isinstance(model, LoadedModel) else model
    prepared = (
        model.preprocessing
        if isinstance(model, LoadedModel)
        else from_attributes(type(module).__name__, module, None)
    )
    images = torch.zeros(2, len(prepared.mean), *prepared.size)
    return capture(
        module, images, model_id=model.name if isinstance(model, LoadedModel) else ""
    )


def captured(
    model: nn.Module | LoadedModel | CapturedGraph, images: Tensor, model_id: str
) -> CapturedGraph:
    """Return the graph of a model; ``images`` gives the shape of its input."""
    if isinstance(model, CapturedGraph):
        return model
    if isinstance(model, LoadedModel):
        return capture(model.module, images, model_id=model_id or model.name)
    return capture(model, images, model_id=model_id)


def bound_source(
    model: nn.Module | LoadedModel | CapturedGraph,
    source: calib.Source | CalibrationSource | None,
) -> Any:
    """Return the source with the model's preprocessing where it has none of its own."""
    if source is None:
        source = calib.open_source("synthetic", samples=DEFAULT_SAMPLES)
    if not isinstance(source, calib.Source) or source.preprocessing is not None:
        return source
    if isinstance(model, LoadedModel):
        return source.with_preprocessing(model.preprocessing)
    if isinstance(model, CapturedGraph):
        return source  # carries no preprocessing; a source that needs one will say so
    return source.with_preprocessing(from_attributes(type(model).__name__, model, None))


def _describe(source: Any) -> str:
    describe = getattr(source, "describe", None)
    return str(describe()) if callable(describe) else type(source).__name__


@contextmanager
def _stage(name: str, stages: list[StageEntry]) -> Iterator[None]:
    started = time.perf_counter()
    with PeakMemory() as memory:
        yield
    stages.append(
        StageEntry(
            name=name,
            seconds=round(time.perf_counter() - started, 3),
            peak_memory_bytes=memory.peak_bytes,
        )
    )
