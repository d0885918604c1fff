"""The saved form of a compressed model: one directory, no pickle, packed integer weights."""

from vitcompress.artifact.files import write_directory, write_file, write_files
from vitcompress.artifact.store import StoredModel, is_artifact, read_artifact, write_artifact

__all__ = [
    "StoredModel",
    "is_artifact",
    "read_artifact",
    "write_artifact",
    "write_directory",
    "write_file",
    "write_files",
]
