"""Open a model file without running what is inside it.

Pickled files go through torch's restricted unpickler, which builds tensors and plain
containers only. Everything else is refused until the caller declares the file trusted.
"""

import argparse
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vitcompress.errors import InputError
from vitcompress.models.content import SAFETENSORS_LENGTH_BYTES, FileKind, file_kind
from vitcompress.models.factory import add_working_directory
from vitcompress.models.naming import first_line

__all__ = ["open_weights"]

REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def open_weights(
    path: Path, trust_input: bool
) -> tuple[FileKind, Mapping[Any, Any] | nn.Module]:
    """Return the kind of a model file and what it holds.

    Args:
        path: An existing file.
        trust_input: Whether code inside the file may run.

    Returns:
        A mapping for state dicts and checkpoints, TorchScript included; a module for a
        pickled module or an exported program, which only a trusted file may hold.

    Raises:
        InputError: The file is damaged, holds something else, or would run code when opened
            and is not trusted.
    """
    kind = file_kind(path)
    if kind is FileKind.SAFETENSORS:
        return kind, _read_safetensors(path)
    if kind is FileKind.CHECKPOINT:
        content = _unpickle_trusted(path) if trust_input else _unpickle_safely(path)
    elif not trust_input:
        raise InputError(
            f"{path}: a {kind.value} holds a program and would run code when opened; give a "
            "state dict instead, or open it with --trust-input if you trust its origin"
        )
    else:
        content = _open_program(path, kind)
    if not isinstance(content, (Mapping, nn.Module)):
        raise InputError(
            f"{path}: expected a state dict or a checkpoint that holds one, found "
            f"{type(content).__name__}"
        )
    return kind, content


def _read_safetensors(path: Path) -> Mapping[Any, Any]:
    try:
        return load_file(path)
    # A type of tensor that torch does not have is a KeyError.
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: damaged safetensors file: {_safetensors_damage(path) or error}; "
            "copy or download it again"
        ) from error


def _safetensors_damage(path: Path) -> str | None:
    """Return what is wrong with the lengths inside the file, None if they agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(SAFETENSORS_LENGTH_BYTES), "little")
        header = file.read(length)
    start = SAFETENSORS_LENGTH_BYTES + length
    if len(header) < length:
        return f"the header should take {start:,} bytes, the file has {size:,}"
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key[:2] != "__"]
        expected = start + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return "the header is not the JSON it should be"
    if expected != size:
        return f"the header describes {expected:,} bytes, the file has {size:,}"
    return None


def _unpickle_safely(path: Path) -> object:
    # timm's training script saves its settings as a Namespace: a class without behaviour,
    # restored by filling its attributes, so admitting it lets no code in.
    allowed = torch.serialization.safe_globals([argparse.Namespace])
    try:
        # By name, torch would judge by the suffix.
        with path.open("rb") as file, allowed, warnings.catch_warnings():
            # torch announces unusual pickle protocols, which it then reads or refuses.
            warnings.simplefilter("ignore", UserWarning)
            return cast(object, torch.load(file, map_location="cpu", weights_only=True))
    # Damage can surface as nearly any type: KeyError, EOFError, UnicodeDecodeError and more.
    except Exception as error:
        raise InputError(f"{path}: {_refusal(error)}") from error


def _refusal(error: Exception) -> str:
    message = str(error)
    refused = REFUSED_GLOBAL.search(message)
    if refused:
        return (
            f"holds more than tensors and would run code when opened ({refused[1]}); save a "
            "state dict instead, or open it with --trust-input if you trust its origin"
        )
    if type(error).__name__ == "UnpicklingError":
        _, _, detail = message.partition("WeightsUnpickler error:")
        return (
            "expected tensors and plain containers, found a pickle that is damaged or could "
            f"run code when opened ({first_line(detail or message)}); save a state dict with "
            "torch.save, or open it with --trust-input if you trust its origin"
        )
    return _damage(error)


def _damage(error: Exception) -> str:
    return (
        f"damaged torch.save file: {type(error).__name__}: {first_line(str(error))}; copy or "
        "download it again"
    )


def _unpickle_trusted(path: Path) -> object:
    # A pickled module names its class; that is often found beside where the user works.
    add_working_directory()
    try:
        with path.open("rb") as file:
            return cast(object, torch.load(file, map_location="cpu", weights_only=False))
    except (AttributeError, ImportError) as error:
        raise InputError(
            f"{path}: holds an object whose class cannot be imported: {error}; run where its "
            "code is importable, or save a state dict"
        ) from error
    # Code of the file's author runs here and may raise anything.
    except Exception as error:
        raise InputError(f"{path}: {_damage(error)}") from error


def _open_program(path: Path, kind: FileKind) -> object:
    try:
        with path.open("rb") as file:  # by name, torch insists on the suffix
            if kind is FileKind.EXPORTED:
                return torch.export.load(file).module()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
                # A scripted module cannot be captured; its tensors can be loaded elsewhere.
                jit: Any = torch.jit
                return cast(object, jit.load(file, map_location="cpu").state_dict())
    except Exception as error:
        raise InputError(
            f"{path}: {kind.value} cannot be opened by torch {torch.__version__}: "
            f"{first_line(str(error))}; give a state dict instead"
        ) from error
