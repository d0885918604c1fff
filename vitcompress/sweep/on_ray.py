"""Cells on a Ray cluster: one actor for each job, with a copy of the shared files.

The machines need this library, not the sweep's directory: shared files travel through Ray's
object store. Ray starts an actor that was killed again, and gives it the same cell once more.
"""

import os
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitcompress.errors import ConfigError
from vitcompress.sweep.engines import Answer, Cell

__all__ = ["compute_on_ray", "library"]

#: How often a cell whose process was killed is tried again.
RETRIES = 3


def compute_on_ray(
    cells: Sequence[Cell], folder: Path, *, jobs: int | None, address: str | None
) -> Generator[Answer, None, None]:
    """Yield answers as they come; see :func:`vitcompress.sweep.engines.map_cells`."""
    ray = library()
    started = not ray.is_initialized()
    if started:
        _connect(ray, address, jobs)
    try:
        processors = int(ray.cluster_resources().get("CPU", 1))
        count = min(jobs or processors, processors, len(cells))
        # In a list, an actor that is started again fetches them by itself.
        files = [ray.put(_packed(folder))]
        actor_type = ray.remote(num_cpus=1, max_restarts=RETRIES, max_task_retries=RETRIES)(
            _Remote
        )
        pending = list(cells)
        running: dict[Any, tuple[Any, Cell]] = {}

        def give(actor: Any, group: tuple[str, int] | None) -> None:
            if pending:
                same = (i for i, cell in enumerate(pending) if cell.group == group)
                cell = pending.pop(next(same, 0))
                origin = cell.origin.model_dump(mode="json")
                running[actor.compute.remote(origin, cell.command)] = actor, cell

        for _ in range(count):
            give(actor_type.remote(files), None)
        while running:
            done, _ = ray.wait(list(running), num_returns=1)
            actor, cell = running.pop(done[0])
            try:
                found = ray.get(done[0])
                answer = Answer(
                    cell.key, found["result"], found["error"], int(found["peak_bytes"])
                )
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[0]
                answer = Answer(cell.key, error=f"lost by Ray: {reason}")
                ray.kill(actor)
                actor = actor_type.remote(files)
            give(actor, cell.group)
            yield answer
    finally:
        if started:
            ray.shutdown()


def library() -> Any:
    """Return the module of Ray.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "engine: Ray is not installed; pip install 'vitcompress[ray]'"
        ) from error
    return ray


class _Remote:
    """A bench on some machine of the cluster."""

    def __init__(self, files: list[Any]) -> None:
        from vitcompress.sweep.bench import Bench

        content: dict[str, NDArray[np.uint8]] = library().get(files[0])
        torch.set_num_threads(1)
        self._folder = tempfile.TemporaryDirectory(prefix="vitcompress-")
        for name, values in content.items():
            path = Path(self._folder.name) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            values.tofile(path)
        self._bench = Bench(Path(self._folder.name))

    def compute(self, origin: dict[str, Any], command: str | None) -> dict[str, Any]:
        """Return what became of a cell; see ``worker.answer``."""
        from vitcompress.sweep.worker import answer

        return answer(self._bench, origin, command)


def _connect(ray: Any, address: str | None, jobs: int | None) -> None:
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        settings |= {"num_cpus": jobs or os.cpu_count(), "include_dashboard": False}
    try:
        ray.init(address=address or "local", **settings)
    except Exception as error:  # a node that does not start raises the bare type
        raise ConfigError(
            f"address: Ray does not answer at {address or 'this machine'}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def _packed(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """Return the shared files by relative name, as arrays that Ray stores without a copy."""
    return {
        str(path.relative_to(folder)): np.fromfile(path, np.uint8)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".log"
    }
