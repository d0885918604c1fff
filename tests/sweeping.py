"""Sweeps for tests: a quick recipe, small sources, and cells computed in this process."""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import images

import calib
from vitcompress.result import Result
from vitcompress.sweep import Sweep
from vitcompress.sweep.bench import Bench
from vitcompress.sweep.engines import Answer, Cell
from vitcompress.sweep.worker import answer

QUICK = """
schema: 1
name: quick
scheme: W8A8
passes:
  - pass: attach
    rules:
      - {roles: [weight], bits: w, granularity: per_channel}
      - {roles: [proj_input, act_output, head_input, norm_output], bits: a}
  - {pass: calibrate, method: minmax}
  - pass: freeze
"""
#: A recipe that fails on every model, once it runs.
BROKEN = QUICK.replace("name: quick", "name: broken").replace(
    "rules:", "rules:\n      - {sites: ['nowhere:*'], bits: 8}"
)


def calibration(seed: int) -> calib.Source:
    return calib.TensorSource(images(32, seed=7), samples=8, seed=seed, batch_size=4)


def evaluation(count: int = 24, labels: bool = True) -> calib.Source:
    known = torch.arange(count) % 10 if labels else None
    return calib.TensorSource(images(count, seed=5), known, batch_size=10)


class InProcess:
    """Stands in for ``map_cells``: no processes, and a list of what was computed.

    Args:
        stop_after: Cells before an interrupt.
    """

    def __init__(self, stop_after: int | None = None) -> None:
        self.computed: list[str] = []
        self.stop_after = stop_after

    def __call__(
        self, engine: str, cells: Sequence[Cell], folder: Path, **settings: Any
    ) -> Generator[Answer, None, None]:
        bench = Bench(folder)
        for cell in cells:
            if len(self.computed) == self.stop_after:
                raise KeyboardInterrupt
            self.computed.append(cell.key)
            found = answer(bench, cell.origin.model_dump(mode="json"), cell.command)
            yield Answer(cell.key, found["result"], found["error"], found["peak_bytes"])


def essence(result: Result) -> dict[str, Any]:
    """Return what of a result does not depend on the clock or the memory."""
    content = result.model_dump(mode="json")
    del content["seconds"], content["command"]
    report = content["report"]
    del report["stages"], report["protocol"]["command"]
    for entry in (*report["passes"], *report["evaluations"]):
        del entry["seconds"]
        entry.pop("peak_memory_bytes", None)
    return content


def essences(sweep: Sweep) -> dict[str, dict[str, Any]]:
    return {key: essence(result) for key, result in sweep.results.items()}
