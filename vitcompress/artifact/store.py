"""Write and read an artefact directory.

Two laws, both tested for every recipe: ``read(write(m))`` computes the same bits as ``m``, and
``write(read(d))`` writes the same bytes but for the time in the manifest.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitcompress.artifact.files import write_directory
from vitcompress.artifact.structure import graph_from_json, graph_to_json
from vitcompress.errors import ArtifactError, ConfigError
from vitcompress.graph import CapturedGraph, Provenance, enumerate_sites
from vitcompress.graph.edit import is_quantizer
from vitcompress.numerics.packing import pack, unpack
from vitcompress.quantizers import Quantizer, QuantSpec, make_quantizer

__all__ = ["FORMAT", "StoredModel", "is_artifact", "read_artifact", "write_artifact"]

FORMAT = 1
_MANIFEST, _GRAPH, _QUANTIZERS, _WEIGHTS = (
    "manifest.json",
    "graph.json",
    "quantizers.json",
    "weights.safetensors",
)


@dataclass(frozen=True)
class StoredModel:
    """What an artefact holds.

    Attributes:
        graph: The compressed graph.
        settings: Manifest entries of the caller's own, JSON types (preprocessing, labels).
        documents: Further text files by name, e.g. ``recipe.yaml``.
    """

    graph: CapturedGraph
    settings: Mapping[str, Any]
    documents: Mapping[str, str]


def is_artifact(path: Path) -> bool:
    """Return whether a path is a directory with a manifest."""
    return (path / _MANIFEST).is_file()


def write_artifact(path: Path, stored: StoredModel, *, overwrite: bool = False) -> None:
    """Write an artefact directory, whole or not at all.

    Raises:
        ConfigError: The destination is taken or cannot be written.
    """
    graph = stored.graph
    content = {
        _GRAPH: _json(graph_to_json(graph)),
        _QUANTIZERS: _json(_quantizers_to_json(graph)),
        **stored.documents,
    }
    tensors = _packed_tensors(graph)

    def write(folder: Path) -> None:
        for name, text in content.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / _WEIGHTS).write_bytes(save(tensors))
        manifest = {
            "format": FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": graph.provenance.model,
            "versions": graph.provenance.versions,
            "settings": dict(stored.settings),
            "files": {
                name: {
                    "sha256": _sha256(folder / name),
                    "size_bytes": (folder / name).stat().st_size,
                }
                for name in sorted([*content, _WEIGHTS])
            },
        }
        (folder / _MANIFEST).write_text(_json(manifest), encoding="utf-8")

    write_directory(path, write, overwrite=overwrite)


def read_artifact(path: Path) -> StoredModel:
    """Return the model stored in a directory. Nothing in it is executed or unpickled.

    Raises:
        ArtifactError: A file is missing, damaged or of an unknown version.
    """
    manifest = _read_json(path / _MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise ArtifactError(
            f"{path / _MANIFEST}: format {found!r}; this version reads {FORMAT}"
        )
    try:
        files = {str(n): str(entry["sha256"]) for n, entry in manifest["files"].items()}
        provenance = Provenance(str(manifest["model"]), dict(manifest["versions"]))
        settings = dict(manifest["settings"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{path / _MANIFEST}: entry missing or malformed: {error}"
        ) from error
    for name in (_GRAPH, _QUANTIZERS, _WEIGHTS):
        if name not in files:
            raise ArtifactError(f"{path / _MANIFEST}: lists no {name}")
    for name, expected in files.items():
        _check_digest(path, name, expected)
    graph, output_names = graph_from_json(_read_json(path / _GRAPH))
    quantizers = _quantizers_from_json(_read_json(path / _QUANTIZERS), path / _QUANTIZERS)
    attributes: dict[str, Any] = dict(_load_tensors(path / _WEIGHTS, graph, quantizers))
    attributes.update(quantizers)
    try:
        captured = CapturedGraph.build(graph, attributes, output_names, provenance)
    except (RuntimeError, SyntaxError) as error:
        raise ArtifactError(f"{path / _GRAPH}: no program: {error}") from error
    documents = {
        name: _read_text(path / name)
        for name in files
        if name not in (_GRAPH, _QUANTIZERS, _WEIGHTS)
    }
    return StoredModel(captured, settings, documents)


# Quantizers


def _quantizers_to_json(graph: CapturedGraph) -> dict[str, Any]:
    """Return one entry for each quantizer: the file that a reviewer reads."""
    served: dict[str, list[Any]] = {}
    for site in enumerate_sites(graph).values():
        if site.quantizer is not None:
            served.setdefault(site.quantizer, []).append(site)
    entries = {}
    for target, quantizer in graph.quantizers().items():
        assert isinstance(quantizer, Quantizer)
        sites = served.get(target, [])
        entries[target] = {
            "site": quantizer.site,
            "role": str(sites[0].role) if sites else None,
            "shared_with": [site.name for site in sites[1:]],
            "spec": quantizer.spec.to_dict(),
            "frozen": quantizer.frozen,
        }
    return {"format": FORMAT, "quantizers": entries}


def _quantizers_from_json(content: Any, path: Path) -> dict[str, Quantizer]:
    try:
        made = {}
        for target, entry in content["quantizers"].items():
            quantizer = make_quantizer(QuantSpec.from_dict(entry["spec"]), str(entry["site"]))
            quantizer.frozen = bool(entry["frozen"])
            made[str(target)] = quantizer
        return made
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise ArtifactError(f"{path}: entry missing or malformed: {error}") from error


# Tensors


def _frozen_weights(graph: Any, quantizers: Mapping[str, Any]) -> dict[str, Quantizer]:
    """Return the quantizer of each tensor that is stored as codes, by tensor name."""
    found: dict[str, Quantizer] = {}
    for node in graph.nodes:
        if is_quantizer(node):
            quantizer = quantizers.get(str(node.target))
            if isinstance(quantizer, Quantizer) and quantizer.frozen:
                found[str(node.args[0].target)] = quantizer
    return found


def _packed_tensors(graph: CapturedGraph) -> dict[str, Tensor]:
    quantizers = graph.quantizers()
    frozen = _frozen_weights(graph.graph, quantizers)
    tensors: dict[str, Tensor] = {}
    for name, value in graph.tensors().items():
        if name in frozen:
            tensors[f"{name}.codes"] = pack(value, frozen[name].spec.bits)
        else:
            tensors[name] = value.contiguous().clone()
    for target, quantizer in quantizers.items():
        assert isinstance(quantizer, Quantizer)
        if not quantizer.calibrated:
            raise ConfigError(
                f"{quantizer.site}: not calibrated; a model must be finished to be saved"
            )
        for name in quantizer.parameter_names:
            tensors[f"{target}.{name}"] = _narrowest(name, getattr(quantizer, name), quantizer)
    return tensors


def _narrowest(name: str, value: Tensor, quantizer: Quantizer) -> Tensor:
    """Return zero points as integers where they are codes; other parameters as they are."""
    if name == "zero_point" and quantizer.defect() is None:
        return value.to(quantizer.code_dtype)
    return value.contiguous().clone()


def _load_tensors(
    path: Path, graph: Any, quantizers: Mapping[str, Quantizer]
) -> dict[str, Tensor]:
    frozen = _frozen_weights(graph, quantizers)
    shapes = {
        str(node.target): node.meta["info"] for node in graph.nodes if node.op == "get_attr"
    }
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name, expected in shapes.items():
                shape = tuple(expected.shape)
                if name in frozen:
                    tensors[name] = unpack(
                        file.get_tensor(f"{name}.codes"),
                        frozen[name].spec.bits,
                        shape,
                        signed=expected.dtype == "int8",
                    )
                else:
                    tensors[name] = file.get_tensor(name)
                    if tuple(tensors[name].shape) != shape:
                        raise ValueError(
                            f"{name}: graph.json says {list(shape)}, "
                            f"found {list(tensors[name].shape)}"
                        )
                    if str(tensors[name].dtype) != f"torch.{expected.dtype}":
                        raise ValueError(
                            f"{name}: graph.json says {expected.dtype}, "
                            f"found {tensors[name].dtype}"
                        )
            for target, quantizer in quantizers.items():
                quantizer.load(
                    **{
                        name: file.get_tensor(f"{target}.{name}").to(torch.float32)
                        for name in quantizer.parameter_names
                    }
                )
            _check_parameters(graph, quantizers)
    except (SafetensorError, ValueError, TypeError, OSError, ConfigError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    return tensors


def _check_parameters(graph: Any, quantizers: Mapping[str, Quantizer]) -> None:
    """Check that each quantizer fits the tensor it reads.

    Raises:
        ValueError: It is unknown, reads no stored tensor though it is frozen, or has
            parameters of another shape.
    """
    for node in graph.nodes:
        if not is_quantizer(node):
            continue
        quantizer, value = quantizers.get(str(node.target)), node.args[0]
        if quantizer is None:
            raise ValueError(f"{node.target}: {_QUANTIZERS} lists no such quantizer")
        if quantizer.frozen and value.op != "get_attr":
            raise ValueError(f"{node.target}: is frozen, but reads no stored tensor")
        try:
            expected = quantizer.spec.granularity.parameter_shape(value.meta["info"].shape)
        except (KeyError, IndexError) as error:
            raise ValueError(f"{node.target}: does not fit its tensor: {error!r}") from error
        for name in quantizer.parameter_names:
            found = tuple(getattr(quantizer, name).shape)
            if found != expected:
                raise ValueError(
                    f"{node.target}.{name}: expected shape {list(expected)}, "
                    f"found {list(found)}"
                )


# Files


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path}: file is missing; is this an artefact directory?"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read as JSON: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as text: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_digest(folder: Path, name: str, expected: str) -> None:
    path = folder / name
    if Path(name).name != name:
        raise ArtifactError(f"{folder / _MANIFEST}: '{name}' is not a file name")
    try:
        found = _sha256(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from error
    if found != expected:
        raise ArtifactError(
            f"{path}: content does not match the manifest (sha256 {found[:12]}, expected "
            f"{expected[:12]}); the file was changed or damaged"
        )
