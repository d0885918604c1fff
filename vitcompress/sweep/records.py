"""What a sweep's directory holds, and how it is read.

``sweep.json``: the grid that was asked for; ``cells/KEY.json``: a result each;
``failed/KEY.json``: why a cell has none; ``reference/``: logits of the float model.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitcompress.artifact import write_file
from vitcompress.errors import ConfigError, InputError
from vitcompress.result import ImageSet, Origin, Outcomes, Result, read_result

__all__ = ["FailedCell", "GridCell", "Sweep", "SweepFolder", "SweepIndex", "read_sweep"]

SCHEMA = 1
_LOCK = ".sweep-lock"
_Kind = TypeVar("_Kind", bound=BaseModel)


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class GridCell(_Entry):
    """One cell of the grid; its result is ``cells/<key>.json``."""

    key: str = Field(pattern="^[0-9a-f]{64}$")
    recipe: str
    scheme: str
    seed: int


class SweepIndex(_Entry):
    """The grid that the latest sweep in a directory was asked for.

    Attributes:
        schema_version: Version of this layout.
        model: What the model is called.
        model_digest: As in ``Origin``; one directory belongs to one model.
        schemes: As asked for.
        recipes: Names, as asked for.
        seeds: As asked for.
        cells: In order: recipes change slowest, then seeds, then schemes.
        evaluation: Images of every cell.
        reference: The float model on them, compared with itself.
        float_bytes: Bytes of all its tensors.
        command: Command line, if one was used.
    """

    schema_version: int = SCHEMA
    model: str
    model_digest: str
    schemes: tuple[str, ...]
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: tuple[GridCell, ...]
    evaluation: ImageSet
    reference: Outcomes
    float_bytes: int
    command: str | None = None


class FailedCell(_Entry):
    """A cell that could not be computed; the next run tries again.

    Attributes:
        origin: What was tried.
        error: What went wrong, a traceback if it was no fault of the user's.
    """

    origin: Origin
    error: str


@dataclass(frozen=True)
class Sweep:
    """A sweep as it stands.

    Attributes:
        folder: Its directory.
        index: The grid.
        results: By key, in the grid's order; cells that are missing are left out.
        failures: By key: the error of each cell that failed.
        computed: Keys of the cells that this run computed.
    """

    folder: Path
    index: SweepIndex
    results: dict[str, Result]
    failures: dict[str, str]
    computed: tuple[str, ...] = ()


def read_sweep(folder: str | Path) -> Sweep:
    """Return the sweep that a directory holds, complete or not.

    Raises:
        InputError: It holds none, or a file of it is damaged.
    """
    stored = SweepFolder(Path(folder))
    index = stored.index()
    if index is None:
        raise InputError(f"{folder}: holds no sweep.json; expected the directory of a sweep")
    results, failures = {}, {}
    for cell in index.cells:
        if stored.cell(cell.key).is_file():
            results[cell.key] = read_result(stored.cell(cell.key))
        elif stored.failed(cell.key).is_file():
            failures[cell.key] = _read(stored.failed(cell.key), FailedCell).error
    return Sweep(stored.path, index, results, failures)


class SweepFolder:
    """Paths in a sweep's directory, and the right to write there.

    Attributes:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def cell(self, key: str) -> Path:
        """Return the file of a result."""
        return self.path / "cells" / f"{key}.json"

    def failed(self, key: str) -> Path:
        """Return the file of a failure."""
        return self.path / "failed" / f"{key}.json"

    @property
    def work(self) -> Path:
        """Files that the workers of one run share; gone when it ends."""
        return self.path / ".sweep-work"

    @property
    def reference(self) -> Path:
        """Logits of the float model."""
        return self.path / "reference"

    def index(self) -> SweepIndex | None:
        """Return the index, or ``None`` where there is none.

        Raises:
            InputError: It is damaged or of another schema.
        """
        path = self.path / "sweep.json"
        if not path.is_file():
            return None
        index = _read(path, SweepIndex)
        if index.schema_version != SCHEMA:
            raise InputError(
                f"{path}: schema_version {index.schema_version}; this version reads {SCHEMA}"
            )
        return index

    def write(self, path: Path, entry: BaseModel) -> None:
        """Write a file of the directory, whole or not at all."""
        text = entry.model_dump_json(indent=1) + "\n"
        write_file(path, lambda draft: _write_text(draft, text))

    @contextmanager
    def held(self, model: str, digest: str) -> Iterator[SweepIndex | None]:
        """Keep other sweeps out of the directory; make it if need be; yield its index.

        Args:
            model: What the model is called.
            digest: Of the model that is to be swept.

        Raises:
            ConfigError: It is held by another run, belongs to another model, holds other
                files, or cannot be written.
        """
        index = self._checked(model, digest)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / _LOCK).open("w")
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"{self.path}: another sweep is writing here; wait for it, or choose "
                    "another directory"
                ) from error
            self._clear()
            try:
                yield index
            finally:
                self._clear()
                if [entry.name for entry in self.path.iterdir()] == [_LOCK]:
                    (self.path / _LOCK).unlink()
                    self.path.rmdir()

    def _checked(self, model: str, digest: str) -> SweepIndex | None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path}: is a file; name a directory")
        try:
            index = self.index()
        except InputError as error:
            raise ConfigError(f"{error}; choose another directory") from error
        if index is not None and index.model_digest != digest:
            raise ConfigError(
                f"{self.path}: holds a sweep of another model: {index.model} "
                f"({index.model_digest[:12]}), this is {model} ({digest[:12]}); choose "
                "another directory"
            )
        if index is None and self.path.is_dir():
            others = [p.name for p in self.path.iterdir() if not p.name.startswith(".sweep")]
            if others:
                raise ConfigError(
                    f"{self.path}: holds files that are no sweep ({sorted(others)[0]}); "
                    "choose another directory"
                )
        return index

    def _clear(self) -> None:
        """Remove what a killed run left: shared files, and drafts of files."""
        shutil.rmtree(self.work, ignore_errors=True)
        for folder, start in (
            (self.path, ".sweep.json-"),
            (self.path / "cells", "."),
            (self.path / "failed", "."),
            (self.reference, "."),
        ):
            for draft in folder.glob(f"{start}*"):
                shutil.rmtree(draft, ignore_errors=True)


def _read(path: Path, kind: type[_Kind]) -> _Kind:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        where = f"{path}: {location}" if location else str(path)
        raise InputError(f"{where}: {first['msg']}; it was not written by a sweep") from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
