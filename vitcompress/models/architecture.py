"""From the name of an architecture to a module without pretrained weights."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from calib import Preprocessing
from vitcompress.errors import ConfigError, UnsupportedModelError
from vitcompress.models import factory, hf_models, timm_models, torchvision_models
from vitcompress.models.naming import first_line, nearest
from vitcompress.models.preprocessing import from_attributes

__all__ = [
    "LIBRARIES",
    "create_architecture",
    "find_bare_name",
    "missing_extension",
    "split_name",
]

FORMS = "timm/NAME, torchvision/NAME, hf/ID, hf/path/to/config.json or package.module:factory"


class Library(Protocol):
    """What the adapter of a model library provides; the libraries load when it is used."""

    def check_name(self, name: str) -> None: ...

    def build(
        self,
        name: str,
        *,
        num_classes: int | None,
        image_size: int | None,
        state: Mapping[str, Tensor] | None,
    ) -> tuple[nn.Module, Preprocessing]: ...

    def load_pretrained(
        self, name: str, *, image_size: int | None
    ) -> tuple[nn.Module, Preprocessing]: ...


LIBRARIES: Mapping[str, Library] = {
    "timm": timm_models,
    "torchvision": torchvision_models,
    "hf": hf_models,
}


def create_architecture(
    arch: str,
    num_classes: int | None = None,
    image_size: int | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> tuple[nn.Module, Preprocessing, str]:
    """Return an architecture without pretrained weights, its preprocessing and full name.

    Args:
        arch: ``timm/NAME``, ``torchvision/NAME``, ``hf/ID``, ``hf/path/to/config.json``,
            ``package.module:factory`` (its code runs), or a bare name, which is looked up in
            timm and then in torchvision.
        num_classes: Number of classes; None reads it from ``state``, or takes the default.
        image_size: Height and width of the input in pixels; None takes the default.
        state: Tensors that will be loaded into the module; only their shapes are read.

    Raises:
        ConfigError: The name is unknown, its library is missing, or the settings do not fit.
        InputError: The configuration behind a hub name cannot be had.
        UnsupportedModelError: It needs a compiled extension that is not installed.
    """
    if factory.is_factory(arch):
        module = factory.build(arch)
        return module, from_attributes(arch, module, image_size), arch
    library, name = split_name(arch)
    full_name = f"{library}/{name}"
    LIBRARIES[library].check_name(name)
    try:
        module, preprocessing = LIBRARIES[library].build(
            name, num_classes=num_classes, image_size=image_size, state=state
        )
    except ImportError as error:
        raise missing_extension(full_name, error) from error
    # What the libraries raise at sizes and numbers they cannot build.
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        settings = ((num_classes, "classes"), (image_size, "pixels"))
        asked = " and ".join(
            f"{value} {unit}" for value, unit in settings if value is not None
        )
        raise ConfigError(
            f"{full_name}: cannot be built{f' with {asked}' if asked else ''}: "
            f"{first_line(str(error))}"
        ) from error
    return module, preprocessing, full_name


def missing_extension(name: str, error: ImportError) -> UnsupportedModelError:
    """Return the error for a model that needs a compiled extension which is not there."""
    return UnsupportedModelError(
        f"{name}: cannot be built here: {first_line(str(error))} If it can be installed, the "
        "float model runs; its operators could still not be exported. Choose a model written "
        "in plain PyTorch operators"
    )


def split_name(arch: str) -> tuple[str, str]:
    """Return the library and the name within it.

    Raises:
        ConfigError: The library is unknown, or neither timm nor torchvision has a bare name.
    """
    library, slash, name = arch.partition("/")
    if slash and library in LIBRARIES and name:
        return library, name
    if not slash:
        found = find_bare_name(arch)
        if found is not None:
            return split_name(found)
        raise ConfigError(
            f"{arch}: expected {FORMS}; neither timm nor torchvision has an architecture of "
            f"this name{_nearest_bare(arch)}"
        )
    raise ConfigError(
        f"{arch}: expected {FORMS}; found the library {library!r}"
        f"{nearest(library, LIBRARIES) or f', for a hub name write hf/{arch}'}"
    )


def find_bare_name(name: str) -> str | None:
    """Return the full name of what timm or else torchvision registers under a name.

    Raises:
        ConfigError: Neither library is installed.
    """
    missing = []
    for library, has_name in (
        ("timm", timm_models.has_name),
        ("torchvision", torchvision_models.has_name),
    ):
        try:
            if has_name(name):
                return f"{library}/{name}"
        except ConfigError as error:
            missing.append(error)
    if len(missing) == 2:
        raise missing[0]
    return None


def _nearest_bare(name: str) -> str:
    for library in ("timm", "torchvision"):
        try:
            LIBRARIES[library].check_name(name)
        except ConfigError as error:
            _, question, names = str(error).partition("; did you mean")
            if question:
                return question + names
    return ""
