"""Classification models of the torchvision library."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from calib import Preprocessing
from vitcompress.errors import ConfigError
from vitcompress.models.classes import classes_of_state
from vitcompress.models.naming import import_optional, nearest
from vitcompress.models.preprocessing import make_preprocessing

__all__ = ["build", "check_name", "has_name", "load_pretrained"]


def has_name(name: str) -> bool:
    """Return whether torchvision registers a classification model of this name."""
    return name in _known(import_optional("torchvision"))


def check_name(name: str) -> None:
    """Raise unless torchvision registers the name.

    Raises:
        ConfigError: It does not, or torchvision is not installed.
    """
    torchvision = import_optional("torchvision")
    if not has_name(name):
        raise ConfigError(
            f"torchvision/{name}: torchvision {torchvision.__version__} registers no such "
            f"classification model{nearest(name, _known(torchvision))}"
        )


def build(
    name: str,
    *,
    num_classes: int | None,
    image_size: int | None,
    state: Mapping[str, Tensor] | None,
) -> tuple[nn.Module, Preprocessing]:
    """Return the architecture without pretrained weights, and its preprocessing.

    Args:
        name: As registered.
        num_classes: Classes; None reads them from ``state``, or takes the registered number.
        image_size: Height and width in pixels; None takes the registered size.
        state: Tensors that will be loaded.

    Raises:
        ConfigError: It cannot be built with these settings.
    """
    if num_classes is None and state is not None:
        num_classes = classes_of_state(state)
    arguments = {} if num_classes is None else {"num_classes": num_classes}
    return _create(name, image_size, {"weights": None, **arguments})


def load_pretrained(name: str, *, image_size: int | None) -> tuple[nn.Module, Preprocessing]:
    """Return the architecture with torchvision's best weights, and their preprocessing."""
    return _create(name, image_size, {"weights": "DEFAULT"})


def _known(torchvision: Any) -> list[str]:
    # Without the module, detection, segmentation and quantized models are listed too.
    models = torchvision.models
    return list(models.list_models(module=models))


def _create(
    name: str, image_size: int | None, arguments: dict[str, Any]
) -> tuple[nn.Module, Preprocessing]:
    models = import_optional("torchvision").models
    sized = {**arguments, "image_size": image_size} if image_size else arguments
    try:
        module = models.get_model(name, **sized)
    except TypeError:
        if sized is arguments:
            raise
        # Only the vision transformers have an image size; the others take any.
        module = models.get_model(name, **arguments)
    # A weights file does not say how it was trained. The preset of the default weights is
    # taken for it too; older weights of the same architecture may have used another resize.
    preset = models.get_model_weights(name).DEFAULT.transforms()
    return cast(nn.Module, module), _preprocessing(name, preset, image_size)


def _preprocessing(name: str, preset: Any, image_size: int | None) -> Preprocessing:
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    size = image_size or crop
    return make_preprocessing(
        f"torchvision/{name}",
        size=(size, size),
        crop_fraction=crop / resize,
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
