"""What kind of model file is this, judged by its bytes, without opening what it holds?"""

import codecs
import zipfile
from enum import Enum
from pathlib import Path, PurePosixPath

from vitcompress.errors import InputError

__all__ = ["FileKind", "file_kind"]

HEAD_BYTES = 512
SAFETENSORS_LENGTH_BYTES = 8
# The limit of the format itself; the length field of anything else is nearly always above it.
SAFETENSORS_MAX_HEADER = 100_000_000
EXPECTED = "a safetensors file or one written by torch.save"

OTHER_SIGNATURES = (
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
)


class FileKind(Enum):
    """The kinds of model files that can be opened."""

    SAFETENSORS = "safetensors"
    CHECKPOINT = "torch.save file"
    TORCHSCRIPT = "TorchScript archive"
    EXPORTED = "torch.export archive"


def file_kind(path: Path) -> FileKind:
    """Return what kind of model file this is.

    Args:
        path: An existing file; its suffix is not looked at.

    Raises:
        InputError: It is empty, unreadable, cut off, or no model file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not head:
        raise InputError(f"{path}: expected {EXPECTED}, found an empty file (0 bytes)")
    if _is_safetensors(head):
        return FileKind.SAFETENSORS
    if head.startswith(b"PK"):
        return _zip_kind(path, size)
    # The opening of a pickle of protocol 2 or later, which all torch.save files of before
    # 2020 are. Protocols 0 and 1 open like text and are not accepted.
    if head[0] == 0x80 and len(head) > 1 and 2 <= head[1] <= 5:
        return FileKind.CHECKPOINT
    raise InputError(f"{path}: expected {EXPECTED}, found {_described(head)} ({size:,} bytes)")


def _is_safetensors(head: bytes) -> bool:
    length = int.from_bytes(head[:SAFETENSORS_LENGTH_BYTES], "little")
    brace = head[SAFETENSORS_LENGTH_BYTES : SAFETENSORS_LENGTH_BYTES + 1]
    return brace == b"{" and 2 <= length <= SAFETENSORS_MAX_HEADER


def _zip_kind(path: Path, size: int) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"{path}: expected {EXPECTED}, found a damaged or cut-off zip archive "
            f"({size:,} bytes): {error}; copy or download it again"
        ) from error
    # Members lie in one folder, named after the file; its name means nothing.
    inner = [PurePosixPath(*PurePosixPath(name).parts[1:]) for name in names]
    tops = {member.parts[0] for member in inner if member.parts}
    folders = {member.parts[0] for member in inner if len(member.parts) > 1}
    # Exports of before torch 2.8 have no such folder.
    old_export = any(
        PurePosixPath(name).name == "serialized_exported_program.json" for name in names
    )
    if old_export or "archive_format" in tops or "models" in folders:
        return FileKind.EXPORTED
    if "constants.pkl" in tops or "code" in folders:
        return FileKind.TORCHSCRIPT
    if "data.pkl" in tops:
        return FileKind.CHECKPOINT
    members = ", ".join(names[:3]) or "nothing"
    raise InputError(
        f"{path}: expected {EXPECTED}, found a zip archive without data.pkl "
        f"({size:,} bytes) that holds {members}"
    )


def _described(head: bytes) -> str:
    for signature, name in OTHER_SIGNATURES:
        if head.startswith(signature):
            return name
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; run 'git lfs pull'"
    if head.isspace():
        return "nothing but white space"
    try:
        # Incremental, since the end of the head may cut a character in two.
        text = codecs.getincrementaldecoder("utf-8")().decode(head).strip()
    except UnicodeDecodeError:
        text = ""
    if text and all(character.isprintable() or character.isspace() for character in text):
        return f"text starting with {text.splitlines()[0][:40]!r}"
    return f"unknown binary data starting with {head[:8].hex(' ')}"
