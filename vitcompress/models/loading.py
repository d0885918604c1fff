"""Turn what the user names into a module, its preprocessing and a line about its origin."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from calib import Preprocessing
from vitcompress.errors import ConfigError, InputError, VitcompressError
from vitcompress.models import factory, hf_models
from vitcompress.models.architecture import (
    LIBRARIES,
    create_architecture,
    find_bare_name,
    missing_extension,
    split_name,
)
from vitcompress.models.checkpoint import (
    Checkpoint,
    check_finite,
    read_checkpoint,
    with_settings,
)
from vitcompress.models.classes import classes_of_module, classes_of_state
from vitcompress.models.content import FileKind
from vitcompress.models.fingerprint import lookup
from vitcompress.models.fitting import fit, split_derived
from vitcompress.models.naming import first_line, limited, nearest_sibling
from vitcompress.models.opening import open_weights
from vitcompress.models.preprocessing import from_attributes

__all__ = ["LoadedModel", "load_model"]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A module ready to be captured.

    Attributes:
        module: Eval mode, float32, on the CPU. An exported program is as it was exported.
        name: Of the architecture, e.g. ``timm/vit_tiny_patch16_224``.
        preprocessing: How images become its input.
        num_classes: None if unknown.
        source: One line for the terminal: what was loaded from what.
        digest: SHA-256 of the weights file; None where there is no file.
    """

    module: nn.Module
    name: str
    preprocessing: Preprocessing
    num_classes: int | None
    source: str
    digest: str | None


def load_model(
    spec: str | Path,
    *,
    arch: str | None = None,
    trust_input: bool = False,
    num_classes: int | None = None,
    image_size: int | None = None,
) -> LoadedModel:
    """Return the model that a file, a library's name or a factory stands for.

    Args:
        spec: An existing file (safetensors or torch.save, judged by content), or
            ``timm/NAME``, ``torchvision/NAME``, ``hf/ID`` for their pretrained weights, or
            ``package.module:factory``.
        arch: The architecture of a weights file, as for ``create_architecture``; None takes
            the one the checkpoint names, or finds it by names and shapes.
        trust_input: Whether a file may run code when opened (pickled modules, programs).
        num_classes: Number of classes; None reads it from the weights.
        image_size: Height and width of the input in pixels; None takes the model's own.

    Raises:
        ConfigError: The architecture is unknown, ambiguous or missing its library.
        InputError: The file is missing, damaged, unsafe or does not fit the architecture.
    """
    for name, value, low in (("num_classes", num_classes, 0), ("image_size", image_size, 1)):
        if value is not None and value < low:
            raise ConfigError(
                f"{name}: expected a whole number of at least {low}, got {value}"
            )
    text, path = str(spec), Path(spec)
    try:
        is_file = text != "" and path.is_file()
    except OSError as error:
        raise InputError(f"{text}: cannot be read: {error.strerror}") from error
    if is_file:
        return _load_file(path, arch, trust_input, num_classes, image_size)
    is_library = text.partition("/")[0] in LIBRARIES and "/" in text
    if not is_library and not factory.is_factory(text):
        raise InputError(_nothing_there(text, path))
    if arch is not None:
        raise ConfigError(
            f"arch: {arch} was given for {text}, which names its own; leave it out"
        )
    if is_library:
        return _load_pretrained(text, num_classes, image_size)
    module, preprocessing, name = create_architecture(text, num_classes, image_size)
    return _finished(module, name, preprocessing, num_classes, f"module built by {text}", None)


def _nothing_there(text: str, path: Path) -> str:
    expected = f"{text}: expected a weights file or a name such as timm/NAME"
    if not text:
        return (
            "model: expected a weights file or a name such as timm/NAME, found an empty path"
        )
    if path.is_dir():
        hint = (
            f"; for its config.json write hf/{text}" if (path / "config.json").exists() else ""
        )
        return f"{expected}, found a directory{hint}"
    if path.exists():
        return f"{expected}, found neither a file nor a directory"
    if not path.parent.is_dir():
        return f"{expected}, found no directory {path.parent}"
    return f"{expected}, found no such file{nearest_sibling(path)}"


def _load_pretrained(
    spec: str, num_classes: int | None, image_size: int | None
) -> LoadedModel:
    library, name = split_name(spec)
    LIBRARIES[library].check_name(name)
    try:
        module, preprocessing = LIBRARIES[library].load_pretrained(name, image_size=image_size)
    except VitcompressError:
        raise
    except ImportError as error:
        raise missing_extension(spec, error) from error
    # Each library, and each client below it, has its own types for a failed download.
    except Exception as error:
        raise InputError(
            f"{spec}: pretrained weights cannot be loaded: {type(error).__name__}: "
            f"{first_line(str(error))}; give a weights file with --arch {spec}"
        ) from error
    source = f"pretrained weights of {spec}"
    return _finished(module, spec, preprocessing, num_classes, source, None)


def _load_file(
    path: Path,
    arch: str | None,
    trust_input: bool,
    num_classes: int | None,
    image_size: int | None,
) -> LoadedModel:
    kind, content = open_weights(path, trust_input)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(content, Mapping):
        # Some training scripts pickle the module itself into an otherwise plain checkpoint.
        held = content.get("model")
        content = held if isinstance(held, nn.Module) else content
    if isinstance(content, nn.Module) and arch is not None:
        content = content.state_dict()
    if isinstance(content, nn.Module):
        return _whole_module(path, kind, content, num_classes, image_size, digest)
    return _load_state(path, content, arch, num_classes, image_size, digest)


def _whole_module(
    path: Path,
    kind: FileKind,
    module: nn.Module,
    num_classes: int | None,
    image_size: int | None,
    digest: str,
) -> LoadedModel:
    check_finite(str(path), module.state_dict())
    exported = kind is FileKind.EXPORTED
    name = path.stem if exported else type(module).__name__
    what = "exported program" if exported else f"whole module {name}"
    preprocessing = from_attributes(str(path), module, image_size)
    source = f"{what} from {path.name}"
    if exported:
        # The mode and the types are part of the program and cannot be changed any more.
        return LoadedModel(module, name, preprocessing, num_classes, source, digest)
    return _finished(module, name, preprocessing, num_classes, source, digest)


def _load_state(
    path: Path,
    content: Mapping[Any, Any],
    arch: str | None,
    num_classes: int | None,
    image_size: int | None,
    digest: str,
) -> LoadedModel:
    checkpoint = read_checkpoint(str(path), content)
    arch, how = _architecture_of(path, checkpoint, arch)
    saved = checkpoint.settings
    if num_classes is None and isinstance(saved.get("num_classes"), int):
        num_classes = saved["num_classes"]
    if image_size is None and isinstance(saved.get("img_size"), int):
        image_size = saved["img_size"]
    module, preprocessing, name = create_architecture(
        arch, num_classes, image_size, checkpoint.state
    )
    module, dropped = _fitted(path, name, module.float(), checkpoint)
    notes = list(checkpoint.notes)
    if dropped:
        notes.append(f"{len(dropped)} derived buffers left out: {limited(dropped, 3)}")
    details = f" ({'; '.join(notes)})" if notes else ""
    return _finished(
        module,
        name,
        with_settings(str(path), preprocessing, saved),
        num_classes,
        f"state dict {path.name} as {name}, {how}{details}",
        digest,
    )


def _architecture_of(path: Path, checkpoint: Checkpoint, arch: str | None) -> tuple[str, str]:
    if arch is not None:
        return arch, "as given"
    if checkpoint.architecture is not None:
        # Other training scripts save other things under this key; those are passed over.
        named = find_bare_name(checkpoint.architecture)
        if named is not None:
            return named, "named in the checkpoint"
    candidates = _candidates(checkpoint.state)
    if len(candidates) == 1:
        return candidates[0], "found by names and shapes"
    if candidates:
        raise ConfigError(
            f"{path}: names and shapes fit {len(candidates)} architectures: "
            f"{', '.join(candidates)}; they differ in what a state dict does not show, so "
            "choose one with --arch"
        )
    raise ConfigError(
        f"{path}: names and shapes of its {len(checkpoint.state)} tensors "
        f"({limited(checkpoint.state, 3)}) identify no registered architecture; give --arch, "
        "and --image-size if it is not the usual one"
    )


def _candidates(state: Mapping[str, Tensor]) -> list[str]:
    found = lookup({name: tensor.shape for name, tensor in state.items()})
    if found:
        return found
    kept, dropped = split_derived(state, {})
    return lookup({name: tensor.shape for name, tensor in kept.items()}) if dropped else []


def _fitted(
    path: Path, name: str, module: nn.Module, checkpoint: Checkpoint
) -> tuple[nn.Module, list[str]]:
    """Return the module with the weights loaded, and the names that were left out."""
    own = module.state_dict()
    state, prefix = checkpoint.state, checkpoint.prefix
    # What looked like a wrapper is part of the model's own names.
    if prefix and own and all(key.startswith(prefix) for key in own):
        state = {prefix + key: tensor for key, tensor in state.items()}
    state, dropped = split_derived(state, own)
    mismatch = fit(module, state)
    if mismatch and name.startswith("hf/"):
        try:
            module, mismatch = hf_models.load_converted(module, state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(
                f"{path}: the state dict does not fit {name}: {first_line(str(error))}; "
                "check --arch"
            ) from error
    if mismatch:
        raise InputError(
            f"{path}: the state dict does not fit {name}:\n{mismatch.describe()}\n"
            "check --arch, --num-classes and --image-size"
        )
    return module, dropped


def _finished(
    module: nn.Module,
    name: str,
    preprocessing: Preprocessing,
    num_classes: int | None,
    source: str,
    digest: str | None,
) -> LoadedModel:
    known = classes_of_module(module)
    if known is None and name.startswith("torchvision/"):
        # Most of these keep no such attribute, but all have a classifier of a known name.
        known = classes_of_state(module.state_dict())
    if None not in (num_classes, known) and num_classes != known:
        raise ConfigError(
            f"{name}: {num_classes} classes were asked for, this model has {known}; leave "
            "num_classes out, or give weights that were trained for that number"
        )
    num_classes = known if num_classes is None else num_classes
    return LoadedModel(module.float().eval(), name, preprocessing, num_classes, source, digest)
