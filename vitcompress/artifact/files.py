"""Files are written whole or not at all; an earlier one is kept until the new one is there."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vitcompress.errors import ConfigError

__all__ = [
    "check_file_writable",
    "check_writable",
    "write_directory",
    "write_file",
    "write_files",
]


def write_file(path: Path, write: Callable[[Path], None], *, overwrite: bool = True) -> None:
    """Let ``write`` fill a temporary file, then move it to ``path``.

    Raises:
        ConfigError: The file exists and may not be replaced, or cannot be written.
    """
    write_files([path], write, overwrite=overwrite)


def write_files(
    paths: Sequence[Path], write: Callable[..., None], *, overwrite: bool = True
) -> None:
    """Let ``write`` fill a temporary file for each path, then move all of them there.

    Args:
        paths: Destinations in one folder.
        write: Takes as many temporary paths.
        overwrite: Replace existing files.

    Raises:
        ConfigError: A file exists and may not be replaced, or cannot be written.
    """
    for path in paths:
        with _reported(path):
            if path.is_dir():
                raise ConfigError(f"{path}: is a directory; name a file in it")
            if path.exists() and not overwrite:
                raise ConfigError(
                    f"{path}: exists already; choose another name or pass --overwrite"
                )
    first = paths[0]
    with _reported(first):
        first.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=first.parent, prefix=f".{first.name}-") as folder:
            drafts = [Path(folder) / path.name for path in paths]
            write(*drafts)
            for draft, path in zip(drafts, paths, strict=True):
                draft.replace(path)


def write_directory(
    path: Path, write: Callable[[Path], None], *, overwrite: bool = False
) -> None:
    """Let ``write`` fill a temporary directory, then move it to ``path``.

    Args:
        path: Destination; its parents are made.
        write: Writes the files into the directory it is given.
        overwrite: Replace an earlier artefact. A directory that holds anything else is never
            replaced.

    Raises:
        ConfigError: The destination is taken, or cannot be written.
    """
    check_writable(path, overwrite=overwrite)
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            draft, old = Path(folder) / "new", Path(folder) / "old"
            draft.mkdir()
            write(draft)
            try:
                if path.exists():
                    path.rename(old)
                draft.rename(path)
            except BaseException:  # an interrupt as well: leaving deletes the folder
                if old.exists() and not path.exists():
                    old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)


def check_file_writable(path: Path) -> None:
    """Check a file that :func:`write_file` is to write, before any work is done.

    Raises:
        ConfigError: It is a directory, or not writable.
    """
    with _reported(path):
        if path.is_dir():
            raise ConfigError(f"{path}: is a directory; name a file in it")
        _check_ancestor(path, path.absolute().parent)


def check_writable(path: Path, *, overwrite: bool) -> None:
    """Check a destination before any work is done.

    Raises:
        ConfigError: It is a file, a directory that may not be replaced, or not writable.
    """
    with _reported(path):
        _check_destination(path, overwrite)


def _check_destination(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; name a directory")
    if path.is_dir() and any(path.iterdir()):
        if not (path / "manifest.json").is_file():
            raise ConfigError(
                f"{path}: holds files that are no artefact; choose another directory"
            )
        if not overwrite:
            raise ConfigError(
                f"{path}: holds an artefact already; pass --overwrite to replace it"
            )
    _check_ancestor(path, path.absolute())


def _check_ancestor(path: Path, ancestor: Path) -> None:
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise ConfigError(f"{path}: cannot be written: {ancestor} is not a writable directory")


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror or error}; nothing was changed"
        ) from error
