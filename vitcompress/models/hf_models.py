"""Image classifiers of the transformers library, by hub name or by a local config.json."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from calib import Preprocessing
from vitcompress.errors import ConfigError, InputError
from vitcompress.models.classes import classes_of_state
from vitcompress.models.fitting import Mismatch
from vitcompress.models.hf_processors import processor_preprocessing
from vitcompress.models.naming import first_line, import_optional, nearest_sibling

__all__ = ["build", "check_name", "load_converted", "load_pretrained"]


def check_name(name: str) -> None:
    """Raise unless the name can be a hub name or is a local configuration.

    Raises:
        ConfigError: A local path is meant and does not exist, or transformers is missing.
    """
    import_optional("transformers")
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"hf/{name}: expected config.json in this folder, found none")
    is_path = path.suffix == ".json" or path.is_absolute() or name.startswith(".")
    if not path.exists() and (is_path or name.count("/") > 1 or not name):
        raise ConfigError(
            f"hf/{name}: expected a hub name such as hf/ORGANISATION/MODEL or the path of a "
            f"config.json, found no such file{nearest_sibling(path)}"
        )


def build(
    name: str,
    *,
    num_classes: int | None,
    image_size: int | None,
    state: Mapping[str, Tensor] | None,
) -> tuple[nn.Module, Preprocessing]:
    """Return the classifier that a configuration describes, and its preprocessing.

    Args:
        name: A hub name, a local ``config.json`` or its folder.
        num_classes: Classes; None reads them from ``state``, or takes the configured number.
        image_size: Height and width in pixels; None takes the configured size.
        state: Tensors that will be loaded.

    Raises:
        ConfigError: It cannot be built with these settings.
        InputError: The configuration cannot be read or downloaded.
    """
    transformers = import_optional("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"hf/{name}: no usable configuration: {first_line(str(error))}; give a local one "
            "with --arch hf/path/to/config.json"
        ) from error
    if num_classes is None and state is not None:
        num_classes = classes_of_state(state)
    if num_classes is not None:
        config.num_labels = num_classes
    if image_size is not None:
        config.image_size = image_size
    classifier = transformers.AutoModelForImageClassification
    module = classifier.from_config(config, trust_remote_code=False)
    return cast(nn.Module, module), processor_preprocessing(name, module, image_size)


def load_pretrained(name: str, *, image_size: int | None) -> tuple[nn.Module, Preprocessing]:
    """Return the classifier with its published weights, and its preprocessing."""
    classifier = import_optional("transformers").AutoModelForImageClassification
    settings = {"image_size": image_size} if image_size else {}
    # Never run code from the hub, and never stop to ask whether to.
    module = classifier.from_pretrained(
        name, trust_remote_code=False, dtype=torch.float32, **settings
    )
    return cast(nn.Module, module), processor_preprocessing(name, module, image_size)


def load_converted(
    module: nn.Module, state: Mapping[str, Tensor]
) -> tuple[nn.Module, Mismatch]:
    """Return the module with weights saved under the library's published names.

    Since transformers 5 modules name their tensors differently from the files that
    ``save_pretrained`` writes and the hub holds. Only the library's own loader knows the
    table, so it does the loading.

    Args:
        module: As from ``build``.
        state: Tensors by their published names.
    """
    loader = cast(Any, type(module))
    with _quiet():
        loaded, found = loader.from_pretrained(
            None,
            config=module.config,
            state_dict=dict(state),
            dtype=torch.float32,
            output_loading_info=True,
            # Otherwise the first of them ends the load; all are to be listed.
            ignore_mismatched_sizes=True,
        )
    misshaped = {
        name: (tuple(expected), tuple(given))
        for name, given, expected in sorted(found["mismatched_keys"])
    }
    return cast(nn.Module, loaded), Mismatch(
        sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), misshaped
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the library's progress bar and its own report of mismatches."""
    logging = import_optional("transformers").utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
