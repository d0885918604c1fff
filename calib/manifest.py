"""A CSV file that lists images and, if it has the column, their labels."""

import csv
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TextIO

from calib.errors import SourceError
from calib.folder import ImageFiles

PATH_COLUMN = "path"
LABEL_COLUMN = "label"


class ManifestImages(ImageFiles):
    """Image files named in a manifest."""

    kind = "manifest"
    noun = "manifest"


def open_manifest(path: Path, location: str) -> ManifestImages:
    """Return the images a manifest lists; whether the files exist is found out on reading.

    Args:
        path: A UTF-8 CSV file with the header ``path`` or ``path,label``. Paths are relative
            to its folder; further columns are left alone.
        location: What error messages call it.

    Raises:
        SourceError: The manifest is empty or malformed; the message names the line.
    """
    rows: dict[str, int | None] = {}
    try:
        # utf-8-sig: spreadsheets write a byte order mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, name, label in _rows(file, location):
                if name in rows:
                    raise SourceError(
                        f"{location}: line {line}: expected every path once, "
                        f"found {name!r} again"
                    )
                rows[name] = label
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{location}: expected a UTF-8 CSV file: {error}") from error
    if not rows:
        raise SourceError(
            f"{location}: expected at least one row below the header, found none"
        )
    ids = sorted(rows)
    labels = [label for label in (rows[name] for name in ids) if label is not None]
    return ManifestImages(path.parent, location, ids, labels or None)


def _rows(file: TextIO, location: str) -> Iterator[tuple[int, str, int | None]]:
    """Yield line number, path and label of every row."""
    reader = csv.reader(file, strict=True)
    header = [column.strip() for column in next(reader, [])]
    if not header:
        raise SourceError(f"{location}: expected the header 'path,label', found an empty file")
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise SourceError(
            f"{location}: expected every column once in the header, "
            f"found {', '.join(repeated)} more than once"
        )
    if PATH_COLUMN not in header:
        raise SourceError(
            f"{location}: expected the header 'path,label' (label may be left out), "
            f"found {','.join(header)!r}"
        )
    for row in reader:
        if not row:
            continue
        where = f"{location}: line {reader.line_num}"
        if len(row) != len(header):
            raise SourceError(f"{where}: expected {len(header)} fields, found {len(row)}")
        fields = dict(zip(header, row, strict=True))
        label = None
        if LABEL_COLUMN in fields:
            label = parse_label(fields[LABEL_COLUMN], where)
        yield reader.line_num, _path(fields[PATH_COLUMN], where), label


def parse_label(text: str, where: str) -> int:
    """Return a label read from text.

    Args:
        text: A whole number, 0 or above, in ASCII digits.
        where: Start of the error message.

    Raises:
        SourceError: It is anything else.
    """
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 9:
        raise SourceError(f"{where}: label must be a whole number, 0 or above, found {text!r}")
    return int(digits)


def _path(text: str, where: str) -> str:
    path = PurePosixPath(text.strip())
    if not path.name or path.is_absolute() or "\0" in text:
        raise SourceError(
            f"{where}: path must be relative to the manifest's folder, found {text!r}"
        )
    return path.as_posix()
