"""Figures of a benchmark: from the samples of all rounds to medians, spread and ratios."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vitcompress.errors import InputError

__all__ = [
    "BenchmarkEntry",
    "BenchmarkReport",
    "Role",
    "Samples",
    "figures",
    "interquartile_range",
    "speedup",
]

SCHEMA = 1

#: What a file is measured as: on its own account, or as a reference.
Role = Literal["candidate", "float32", "bfloat16", "dynamic_int8"]


@dataclass(frozen=True)
class Samples:
    """One value for each round, in the order of the rounds.

    Attributes:
        wall_ms: Elapsed milliseconds of one inference.
        cpu_ms: Processor milliseconds of one inference, over all threads.
    """

    wall_ms: tuple[float, ...]
    cpu_ms: tuple[float, ...]


def interquartile_range(values: Sequence[float]) -> float:
    """Return the distance between the quartiles, interpolated linearly; 0 for one value."""
    if len(values) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return upper - lower


def speedup(reference_ms: Sequence[float], own_ms: Sequence[float]) -> float:
    """Return how many times faster than a reference: the median of each round's ratio.

    Paired by round, so that a machine that is slower in some rounds moves both sides alike.
    """
    pairs = zip(reference_ms, own_ms, strict=True)
    return statistics.median(reference / own for reference, own in pairs)


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BenchmarkEntry(_Entry):
    """One file in one case of threads and batch.

    Attributes:
        name: What it is called in this report.
        file: The path that was asked for, or that a reference was made from.
        role: ``candidate``, or which of the references it is.
        execution: ``executed``: a runtime ran the file; nothing is simulated.
        runtime: Name, version and device.
        versions: Of the libraries in the process that measured.
        sha256: Of the ONNX file that ran, of external data as well.
        size_bytes: Of the same.
        threads: Threads within an operator.
        batch: Images in one inference.
        rounds: Values behind each median.
        median_wall_ms: Elapsed time of one inference.
        iqr_wall_ms: Distance between its quartiles.
        median_cpu_ms: Processor time of one inference, over all threads.
        images_per_second: From the median.
        speedup_over_float32: Paired by round; ``None`` without that reference.
        speedup_over_bfloat16: The same.
        speedup_over_dynamic_int8: The same.
        integer_ops: Integer products in the graph that the runtime optimised, by type.
        integer_products: Their number.
        float_products: Products there that compute with floats, fused attention as one.
        wall_ms: The value of each round.
        cpu_ms: The same.
    """

    name: str
    file: str
    role: Role
    execution: Literal["executed"] = "executed"
    runtime: str
    versions: dict[str, str]
    sha256: str
    size_bytes: int
    threads: int
    batch: int
    rounds: int
    median_wall_ms: float
    iqr_wall_ms: float
    median_cpu_ms: float
    images_per_second: float
    speedup_over_float32: float | None = None
    speedup_over_bfloat16: float | None = None
    speedup_over_dynamic_int8: float | None = None
    integer_ops: dict[str, int]
    integer_products: int
    float_products: int
    wall_ms: tuple[float, ...]
    cpu_ms: tuple[float, ...]


class BenchmarkReport(_Entry):
    """A benchmark of several files on one machine.

    Attributes:
        schema_version: Version of this layout.
        vitcompress: Version of this library.
        processor: As the machine names it.
        processors: How many this process may use.
        system: Operating system and architecture.
        seed: Draws the images and the order within each round.
        float32: Name of the float32 reference, if there is one.
        bfloat16: Name of the bfloat16 reference, if there is one: the file of the float32 one,
            run at that precision.
        no_bfloat16: Why there is none, if one was wanted.
        dynamic_int8: Name of the dynamic INT8 reference, if there is one.
        entries: Case by case, in the order in which the files were named; references last.
    """

    schema_version: int = SCHEMA
    vitcompress: str
    processor: str
    processors: int
    system: str
    seed: int
    float32: str | None
    bfloat16: str | None = None
    no_bfloat16: str = ""
    dynamic_int8: str | None
    entries: tuple[BenchmarkEntry, ...]

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "benchmark.json") -> "BenchmarkReport":
        """Return the report that :meth:`to_json` wrote.

        Raises:
            InputError: The text is not a report of this schema.
        """
        try:
            report = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            location = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{where}: {location}: {first['msg']}") from error
        if report.schema_version != SCHEMA:
            raise InputError(
                f"{where}: schema_version {report.schema_version}; this version reads {SCHEMA}"
            )
        return report

    def cases(self) -> list[tuple[int, int, list[BenchmarkEntry]]]:
        """Return threads, batch and entries of each case, in order."""
        found: dict[tuple[int, int], list[BenchmarkEntry]] = {}
        for entry in self.entries:
            found.setdefault((entry.threads, entry.batch), []).append(entry)
        return [(threads, batch, entries) for (threads, batch), entries in found.items()]


def figures(
    name: str, samples: Mapping[str, Samples], batch: int, references: Mapping[str, str | None]
) -> dict[str, Any]:
    """Return the measured fields of an entry.

    Args:
        name: Whose.
        samples: Of every file of the case, by name.
        batch: Images in one inference.
        references: Name of the reference, or ``None``, by the field's ending, e.g.
            ``float32``.
    """
    own = samples[name]
    median = statistics.median(own.wall_ms)
    return {
        "rounds": len(own.wall_ms),
        "median_wall_ms": median,
        "iqr_wall_ms": interquartile_range(own.wall_ms),
        "median_cpu_ms": statistics.median(own.cpu_ms),
        "images_per_second": 1e3 * batch / median,
        "wall_ms": own.wall_ms,
        "cpu_ms": own.cpu_ms,
        **{
            f"speedup_over_{kind}": None
            if other is None
            else speedup(samples[other].wall_ms, own.wall_ms)
            for kind, other in references.items()
        },
    }
