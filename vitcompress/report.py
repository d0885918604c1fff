"""The report: what was done, what was left, how good, how large, and under which protocol."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vitcompress.engine import PassRecord
from vitcompress.errors import ArtifactError
from vitcompress.export.onnx import ExportResult
from vitcompress.graph import CapturedGraph, enumerate_sites
from vitcompress.graph.edit import is_quantizer
from vitcompress.measure import SiteMeasurement
from vitcompress.numerics.packing import packed_size
from vitcompress.quantizers import Quantizer

__all__ = [
    "CompressionReport",
    "EvaluationEntry",
    "ExportEntry",
    "PassEntry",
    "ProtocolEntry",
    "SiteEntry",
    "SizeEntry",
    "StageEntry",
    "site_entries",
    "size_of",
]

SCHEMA = 1


class _Entry(BaseModel):
    # A site without noise has an infinite ratio; JSON's own way would turn it into null.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ProtocolEntry(_Entry):
    """Under which conditions the figures hold.

    ``model_digest`` is that of ``models.identity``, ``resolved_recipe`` YAML with every
    default written out, ``command`` the command line, if one was used. Reports of earlier
    versions lack the three.
    """

    source: str
    sample_ids: tuple[str, ...]
    source_digest: str
    preprocessing: dict[str, Any] | None
    seed: int
    versions: dict[str, str]
    model_digest: str | None = None
    resolved_recipe: str | None = None
    command: str | None = None


class PassEntry(_Entry):
    """One pass: what it changed of what it found, what it left and why."""

    name: str
    changed: int
    found: int
    skipped: dict[str, str]
    warnings: tuple[str, ...]
    details: dict[str, Any]
    function_change: float | None
    seconds: float
    peak_memory_bytes: int


class StageEntry(_Entry):
    """Wall time and peak memory of one stage."""

    name: str
    seconds: float
    peak_memory_bytes: int


class SiteEntry(_Entry):
    """One site: its quantizer (``None`` means float) and its noise in dB."""

    site: str
    role: str
    operation: str
    spec: str | None
    bits: int | None
    sqnr_db: float | None
    low: float | None = None
    high: float | None = None
    rms: float | None = None
    peak_ratio: float | None = None
    peak_channel: int | None = None
    runner_up_ratio: float | None = None


class SizeEntry(_Entry):
    """Storage: bytes of all tensors before and after, and mean bits of a weight.

    ``bits_per_weight`` is over every stored number, float leftovers and quantizer parameters
    included; ``quantized_weight_bits`` over quantized weights alone.
    """

    float_bytes: int
    stored_bytes: int
    ratio: float
    bits_per_weight: float
    quantized_weight_bits: float
    quantized_weights: int
    float_weights: int
    largest_float_tensors: dict[str, int]


class EvaluationEntry(_Entry):
    """Agreement and accuracy on one set of images.

    ``execution`` says who computed: ``simulated`` is this library's fake quantization,
    ``executed`` a runtime with integer kernels, ``float`` an uncompressed model.
    """

    data: str
    images: int
    labelled: bool
    execution: Literal["float", "simulated", "executed"]
    top1_percent: float | None = None
    top5_percent: float | None = None
    reference_top1_percent: float | None = None
    top1_drop_pp: float | None = None
    agreement_percent: float | None = None
    mean_kl: float | None = None
    logits_sqnr_db: float | None = None
    seconds: float
    skipped: dict[str, str] = {}


class ExportEntry(_Entry):
    """One exported file and what a runtime made of it.

    ``execution`` is ``executed`` where the target's own runtime ran every linear as integers;
    ``not_executed`` says why that runtime did not run it, in which case ``runtime`` is the
    one that was asked instead. Of the bytes, ``packed_bytes`` are codes of weights,
    ``parameter_bytes`` their scales and the like, ``leftover_bytes`` floats and biases.
    """

    target: str
    opset: int
    size_bytes: int
    packed_bytes: int = 0
    parameter_bytes: int = 0
    leftover_bytes: int = 0
    largest_leftovers: dict[str, int] = {}
    leftovers: Literal["float32", "float16", "int8"] = "float32"
    leftover_cosine: float = 1.0
    execution: Literal["simulated", "executed"]
    not_executed: str = ""
    runtime: str
    integer_linears: int
    linears: int
    float_linears: dict[str, str]
    integer_ops: dict[str, int]
    code_mismatch: float
    in_step_cosine: float
    images: int
    cosine: float
    top1_agreement_percent: float
    max_difference: float
    fused_attention: int = 0
    unfused_attention: dict[str, str] = {}
    rewrites: dict[str, int] = {}
    batch: int | None = None

    @classmethod
    def of(cls, result: ExportResult) -> "ExportEntry":
        """Return the entry of an export."""
        found = result.verification
        complete = found.linears > 0 and found.integer_linears == found.linears
        return cls(
            target=result.target,
            opset=result.opset,
            size_bytes=result.size_bytes,
            packed_bytes=result.size.packed_bytes,
            parameter_bytes=result.size.parameter_bytes,
            leftover_bytes=result.size.leftover_bytes,
            largest_leftovers=dict(result.size.largest_leftovers),
            leftovers=result.leftovers,
            leftover_cosine=result.leftover_cosine,
            execution="executed" if complete and not result.not_executed else "simulated",
            not_executed=result.not_executed,
            fused_attention=result.fused_attention,
            unfused_attention=dict(result.unfused_attention),
            rewrites=dict(result.rewrites),
            batch=result.batch,
            **{name: getattr(found, name) for name in found.__dataclass_fields__},
        )


class CompressionReport(_Entry):
    """Everything a reader needs to believe, or to repeat, a compression.

    Attributes:
        schema_version: Version of this layout.
        model: What was compressed.
        recipe: Name and scheme, e.g. ``repq_vit-w4a4``.
        scheme: E.g. ``W4A4``.
        execution: ``simulated``: the figures under ``evaluations`` come from fake quantization
            unless an entry says otherwise.
        protocol: Data, preprocessing, seeds and versions.
        passes: In order.
        stages: Wall time and memory of everything else.
        sites: Every site, quantized or not.
        size: Storage.
        evaluations: On calibration images, and on evaluation images if there were any.
        exports: Verified files.
    """

    schema_version: int = SCHEMA
    model: str
    recipe: str
    scheme: str
    execution: Literal["simulated"] = "simulated"
    protocol: ProtocolEntry
    passes: tuple[PassEntry, ...]
    stages: tuple[StageEntry, ...]
    sites: tuple[SiteEntry, ...]
    size: SizeEntry
    evaluations: tuple[EvaluationEntry, ...] = ()
    exports: tuple[ExportEntry, ...] = ()

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "report.json") -> "CompressionReport":
        """Return the report that :meth:`to_json` wrote.

        Raises:
            ArtifactError: The text is not a report of this schema.
        """
        try:
            report = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            location = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(f"{where}: {location}: {first['msg']}") from error
        if report.schema_version != SCHEMA:
            raise ArtifactError(
                f"{where}: schema_version {report.schema_version}; this version reads {SCHEMA}"
            )
        return report

    def worst_sites(self, count: int = 5) -> list[SiteEntry]:
        """Return the quantized activation sites of least signal-to-noise ratio."""
        measured = [s for s in self.sites if s.sqnr_db is not None and s.rms is not None]
        return sorted(measured, key=lambda s: s.sqnr_db or 0.0)[:count]


def pass_entry(record: PassRecord) -> PassEntry:
    """Return the entry of a pass that ran."""
    return PassEntry(
        name=record.name,
        changed=record.report.changed,
        found=record.report.found,
        skipped=record.report.skipped,
        warnings=record.report.warnings,
        details=record.report.details,
        function_change=record.function_change,
        seconds=round(record.seconds, 3),
        peak_memory_bytes=record.peak_memory_bytes,
    )


def site_entries(
    graph: CapturedGraph,
    measurements: dict[str, SiteMeasurement],
    weight_sqnr_db: dict[str, float],
) -> tuple[SiteEntry, ...]:
    """Return one entry for each site of a graph, in graph order."""
    entries = []
    for site in enumerate_sites(graph).values():
        quantizer = (
            None if site.quantizer is None else graph.module.get_submodule(site.quantizer)
        )
        assert quantizer is None or isinstance(quantizer, Quantizer)
        figures: dict[str, Any] = {"sqnr_db": None}
        if site.stored and quantizer is not None:
            figures = {"sqnr_db": weight_sqnr_db.get(quantizer.site)}
        elif site.name in measurements:
            found = measurements[site.name]
            figures = {name: getattr(found, name) for name in found.__dataclass_fields__}
        entries.append(
            SiteEntry(
                site=site.name,
                role=str(site.role),
                operation=site.operation,
                spec=None if quantizer is None else quantizer.spec.describe(),
                bits=None if quantizer is None else quantizer.spec.bits,
                **figures,
            )
        )
    return tuple(entries)


def size_of(graph: CapturedGraph, float_bytes: int) -> SizeEntry:
    """Return the storage of a finished graph.

    Args:
        graph: Compressed graph, weights frozen.
        float_bytes: Bytes of all tensors of the float model.
    """
    frozen: dict[str, Quantizer] = {}
    parameters = 0
    for node in graph.nodes_of_kind("call_module"):
        quantizer = graph.module.get_submodule(str(node.target))
        if is_quantizer(node) and isinstance(quantizer, Quantizer):
            values = [getattr(quantizer, name) for name in quantizer.parameter_names]
            parameters += sum(4 * value.numel() for value in values if value is not None)
            if quantizer.frozen:
                frozen[str(node.all_input_nodes[0].target)] = quantizer
    stored, weights, code_bits = parameters, 0, 0
    leftovers: dict[str, int] = {}
    for name, value in graph.tensors().items():
        if name in frozen:
            bits = frozen[name].spec.bits
            stored += packed_size(value.numel(), bits)
            weights += value.numel()
            code_bits += bits * value.numel()
        else:
            leftovers[name] = value.numel() * value.element_size()
            stored += leftovers[name]
    floats = sum(leftovers.values()) // 4
    largest = sorted(leftovers.items(), key=lambda item: -item[1])[:5]
    return SizeEntry(
        float_bytes=float_bytes,
        stored_bytes=stored,
        ratio=round(stored / float_bytes, 4),
        bits_per_weight=round(8 * stored / max(weights + floats, 1), 3),
        quantized_weight_bits=round(code_bits / max(weights, 1), 3),
        quantized_weights=weights,
        float_weights=floats,
        largest_float_tensors=dict(largest),
    )
