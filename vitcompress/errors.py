"""The errors this library raises on purpose, each with the exit code of the command line.

Every message says where, what was expected, what was found and what to do. Anything else that
escapes is a defect of ours and ends with exit code 1.
"""

from typing import ClassVar

__all__ = [
    "ArtifactError",
    "ConfigError",
    "ExportError",
    "InputError",
    "PassError",
    "StoppedError",
    "UnsupportedModelError",
    "VitcompressError",
]


class VitcompressError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        exit_code: What the command line returns when this error ends it.
    """

    exit_code: ClassVar[int] = 1


class ConfigError(VitcompressError):
    """A setting, recipe or destination is wrong; the user can correct the call."""

    exit_code = 2


class UnsupportedModelError(VitcompressError):
    """The model, or an operation inside it, cannot be captured or compressed."""

    exit_code = 4


class ExportError(VitcompressError):
    """The compressed model cannot be written for the target, or failed its verification."""

    exit_code = 4


class InputError(VitcompressError):
    """A model file, image source or label file is missing, damaged or unsafe to open."""

    exit_code = 5


class ArtifactError(VitcompressError):
    """A saved model is incomplete, damaged or of an unknown version."""

    exit_code = 5


class StoppedError(VitcompressError):
    """The user stopped the work; the message says what is kept."""

    exit_code = 130


class PassError(VitcompressError):
    """A pass could not do its work; the message names the pass, its position and the site."""

    exit_code = 4
