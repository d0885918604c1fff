"""How fast are these files here, beside the float32 network, bfloat16 and dynamic INT8?

All files of a case (threads, batch) run in one process of their own, in turns, so that what
else the machine does meets all of them; see ``export/onnx/timing.py`` for a turn.
"""

import importlib.util
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from vitcompress import api
from vitcompress.artifact import is_artifact
from vitcompress.errors import ConfigError, InputError
from vitcompress.export.onnx import timing
from vitcompress.export.onnx.contents import OnnxContents, read_contents
from vitcompress.export.onnx.coverage import float_products, integer_ops
from vitcompress.export.onnx.float_model import export_float_onnx, quantize_dynamically
from vitcompress.export.onnx.stopwatch import Timing, time_files
from vitcompress.speed import BenchmarkEntry, BenchmarkReport, Role, figures

__all__ = ["DEFAULT_ROUNDS", "RUNTIMES", "available_processors", "benchmark", "processor_name"]

RUNTIMES = tuple(timing.RUNTIMES)
DEFAULT_ROUNDS = 20


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A file to measure: what it is called, what was asked for, and where it lies."""

    name: str
    file: str
    role: Role = "candidate"
    path: Path
    contents: OnnxContents


def benchmark(
    paths: Sequence[str | Path],
    *,
    runtime: str = "ort",
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    rounds: int = DEFAULT_ROUNDS,
    references: bool = True,
    seed: int = 0,
) -> BenchmarkReport:
    """Return how long files take on this machine, measured in turns.

    The files are forms of one network. The float32 reference is the first plain float32 file
    among them; without one it is the network of the first artefact, quantizers bypassed. The
    bfloat16 reference is the same file at that precision, in OpenVINO and where the processor
    has it; else the report says why not. The dynamic INT8 reference is what onnxruntime's own
    quantizer makes of the float32 reference.

    Args:
        paths: ``.onnx`` files of one float32 image input, and artefact directories, which are
            exported for ``ort-cpu`` into a temporary folder first.
        runtime: ``ort`` is onnxruntime on the CPU; ``openvino``, an extra, is OpenVINO on the
            CPU, held to float32.
        threads: Threads within an operator; each number is a case.
        batches: Images in one inference; each number is a case with each of ``threads``.
        rounds: Turns of each file in each case.
        references: Measure the float32 network, its bfloat16 run and its dynamic INT8 form as
            well, and give ratios to them.
        seed: Draws the images (normal noise) and the order within each round.

    Raises:
        ConfigError: A setting is out of bounds, or the files take images of different sizes.
        InputError: A file is missing or damaged.
        ArtifactError: An artefact is.
        UnsupportedModelError: A file has other inputs than one image of fixed size.
        ExportError: A file does not run, or a reference cannot be made.
    """
    _check_runtime(runtime)
    threads = _whole_numbers("threads", threads, most=available_processors())
    batches = _whole_numbers("batch", batches)
    _whole_numbers("repeats", (rounds,))
    _check_paths(paths)
    with tempfile.TemporaryDirectory(prefix="vitcompress-benchmark-") as folder:
        candidates = _candidates(paths, Path(folder), references)
        _check_alike(candidates, batches)
        half = [c.name for c in candidates if c.role == "bfloat16"]
        cases = [(count, batch) for count in threads for batch in batches]
        entries: list[BenchmarkEntry] = []
        left_out: dict[str, str] = {}
        for count, batch in tqdm(cases, desc="timing", disable=None, leave=False):
            timed = time_files(
                {c.name: c.path for c in candidates},
                (batch, *candidates[0].contents.image_shape),
                runtime=runtime,
                threads=count,
                rounds=rounds,
                seed=seed,
                bfloat16=half,
            )
            left_out |= timed.left_out
            candidates = [c for c in candidates if c.name not in left_out]
            half = [name for name in half if name not in left_out]
            entries += _entries(candidates, timed, count, batch)
    named = _references(candidates)
    return BenchmarkReport(
        vitcompress=_own_version(),
        processor=processor_name(),
        processors=available_processors(),
        system=f"{platform.system()} {platform.machine()}",
        seed=seed,
        float32=named["float32"],
        bfloat16=named["bfloat16"],
        no_bfloat16="; ".join(left_out.values()),
        dynamic_int8=named["dynamic_int8"],
        entries=tuple(entries),
    )


# Settings and files


def _check_runtime(runtime: str) -> None:
    """Check that a runtime is known and installed.

    Raises:
        ConfigError: It is not.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"runtime: expected one of {list(RUNTIMES)}, got '{runtime}'")
    if runtime == "openvino" and importlib.util.find_spec("openvino") is None:
        raise ConfigError(
            "runtime: openvino is not installed; pip install 'vitcompress[openvino]'"
        )


def _whole_numbers(
    name: str, values: Sequence[int], *, most: int | None = None
) -> tuple[int, ...]:
    """Return the values without repetition.

    Raises:
        ConfigError: There is none, or one is out of bounds.
    """
    if not values:
        raise ConfigError(f"{name}: expected at least one whole number, got none")
    for value in values:
        if value < 1:
            raise ConfigError(f"{name}: expected whole numbers of at least 1, got {value}")
        if most is not None and value > most:
            raise ConfigError(
                f"{name}: expected at most {most}, which is how many processors there are, "
                f"got {value}"
            )
    return tuple(dict.fromkeys(values))


def _check_paths(paths: Sequence[str | Path]) -> None:
    """Find mistakes before any export.

    Raises:
        ConfigError: No path, or one of them twice.
        InputError: A path is neither a file nor an artefact.
    """
    if not paths:
        raise ConfigError("paths: name at least one .onnx file or artefact directory")
    seen: set[Path] = set()
    for path in map(Path, paths):
        if path.resolve() in seen:
            raise ConfigError(f"{path}: is named twice")
        seen.add(path.resolve())
        if not path.exists():
            raise InputError(f"{path}: file is missing")
        if path.is_dir() and not is_artifact(path):
            raise InputError(f"{path}: is a directory but no artefact")


def _candidates(
    paths: Sequence[str | Path], folder: Path, references: bool
) -> list[_Candidate]:
    """Return the files to measure, references last; what has to be made goes to ``folder``."""
    found: list[_Candidate] = []
    # Files first: they are cheap to read, and a mistake in one is then told before any export.
    read = {str(p): read_contents(Path(p)) for p in paths if not is_artifact(Path(p))}
    plain = next((p for p, contents in read.items() if contents.is_float32), None)
    models: dict[str, api.CompressedModel] = {}
    for index, given in enumerate(map(str, paths)):
        if given in read:
            is_reference = references and given == plain
            role: Role = "float32" if is_reference else "candidate"
            found.append(
                _Candidate(
                    name=given, file=given, role=role, path=Path(given), contents=read[given]
                )
            )
        else:
            models[given] = api.load(given)
            path = folder / f"{index}.onnx"
            models[given].export_onnx(path, target="ort-cpu")
            found.append(_made(f"{given} (ort-cpu)", given, "candidate", path))
    if references and plain is None and models:
        origin, model = next(iter(models.items()))
        path = folder / "float32.onnx"
        export_float_onnx(model.graph, path)
        found.append(_made(f"float32 of {origin}", origin, "float32", path))
    reference = next((c for c in found if c.role == "float32"), None)
    if reference is not None:
        name = f"bfloat16 of {reference.file}"
        found.append(replace(reference, name=name, role="bfloat16"))
        path = folder / "dynamic_int8.onnx"
        quantize_dynamically(reference.path, path)
        found.append(
            _made(f"dynamic INT8 of {reference.file}", reference.file, "dynamic_int8", path)
        )
    return found


def _made(name: str, origin: str, role: Role, path: Path) -> _Candidate:
    return _Candidate(
        name=name, file=origin, role=role, path=path, contents=read_contents(path)
    )


def _check_alike(candidates: Sequence[_Candidate], batches: Sequence[int]) -> None:
    """Check that one batch of images suits all files.

    Raises:
        ConfigError: It does not.
    """
    first = candidates[0]
    for one in candidates:
        if one.contents.image_shape != first.contents.image_shape:
            shapes = ["x".join(map(str, c.contents.image_shape)) for c in (first, one)]
            raise ConfigError(
                f"{one.name}: takes images of {shapes[1]}, {first.name} of {shapes[0]}; "
                "a benchmark compares forms of one network"
            )
        fixed = one.contents.batch
        refused = [batch for batch in batches if fixed not in (None, batch)]
        if refused:
            raise ConfigError(
                f"{one.name}: takes batches of {fixed} only; batch {refused[0]} was asked for"
            )


# The report


def _references(candidates: Sequence[_Candidate]) -> dict[str, str | None]:
    """Return the name of each reference, or ``None``, by its role."""
    return {
        role: next((c.name for c in candidates if c.role == role), None)
        for role in get_args(Role)
        if role != "candidate"
    }


def _entries(
    candidates: Sequence[_Candidate], timed: Timing, threads: int, batch: int
) -> list[BenchmarkEntry]:
    samples, references = timed.samples(), _references(candidates)
    entries = []
    for one in candidates:
        ops = timed.ops[one.name]
        integer = integer_ops(ops)
        entries.append(
            BenchmarkEntry(
                name=one.name,
                file=one.file,
                role=one.role,
                runtime=timed.runtime,
                versions=timed.versions,
                sha256=one.contents.sha256,
                size_bytes=one.contents.size_bytes,
                threads=threads,
                batch=batch,
                integer_ops=integer,
                integer_products=sum(integer.values()),
                float_products=float_products(ops),
                **figures(one.name, samples, batch, references),
            )
        )
    return entries


def available_processors() -> int:
    """Return how many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return (os.cpu_count() or 1) if affinity is None else len(affinity(0))


def _own_version() -> str:
    try:
        return metadata.version("vitcompress")
    except metadata.PackageNotFoundError:
        return "not installed"


def processor_name() -> str:
    """Return the name of the processor, as far as the system tells."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
