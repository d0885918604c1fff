"""Names and causes in messages, and libraries that may not be installed."""

import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vitcompress.errors import ConfigError

__all__ = ["first_line", "import_optional", "limited", "nearest", "nearest_sibling"]

INSTALL_COMMANDS = {
    "timm": "pip install 'vitcompress[timm]'",
    "torchvision": "pip install torchvision",
    "transformers": "pip install 'vitcompress[hf]'",
}


def import_optional(library: str) -> Any:
    """Return an optional library.

    Args:
        library: A key of ``INSTALL_COMMANDS``.

    Raises:
        ConfigError: It is not installed, or fails to import.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ConfigError(
            f"{library}: this model needs a library that cannot be imported ({error}); "
            f"install it with: {INSTALL_COMMANDS[library]}"
        ) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that names the most similar names, empty if none is."""
    matches = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


def nearest_sibling(path: Path) -> str:
    """Return the end of a message that names similar files beside a missing one."""
    try:
        return nearest(path.name, [other.name for other in path.parent.iterdir()])
    except OSError:
        return ""


def limited(names: Iterable[str], limit: int = 10) -> str:
    """Return names for a message, those beyond the limit as a count."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def first_line(message: str) -> str:
    """Return the first line of a message that is not blank."""
    return next((line.strip() for line in message.splitlines() if line.strip()), "no message")
