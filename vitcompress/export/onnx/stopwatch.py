"""Start the measuring program for a case, and read what it found."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitcompress.errors import ExportError
from vitcompress.export.onnx import timing
from vitcompress.speed import Samples

__all__ = ["Timing", "time_files"]


@dataclass(frozen=True)
class Timing:
    """What the measuring process reports of one case.

    Attributes:
        runtime: Name, version and device.
        versions: Of the libraries in it.
        ops: Operators in the optimised graph of each file, by type; those of OpenVINO by type
            and precision of the kernel.
        rounds: Of each round the turns in order: name, wall and CPU milliseconds.
        left_out: Files that were not run at the precision asked for, with the reason.
    """

    runtime: str
    versions: dict[str, str]
    ops: dict[str, dict[str, int]]
    rounds: list[list[tuple[str, float, float]]]
    left_out: dict[str, str] = field(default_factory=dict)

    def samples(self) -> dict[str, Samples]:
        """Return the values of each file in the order of the rounds."""
        turns = [{name: (wall, cpu) for name, wall, cpu in turn} for turn in self.rounds]
        return {
            name: Samples(
                wall_ms=tuple(turn[name][0] for turn in turns),
                cpu_ms=tuple(turn[name][1] for turn in turns),
            )
            for name in self.ops
        }


def time_files(
    files: Mapping[str, Path],
    shape: Sequence[int],
    *,
    runtime: str = "ort",
    threads: int,
    rounds: int,
    seed: int,
    bfloat16: Collection[str] = (),
) -> Timing:
    """Return the times of files that take turns in one process of their own.

    Args:
        files: ONNX files by name.
        shape: ``[B, C, H, W]`` of the images.
        runtime: ``ort`` or ``openvino``.
        threads: Threads within an operator.
        rounds: Turns of each file.
        seed: Draws images and order.
        bfloat16: Names of files to run at that precision; left out where the runtime has none,
            or the processor.

    Raises:
        ExportError: A file does not run.
    """
    job = {
        "runtime": runtime,
        "files": {name: str(path) for name, path in files.items()},
        "bfloat16": list(bfloat16),
        "shape": list(shape),
        "threads": threads,
        "rounds": rounds,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory(prefix="vitcompress-timing-") as folder:
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        # As a file: as a module it would import this whole package, and torch, first.
        done = subprocess.run(
            [sys.executable, "-P", str(timing.__file__), str(job_file)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ExportError(f"{', '.join(files)}: {runtime} ended early: {lines[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "failed" in found:
        raise ExportError(f"{found['failed']}: {runtime} cannot run it: {found['reason']}")
    rounds_found = [[(str(n), w, c) for n, w, c in turns] for turns in found["rounds"]]
    return Timing(
        found["runtime"], found["versions"], found["ops"], rounds_found, found["left_out"]
    )
