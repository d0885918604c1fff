"""Models of the timm library."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from calib import Preprocessing
from vitcompress.errors import ConfigError
from vitcompress.models.classes import classes_of_state
from vitcompress.models.naming import import_optional, nearest
from vitcompress.models.preprocessing import from_data_config

__all__ = ["build", "check_name", "has_name", "load_pretrained"]


def has_name(name: str) -> bool:
    """Return whether timm registers an architecture of this name, tag or not."""
    return bool(import_optional("timm").is_model(name))


def check_name(name: str) -> None:
    """Raise unless timm registers the name.

    Raises:
        ConfigError: It does not, or timm is not installed.
    """
    timm = import_optional("timm")
    if not has_name(name):
        base = name.partition(".")[0]
        raise ConfigError(
            f"timm/{name}: timm {timm.__version__} registers no such architecture"
            f"{nearest(base, timm.list_models())}"
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
        name: As registered, with or without a tag.
        num_classes: Classes; None reads them from ``state``, or takes the registered number.
        image_size: Height and width in pixels; None takes the registered size.
        state: Tensors that will be loaded.

    Raises:
        ConfigError: It cannot be built with these settings.
    """
    timm = import_optional("timm")
    arguments: dict[str, Any] = {}
    if state is not None:
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        arguments = _arguments_of_state(config, state)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    return _create(timm, name, image_size, arguments)


def load_pretrained(name: str, *, image_size: int | None) -> tuple[nn.Module, Preprocessing]:
    """Return the architecture with timm's pretrained weights, and its preprocessing."""
    return _create(import_optional("timm"), name, image_size, {"pretrained": True})


def _arguments_of_state(config: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    num_classes = classes_of_state(state, _names(getattr(config, "classifier", None)))
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    for first in _names(getattr(config, "first_conv", None)):
        weight = state.get(f"{first}.weight")
        # Only grey is acted on: other counts may come from folding pixels into channels.
        if weight is not None and weight.dim() == 4 and weight.shape[1] == 1:
            arguments["in_chans"] = 1
    return arguments


def _names(value: object) -> Sequence[str]:
    if isinstance(value, (tuple, list)):
        return [str(name) for name in value]
    return [value] if isinstance(value, str) else []


def _create(
    timm: Any, name: str, image_size: int | None, arguments: dict[str, Any]
) -> tuple[nn.Module, Preprocessing]:
    sized = {**arguments, "img_size": image_size} if image_size else arguments
    try:
        module = timm.create_model(name, **sized)
    except TypeError:
        if sized is arguments:
            raise
        # Convolutional networks take any size and know no such argument.
        module = timm.create_model(name, **arguments)
    config = timm.data.resolve_data_config({}, model=module)
    module = cast(nn.Module, module)
    return module, from_data_config(f"timm/{name}", module, config, image_size)
