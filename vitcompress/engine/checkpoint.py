"""Finished blocks of a run on disk, so that a run that was stopped goes on where it was.

One file holds one block: its tensors, and its figures as JSON in the header. A run is known by
what decides its result; a checkpoint of another run is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitcompress.artifact.files import write_file
from vitcompress.calibration import CalibrationSource
from vitcompress.errors import ConfigError, InputError
from vitcompress.graph import CapturedGraph
from vitcompress.passes.blocks import BlockOutcome
from vitcompress.recipe import Recipe

__all__ = ["Checkpoint", "StageCheckpoint", "digest_of"]

FORMAT = 1
_RUN = "run.json"


def digest_of(graph: CapturedGraph) -> str:
    """Return the SHA-256 of a graph's operations and tensors."""
    found = hashlib.sha256()
    for node in graph.graph.nodes:
        found.update(f"{node.op} {node.target} {node.args} {node.kwargs}\n".encode())
    for name, value in graph.tensors().items():
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Checkpoint:
    """A directory of finished blocks.

    Args:
        folder: Made if it is missing.
        identity: What decides the result, by name.

    Raises:
        ConfigError: The directory belongs to another run, or holds other files.
        InputError: It is damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder = folder
        self._stages = 0
        path = folder / _RUN
        if path.is_file():
            self._check(path, identity)
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder}: holds files that are no checkpoint; name another")
        content = json.dumps({"format": FORMAT, "identity": dict(identity)}, indent=1) + "\n"
        write_file(path, lambda draft: _write_text(draft, content))

    @classmethod
    def of_run(
        cls, folder: Path, recipe: Recipe, reference: CapturedGraph, source: CalibrationSource
    ) -> "Checkpoint":
        """Open the checkpoint of the run that these three decide.

        Raises:
            ConfigError: The directory belongs to another run, or holds other files.
            InputError: It is damaged.
        """
        identity = {
            "recipe": hashlib.sha256(recipe.to_yaml().encode()).hexdigest(),
            "model": digest_of(reference),
            "images": source.digest(),
            "torch": torch.__version__,
        }
        return cls(folder, identity)

    def stage(self) -> "StageCheckpoint":
        """Return the part of the next walk through the blocks."""
        self._stages += 1
        return StageCheckpoint(self.folder, self._stages - 1)

    def _check(self, path: Path, identity: Mapping[str, str]) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            version, known = found["format"], dict(found["identity"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: cannot be read: {error}; delete {self.folder}"
            ) from error
        if version != FORMAT:
            raise ConfigError(f"{path}: format {version!r}; this version reads {FORMAT}")
        other = [name for name, value in identity.items() if known.get(name) != value]
        if other:
            raise ConfigError(
                f"{self.folder}: is the checkpoint of another run: its {', '.join(other)} "
                f"differ{'s' if len(other) == 1 else ''}; name another directory"
            )


class StageCheckpoint:
    """The blocks of one walk.

    Args:
        folder: Directory of the checkpoint.
        number: Which walk of the run it is.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._folder = folder
        self._number = number

    def read(self, block: int) -> BlockOutcome | None:
        """Return what became of a block, or ``None`` if it is not finished.

        Raises:
            InputError: The file is damaged.
        """
        path = self._path(block)
        if not path.is_file():
            return None
        tensors: dict[str, Tensor] = {}
        quantizers: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                details = json.loads(file.metadata()["details"])
                for key in file.keys():  # noqa: SIM118 - no mapping
                    kind, _, name = key.partition("/")
                    if kind == "tensor":
                        tensors[name] = file.get_tensor(key)
                    else:
                        target, _, parameter = name.rpartition("/")
                        quantizers.setdefault(target, {})[parameter] = file.get_tensor(key)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: cannot be read: {error}; delete it") from error
        return BlockOutcome(tensors=tensors, quantizers=quantizers, details=details)

    def write(self, block: int, outcome: BlockOutcome) -> None:
        """Store what became of a block.

        Raises:
            ConfigError: The file cannot be written.
        """
        content = {f"tensor/{name}": value for name, value in outcome.tensors.items()}
        for target, parameters in outcome.quantizers.items():
            content.update({f"quantizer/{target}/{n}": p for n, p in parameters.items()})
        content = {key: value.cpu().contiguous().clone() for key, value in content.items()}
        header = {"details": json.dumps(outcome.details)}
        stored = save(content, metadata=header)
        write_file(self._path(block), lambda draft: _write_bytes(draft, stored))

    def _path(self, block: int) -> Path:
        return self._folder / f"{self._number:02d}-{block:03d}.safetensors"


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _write_text(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
