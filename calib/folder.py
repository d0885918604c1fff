"""Image files on disk: a plain folder, or one sub-folder per class."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from calib.decoding import IMAGE_SUFFIXES, EncodedImages, check_file_size
from calib.errors import SourceError, UnreadableError


class ImageFiles(EncodedImages):
    """Image files named by their path below a folder.

    Args:
        root: The folder.
        location: What error messages call the source.
        ids: Posix paths below ``root``.
        labels: Class of each, or None.
    """

    kind = "folder"
    noun = "plain folder"

    def __init__(
        self,
        root: Path,
        location: str,
        ids: Sequence[str],
        labels: Sequence[int] | None = None,
    ) -> None:
        self._root = root
        self.location = location
        self.ids = ids
        self.labels = labels

    def read(self, number: int) -> bytes:
        path = self._root / self.ids[number]
        try:
            if not path.exists():
                raise UnreadableError("file not found")
            # Opening a pipe or a device would wait, or never end.
            if not path.is_file():
                raise UnreadableError("not a regular file")
            check_file_size(path.stat().st_size)
            return path.read_bytes()
        except OSError as error:
            raise UnreadableError(f"cannot be read: {error.strerror}") from error


class ClassFolders(ImageFiles):
    """Image files of which the first folder of the path is the class."""

    kind = "class-folder"
    noun = "class-folder tree"


def image_folder(root: Path, location: str) -> ImageFiles | None:
    """Return the images below a folder, or None where there are none.

    Images directly in the folder make it a plain one, images in sub-folders a class-folder
    tree: the label is the index of the sub-folder in sorted order, empty sub-folders included.
    Hidden files and files without an image suffix are not looked at.

    Args:
        root: An existing folder.
        location: What error messages call it.

    Raises:
        SourceError: Images lie both in the folder and in its sub-folders.
    """
    ids = sorted(image_paths(root))
    if not ids:
        return None
    nested = [name for name in ids if "/" in name]
    if not nested:
        return ImageFiles(root, location, ids)
    if len(nested) < len(ids):
        raise SourceError(
            f"{location}: expected images either directly in the folder or in one sub-folder "
            f"per class, found {len(ids) - len(nested)} directly and {len(nested)} in "
            "sub-folders; move one of the two elsewhere"
        )
    index = {name: label for label, name in enumerate(sorted(_sub_folders(root)))}
    return ClassFolders(root, location, ids, [index[name.split("/")[0]] for name in ids])


def image_paths(root: Path) -> Iterator[str]:
    """Yield the posix paths, relative to ``root``, of files with an image suffix, unsorted.

    Links to folders are followed unless they lead back to a folder they lie in.
    """
    top = root.resolve()
    pending = [(top, "", frozenset({top}))]
    while pending:
        folder, prefix, above = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not entry.is_dir():
                    if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                        yield prefix + entry.name
                    continue
                inner = Path(entry.path).resolve() if entry.is_symlink() else Path(entry.path)
                if inner not in above:
                    pending.append((inner, f"{prefix}{entry.name}/", above | {inner}))


def files_found(root: Path) -> str:
    """Return a count by suffix of the files directly in a folder, for error messages."""
    entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    files = Counter(entry.suffix.lower() or "none" for entry in entries if not entry.is_dir())
    folders = sum(1 for entry in entries if entry.is_dir())
    listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(files.items()))
    return (
        f"{sum(files.values())} files ({listed or 'no suffix to show'}), {folders} sub-folders"
    )


def _sub_folders(root: Path) -> list[str]:
    entries = (entry for entry in root.iterdir() if not entry.name.startswith("."))
    return [entry.name for entry in entries if entry.is_dir()]
