"""What decides which function a model computes, found without capturing it.

A capture takes seconds; a repeated sweep must know in less whether a model is the same.
"""

import ast
import hashlib
import inspect
import json
import textwrap
import types
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from vitcompress.artifact.structure import graph_to_json
from vitcompress.graph import CapturedGraph
from vitcompress.models.loading import LoadedModel

__all__ = ["computing_versions", "model_digest"]

#: Libraries that take part in a result. A class of theirs is known by name and version.
LIBRARIES = ("torch", "numpy", "pillow", "timm", "torchvision", "transformers", "vitcompress")
#: Modules of this package that no result of quantization and evaluation passes through.
_BESIDE = (
    *("analyze", "arguments", "benchmark", "cli", "compare", "export", "gate", "html_report"),
    *("speed", "terminal", "verdict_tables", "__main__"),
)
_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def model_digest(model: nn.Module | LoadedModel | CapturedGraph) -> str:
    """Return a SHA-256 over everything known to decide the function of a model.

    Of a module: every parameter and buffer, the printed structure, plain attributes of each
    submodule (a number of heads shows in no shape), and the source, comments aside, of classes
    that belong to no library in ``LIBRARIES``. Functions that such classes call elsewhere are
    not covered. Of a captured graph: its nodes and tensors.
    """
    total = hashlib.sha256()
    if isinstance(model, CapturedGraph):
        total.update(json.dumps(graph_to_json(model)).encode())
        return _add_tensors(total, model.tensors().items())
    module = model.module if isinstance(model, LoadedModel) else model
    total.update(repr(module).encode())
    kinds: dict[type, None] = {}
    for name, child in module.named_modules():
        kinds.update(dict.fromkeys(type(child).__mro__))
        total.update(f"\n{name}: {_attributes(child)}".encode())
        if isinstance(child, fx.GraphModule):
            total.update(child.code.encode())
    for kind in sorted(kinds, key=_qualified):
        total.update(f"\n{_qualified(kind)} {_source(kind)}".encode())
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return _add_tensors(total, named)


def computing_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute, by name.

    This package adds a digest of its own source: a checkout changes without a new version.
    """
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)
    found["vitcompress_source"] = _source_digest()
    return found


def _add_tensors(total: "hashlib._Hash", named: Iterable[tuple[str, Tensor]]) -> str:
    for name, value in sorted(named, key=lambda item: item[0]):
        total.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def _attributes(module: nn.Module) -> str:
    own = set(vars(nn.Module())) | {"training"}
    found = {name: _plain(value) for name, value in vars(module).items() if name not in own}
    return json.dumps({name: text for name, text in found.items() if text}, sort_keys=True)


def _plain(value: Any) -> str:
    """Return the text of a number, a word, a function, or a list of them; else nothing."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_plain(item) for item in value)}]"
    return ""


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _source(kind: type) -> str:
    if kind.__module__.partition(".")[0] in (*LIBRARIES, "builtins"):
        return ""
    try:
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(kind))))
    except (OSError, TypeError, SyntaxError):  # no file, built in, or no text of its own
        return ""


def _source_digest() -> str:
    root = Path(__file__).parent.parent
    total = hashlib.sha256()
    for folder in (root, root.parent / "calib"):
        for path in sorted(folder.rglob("*.py")):
            if path.relative_to(folder).parts[0].removesuffix(".py") not in _BESIDE:
                total.update(str(path.relative_to(folder.parent)).encode())
                total.update(path.read_bytes())
    return total.hexdigest()[:16]
