"""Modules that the user's own code builds, named as ``package.module:factory``."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

from torch import nn

from vitcompress.errors import ConfigError
from vitcompress.models.naming import nearest

__all__ = ["add_working_directory", "build", "is_factory"]

FACTORY = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_factory(name: str) -> bool:
    """Return whether a name has the form ``package.module:factory``."""
    return FACTORY.fullmatch(name) is not None


def add_working_directory() -> None:
    """Put the working directory first on the import path, as ``python -m`` does."""
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)


def build(name: str) -> nn.Module:
    """Return what the factory returns when called without arguments.

    Args:
        name: ``package.module:factory``; the module is imported, so its code runs.

    Raises:
        ConfigError: The module or the factory does not exist, fails, or gives no module.
    """
    module_name, _, attribute = name.partition(":")
    factory: object = _import_module(name, module_name)
    for part in attribute.split("."):
        if not hasattr(factory, part):
            known = [other for other in dir(factory) if not other.startswith("_")]
            raise ConfigError(
                f"{name}: expected {part!r} in {module_name}, which has no such name"
                f"{nearest(part, known)}"
            )
        factory = getattr(factory, part)
    if not callable(factory):
        raise ConfigError(
            f"{name}: expected a callable that returns a torch.nn.Module, found "
            f"{type(factory).__name__}"
        )
    try:
        module: object = factory()
    # The user's code may raise anything; the cause is chained.
    except Exception as error:
        raise ConfigError(
            f"{name}: the factory is called without arguments and raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{name}: expected the factory to return a torch.nn.Module, found "
            f"{type(module).__name__}"
        )
    return module


def _import_module(name: str, module_name: str) -> ModuleType:
    add_working_directory()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only the named module or a parent is the user's slip; others are its own imports.
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{name}: there is no module {error.name!r} on the import path or in the "
                "working directory; check the spelling and where the command is run"
            ) from error
        raise ConfigError(f"{name}: importing {module_name} failed: {error}") from error
    except Exception as error:
        raise ConfigError(
            f"{name}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
