"""WebDataset shards: tar files in which samples are members that share a key.

A pass over the headers of each shard notes where the images lie; later only the chosen ones
are read, in place. Nothing is ever extracted to disk.
"""

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calib.decoding import EncodedImages, check_file_size
from calib.errors import SourceError, UnreadableError
from calib.manifest import parse_label
from calib.source import Skipped

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})
LABEL_EXTENSION = "cls"
MAX_LABEL_BYTES = 64


@dataclass(frozen=True)
class Member:
    """Where the bytes of one image lie.

    Attributes:
        shard: The tar file.
        offset: First byte of the image in it.
        size_bytes: Length of the image.
    """

    shard: Path
    offset: int
    size_bytes: int


class TarImages(EncodedImages):
    """Images inside uncompressed tar files, named ``shard.tar!key``.

    Args:
        location: What error messages call the source.
        shards: The tar files.

    Raises:
        SourceError: A shard is damaged or a label malformed, only some samples have a label,
            or there is no image at all.
    """

    kind = "tar"
    noun = "tar shards"

    def __init__(self, location: str, shards: Sequence[Path]) -> None:
        self.location = location
        members: dict[str, Member] = {}
        labels: dict[str, int] = {}
        unusable: list[Skipped] = []
        for name, shard in _shard_names(shards):
            _index_shard(name, shard, members, labels, unusable)
        if not members:
            raise SourceError(
                f"{location}: expected images ({', '.join(sorted(IMAGE_EXTENSIONS))}) in the "
                f"shards, found none in {len(shards)}"
            )
        self.ids = sorted(members)
        self.unusable = unusable
        self._members = [members[key] for key in self.ids]
        labelled = [key for key in self.ids if key in labels]
        if labelled and len(labelled) < len(self.ids):
            missing = next(key for key in self.ids if key not in labels)
            raise SourceError(
                f"{location}: expected a .{LABEL_EXTENSION} member for all samples or none, "
                f"found {len(labelled)} for {len(self.ids)} samples; {missing} has none"
            )
        if labelled:
            self.labels = [labels[key] for key in self.ids]

    def read(self, number: int) -> bytes:
        member = self._members[number]
        check_file_size(member.size_bytes)
        try:
            with member.shard.open("rb") as file:
                file.seek(member.offset)
                content = file.read(member.size_bytes)
        except OSError as error:
            raise UnreadableError(f"cannot be read: {error.strerror}") from error
        if len(content) < member.size_bytes:
            raise UnreadableError("the shard ends within the image")
        return content


def _shard_names(shards: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yield every shard with its path below the folder that holds them all."""
    absolute = [shard.absolute() for shard in shards]
    parent = os.path.commonpath([shard.parent for shard in absolute])
    for shard in absolute:
        yield shard.relative_to(parent).as_posix(), shard


def _index_shard(
    name: str,
    shard: Path,
    members: dict[str, Member],
    labels: dict[str, int],
    unusable: list[Skipped],
) -> None:
    """Add the images and labels of one shard to ``members`` and ``labels``."""
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for entry in archive:
                key, extension = _split_name(entry.name)
                sample = f"{name}!{key}"
                if extension == LABEL_EXTENSION and entry.isreg():
                    labels[sample] = parse_label(_text(archive, entry), f"{sample}.cls")
                elif extension not in IMAGE_EXTENSIONS or entry.isdir():
                    continue
                elif not entry.isreg() or entry.issparse():
                    unusable.append(Skipped(sample, "refused: a link or special member"))
                elif sample in members:
                    unusable.append(Skipped(sample, f"second image of the key: {entry.name}"))
                else:
                    members[sample] = Member(shard, entry.offset_data, entry.size)
            # tarfile silently takes a damaged header for the end of the archive.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise SourceError(
                    f"{shard}: expected a complete tar file, found a damaged or cut-off "
                    f"header at byte {archive.offset}"
                )
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise SourceError(
            f"{shard}: expected an uncompressed, complete tar file: {error}"
        ) from error


def _split_name(name: str) -> tuple[str, str]:
    """Return key and extension: the key ends at the first dot of the base name."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _text(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> str:
    reader = archive.extractfile(entry)  # a view into the archive; nothing is written
    if reader is None:
        return ""
    with reader:
        return reader.read(MAX_LABEL_BYTES).decode("ascii", errors="replace")
