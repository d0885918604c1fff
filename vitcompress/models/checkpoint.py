"""Find the state dict inside a checkpoint, and what the checkpoint says about the model."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calib import Preprocessing, SourceError
from vitcompress.errors import InputError
from vitcompress.models.naming import limited

__all__ = ["Checkpoint", "check_finite", "read_checkpoint", "with_settings"]

# In order of preference; averaged weights last, since the plain ones are what training saw.
STATE_KEYS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema")
# Added by DataParallel, torch.compile and Lightning.
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")
MAX_NAMES = 5


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A state dict and what was saved with it.

    Attributes:
        state: Floating tensors are float32.
        prefix: What was removed from the start of all names.
        notes: For the terminal: what was chosen and changed on the way.
        architecture: The name under ``arch``, None if there is none.
        settings: timm's training settings, None where unset.
    """

    state: Mapping[str, Tensor]
    prefix: str
    notes: tuple[str, ...]
    architecture: str | None
    settings: Mapping[str, Any]


def read_checkpoint(where: str, content: Mapping[Any, Any]) -> Checkpoint:
    """Return the state dict that a file's content is or holds.

    Args:
        where: Start of an error message.
        content: The outermost mapping of the file.

    Raises:
        InputError: There is no state dict, or not one of plain finite tensors.
    """
    key = next((key for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
    notes = []
    if key is None:
        # A flat file may mix tensors with metadata, such as an epoch; nested ones do not.
        named = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    else:
        named = content[key]
        others = [other for other in STATE_KEYS if other in content and other != key]
        notes.append(f"key {key!r}" + (f", not {', '.join(others)}" if others else ""))
    if not any(isinstance(value, Tensor) for value in named.values()):
        inside = f"under {key!r}" if key else "at its top level"
        raise InputError(
            f"{where}: expected a state dict, found no tensors {inside}, only "
            f"{limited(map(str, named if key else content)) or 'nothing'}"
        )
    _check_plain(where, named)
    state, prefix = _without_prefixes(named)
    state, converted = _as_float32(state)
    if prefix:
        notes.append(f"prefix {prefix!r} removed")
    if converted:
        notes.append(f"converted from {', '.join(converted)}")
    check_finite(where, state)
    arguments = content.get("args")
    settings = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    architecture = content.get("arch")
    return Checkpoint(
        state,
        prefix,
        tuple(notes),
        architecture if isinstance(architecture, str) else None,
        {name: value for name, value in settings.items() if value is not None},
    )


def check_finite(where: str, state: Mapping[str, Tensor]) -> None:
    """Raise if a floating tensor holds a NaN or an infinity.

    Raises:
        InputError: Names the first tensors that do, and how many do.
    """
    bad = [
        name
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise InputError(
            f"{where}: expected finite weights, found NaN or infinity in {len(bad)} of "
            f"{len(state)} tensors: {limited(bad, MAX_NAMES)}; the training may have "
            "diverged, take an earlier checkpoint"
        )


def with_settings(
    where: str, preprocessing: Preprocessing, settings: Mapping[str, Any]
) -> Preprocessing:
    """Return the preprocessing with what timm's training settings override.

    Raises:
        InputError: A setting is out of bounds.
    """
    changes: dict[str, Any] = {}
    for name in ("mean", "std"):
        value = settings.get(name)
        if isinstance(value, (tuple, list)) and value:
            # timm repeats a single number over the channels.
            repeats = len(preprocessing.mean) if len(value) == 1 else 1
            changes[name] = tuple(value) * repeats
    for field, name in (("crop_fraction", "crop_pct"), ("interpolation", "interpolation")):
        # timm spells "unset" as None in one version and as an empty string in another.
        if settings.get(name):
            changes[field] = settings[name]
    try:
        return replace(preprocessing, **changes)
    except SourceError as error:
        raise InputError(f"{where}: settings saved under 'args': {error}") from error


def _check_plain(where: str, named: Mapping[Any, Any]) -> None:
    for name, value in named.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            found = type(value).__name__
        elif value.is_quantized or value.layout is not torch.strided:
            found = "a quantized or sparse tensor"
        elif value.is_meta:
            found = "a tensor without data"
        else:
            continue
        raise InputError(
            f"{where}: expected plain tensors in the state dict, found {found} under "
            f"{name!r}; save the unmodified float model's state_dict()"
        )


def _without_prefixes(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    removed = ""
    names = list(state)
    # Wrappers nest: a compiled module inside DataParallel has both.
    while prefix := next(
        (p for p in WRAPPER_PREFIXES if all(name.startswith(p) for name in names)), ""
    ):
        removed += prefix
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, state.values(), strict=True)), removed


def _as_float32(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    found = {
        str(tensor.dtype).removeprefix("torch.")
        for tensor in state.values()
        if tensor.is_floating_point() and tensor.dtype is not torch.float32
    }
    converted = {
        name: tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        for name, tensor in state.items()
    }
    return converted, sorted(found)
