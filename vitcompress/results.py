"""Every result of a sweep, or the one in a file."""

import json
from pathlib import Path

from vitcompress.errors import InputError
from vitcompress.result import Result, read_result

__all__ = ["read_results"]

INDEX, CELLS = "sweep.json", "cells"


def read_results(path: Path) -> tuple[Result, ...]:
    """Return the results of a sweep's directory in its order, or the one of a file.

    Cells of earlier sweeps into the same directory, which its index does not name, stay out.

    Raises:
        InputError: There is none, or one is missing or damaged.
    """
    if not path.is_dir():
        return (read_result(path),)
    index = path / INDEX
    if not index.is_file():
        raise InputError(
            f"{path}: expected a sweep's directory with {INDEX}, or the file of one result"
        )
    try:
        keys = json.loads(index.read_text(encoding="utf-8"))["cells"]
        paths = [path / CELLS / f"{key}.json" for key in keys]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{index}: is no index of a sweep: {error!r}; sweep again") from error
    return tuple(read_result(cell) for cell in paths)
