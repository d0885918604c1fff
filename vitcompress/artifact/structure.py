"""``graph.json``: the graph without its tensors, as plain JSON.

A node is its name, opcode, target and arguments, with shape, dtype and module path. Targets
are ATen operators or a short list of integer helpers, so reading a stranger's file runs
nothing but tensor arithmetic.
"""

import math
import re
from typing import Any

import torch
from torch import fx

from vitcompress.errors import ArtifactError
from vitcompress.graph.captured import QUANTIZER_PREFIX, CapturedGraph
from vitcompress.graph.metadata import ModulePath, TensorInfo
from vitcompress.graph.ops import op_name, resolve_op

__all__ = ["graph_from_json", "graph_to_json"]

FORMAT = 1
_PATH = re.compile(r"\w+(\.\w+)*")
_TORCH_VALUES: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def graph_to_json(captured: CapturedGraph) -> dict[str, Any]:
    """Return the structure of a graph as JSON types."""
    nodes = [_node_to_json(node) for node in captured.graph.nodes]
    return {"format": FORMAT, "outputs": list(captured.output_names), "nodes": nodes}


def graph_from_json(content: Any) -> tuple[fx.Graph, tuple[str, ...]]:
    """Return the graph and its output names.

    Raises:
        ArtifactError: The content is not a graph of this format.
    """
    try:
        if content["format"] != FORMAT:
            raise ArtifactError(
                f"graph.json: format {content['format']!r} is unknown; "
                f"this version reads {FORMAT}"
            )
        graph = fx.Graph()
        made: dict[str, fx.Node] = {}
        for entry in content["nodes"]:
            made[entry["name"]] = _node_from_json(graph, entry, made)
        names = tuple(str(name) for name in content["outputs"])
        _check_ends(graph, names)
        graph.lint()
        return graph, names
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        IndexError,
    ) as error:
        raise ArtifactError(f"graph.json: not a graph of format {FORMAT}: {error}") from error


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    target = op_name(node.target) if node.op == "call_function" else str(node.target)
    entry: dict[str, Any] = {"name": node.name, "op": node.op, "target": target}
    if node.args:
        entry["args"] = [_value_to_json(value) for value in node.args]
    if node.kwargs:
        entry["kwargs"] = {key: _value_to_json(value) for key, value in node.kwargs.items()}
    if "info" in node.meta:
        entry["tensor"] = _info_to_json(node.meta["info"])
    if "infos" in node.meta:
        entry["tensors"] = [_info_to_json(item) for item in node.meta["infos"]]
    if "symbol" in node.meta:
        entry["symbol"] = node.meta["symbol"]
    if "module" in node.meta:
        # The source line stays out: it is a path of the machine that captured.
        entry["module"] = [node.meta["module"].path, node.meta["module"].kind]
    return entry


def _node_from_json(graph: fx.Graph, entry: Any, made: dict[str, fx.Node]) -> fx.Node:
    op, target = entry["op"], entry["target"]
    if op == "call_function":
        target = resolve_op(target)
    elif op == "call_module" and not target.startswith(QUANTIZER_PREFIX):
        raise ValueError(f"module '{target}' is not a quantizer")
    elif op not in ("placeholder", "get_attr", "call_module", "output"):
        raise ValueError(f"opcode '{op}' is not part of the graph language")
    args = tuple(_value_from_json(value, made) for value in entry.get("args", ()))
    kwargs = {k: _value_from_json(v, made) for k, v in entry.get("kwargs", {}).items()}
    _check_spelling(op, entry["target"], args, kwargs)
    if op in ("placeholder", "get_attr", "call_module") and "tensor" not in entry:
        raise ValueError(f"'{target}' has no shape")
    node = graph.create_node(op, target, args, kwargs, name=entry["name"])
    if node.name != entry["name"]:
        raise ValueError(f"two nodes are called '{entry['name']}'")
    if "tensor" in entry:
        node.meta["info"] = _info_from_json(entry["tensor"])
    if "tensors" in entry:
        node.meta["infos"] = tuple(_info_from_json(item) for item in entry["tensors"])
    if "symbol" in entry:
        node.meta["symbol"] = entry["symbol"]
    if "module" in entry:
        node.meta["module"] = ModulePath(*entry["module"])
    return node


def _check_spelling(
    op: str, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse what is no plain name: FX writes these as they are into code that it runs."""
    if op == "placeholder" and not target.isidentifier():
        raise ValueError(f"'{target}' is no name of an input")
    if op in ("get_attr", "call_module") and not _PATH.fullmatch(target):
        raise ValueError(f"'{target}' is no name of a tensor or module")
    if not all(key.isidentifier() for key in kwargs):
        raise ValueError(f"{sorted(kwargs)} are no names of arguments")
    if op == "call_module" and (kwargs or len(args) != 1 or not isinstance(args[0], fx.Node)):
        raise ValueError(f"'{target}' takes one tensor")


def _check_ends(graph: fx.Graph, names: tuple[str, ...]) -> None:
    """Refuse a graph that does not lead from one input to one output per name."""
    kinds = [node.op for node in graph.nodes]
    if kinds.count("placeholder") != 1 or kinds.count("output") != 1 or kinds[-1] != "output":
        raise ValueError("expected one input, and one output at the end")
    outputs = graph.output_node().args[0]
    if not isinstance(outputs, tuple) or len(outputs) != len(names) or not names:
        raise ValueError(f"outputs do not match their names {list(names)}")
    if not all(isinstance(value, fx.Node) for value in outputs):
        raise ValueError("an output is no tensor")


def _info_to_json(tensor: TensorInfo) -> list[Any]:
    return [tensor.dtype, list(tensor.shape)]


def _info_from_json(entry: Any) -> TensorInfo:
    dtype, shape = entry
    if not all(isinstance(extent, (int, str)) for extent in shape):
        raise ValueError(f"not a shape: {shape!r}")
    return TensorInfo(tuple(shape), str(dtype))


def _value_to_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list):
        return [_value_to_json(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_value_to_json(item) for item in value]}
    if isinstance(value, slice):
        return {"slice": [_value_to_json(p) for p in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, type_ in _TORCH_VALUES.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    raise ArtifactError(f"cannot store an argument of type {type(value).__name__}: {value!r}")


def _value_from_json(value: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_value_from_json(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, content), *rest = value.items()
    if rest:
        raise ValueError(f"not an argument: {value!r}")
    if kind == "node":
        return made[content]
    if kind == "tuple":
        return tuple(_value_from_json(item, made) for item in content)
    if kind == "slice":
        return slice(*(_value_from_json(item, made) for item in content))
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content, None)
    if kind not in _TORCH_VALUES or not isinstance(found, _TORCH_VALUES[kind]):
        raise ValueError(f"not an argument: {value!r}")
    return found
