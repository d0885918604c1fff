"""Who runs the cells: the seam between a sweep and the machines it runs on."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitcompress.errors import ConfigError
from vitcompress.result import Origin

__all__ = ["ENGINES", "Answer", "Cell", "map_cells"]

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Cell:
    """A cell that has to be computed.

    Attributes:
        key: Under which its result is stored.
        origin: What to compute.
        command: Command line, for the record.
    """

    key: str
    origin: Origin
    command: str | None

    @property
    def group(self) -> tuple[str, int]:
        """Recipe and seed: cells of one group share statistics."""
        return self.origin.recipe, self.origin.seed


@dataclass(frozen=True)
class Answer:
    """What became of a cell.

    Attributes:
        key: Of the cell.
        result: JSON text of its result, or ``None`` if it failed.
        error: Why it failed.
        peak_bytes: Largest resident size of the process that computed it; 0 if unknown.
    """

    key: str
    result: str | None = None
    error: str = ""
    peak_bytes: int = 0


def map_cells(
    engine: str,
    cells: Sequence[Cell],
    folder: Path,
    *,
    jobs: int | None,
    address: str | None = None,
    needed_bytes: int = 0,
    say: Callable[[str], None],
) -> Generator[Answer, None, None]:
    """Compute cells side by side and yield the answers as they come; close it to stop early.

    Args:
        engine: ``local`` or ``ray``.
        cells: What to compute.
        folder: Shared files.
        jobs: Most cells at a time; as many as there are processors by default.
        address: Of a running cluster, for ``ray``.
        needed_bytes: Memory that one cell is known to take.
        say: Takes a line for the user.

    Raises:
        ConfigError: The engine is unknown, or its library is missing.
    """
    if engine == "local":
        from vitcompress.sweep.local import compute_locally

        return compute_locally(cells, folder, jobs=jobs, needed_bytes=needed_bytes, say=say)
    if engine == "ray":
        from vitcompress.sweep.on_ray import compute_on_ray

        return compute_on_ray(cells, folder, jobs=jobs, address=address)
    raise ConfigError(f"engine: expected one of {list(ENGINES)}, got '{engine}'")
