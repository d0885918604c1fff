"""Capture a model with ``torch.export`` and bring it into normal form.

Non-strict export keeps parameter names and module ancestry, makes the batch dynamic, and sees
through library classes; decomposing with a table of one entry (attention) keeps ``linear``,
``layer_norm`` and ``gelu`` whole, which are the units that compression methods speak of.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from importlib import metadata

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from vitcompress.errors import InputError, UnsupportedModelError
from vitcompress.graph.captured import CapturedGraph, Provenance
from vitcompress.graph.metadata import translate_metadata
from vitcompress.graph.normalize import DECOMPOSITIONS, normalize
from vitcompress.graph.refusals import refuse_foreign_operators

__all__ = ["capture"]


def capture(model: nn.Module, images: Tensor, *, model_id: str = "") -> CapturedGraph:
    """Return ``model`` as a normalised graph that computes the same function.

    Args:
        model: Any module that maps one batch of images to tensors; used in evaluation mode.
        images: Example batch, ``[B, C, H, W]`` float32 with B >= 2; only its shape matters.
        model_id: What to call the model in messages and files; its class name by default.

    Returns:
        A graph with a dynamic batch and a fixed image size. The model is left as it was.

    Raises:
        InputError: The weights hold values that are not finite.
        UnsupportedModelError: The exporter cannot trace the model, it takes several inputs, or
            it uses operators that could not be compressed.
    """
    name = model_id or type(model).__name__
    _check_weights(model, name)
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        program = _export(model, images, name)
    finally:
        for child, training in was_training.items():
            child.training = training
    module = program.module(check_guards=False)
    graph = module.graph
    placeholder = _only_input(graph, name)
    symbol = str(placeholder.meta["val"].shape[0])
    for node in graph.nodes:
        translate_metadata(node, symbol)
    refuse_foreign_operators(graph, name)
    output = graph.output_node()
    outputs = pytree.tree_leaves(output.args[0])
    keep = [index for index, value in enumerate(outputs) if isinstance(value, fx.Node)]
    names = _output_names(program)
    output.args = (tuple(outputs[index] for index in keep),)
    graph.set_codegen(fx.graph.CodeGen())
    tensors = {
        str(node.target): _attribute(module, str(node.target)).detach()
        for node in graph.find_nodes(op="get_attr")
    }
    captured = CapturedGraph.build(
        graph, tensors, tuple(names[index] for index in keep), Provenance(name, _versions())
    )
    normalize(captured)
    captured.check()
    return captured


def _check_weights(model: nn.Module, name: str) -> None:
    broken = [
        key
        for key, value in model.state_dict().items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if broken:
        shown = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
        raise InputError(
            f"{name}: {len(broken)} tensors hold NaN or infinite values: {shown}; "
            "the checkpoint is damaged or training diverged"
        )


def _export(model: nn.Module, images: Tensor, name: str) -> ExportedProgram:
    if images.shape[0] < 2:
        images = images.repeat(2, *[1] * (images.dim() - 1))
    dynamic = ({0: Dim.DYNAMIC},)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(
                model, (images,), dynamic_shapes=dynamic, strict=False
            )
            decomposed: ExportedProgram = program.run_decompositions(DECOMPOSITIONS)
            return decomposed
    except UnsupportedModelError as error:
        # The exporter appends its own frames to the message.
        raise UnsupportedModelError(f"{name}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # the exporter raises many types, none of them public
        raise UnsupportedModelError(f"{name}: {_explain(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the terminal what the exporter prints and warns besides its exception.

    It warns of models that cache tensors when they run. Those become constants of the graph,
    and the exporter takes them off the model again.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _explain(error: Exception) -> str:
    """Return the exporter's first line, the user's source line, and the usual cure."""
    text = str(error)
    first = next(
        (line.strip() for line in text.splitlines() if line.strip()), type(error).__name__
    )
    frames = re.findall(r'File "([^"]+)", line (\d+)', text)
    where = f" at {frames[-1][0]}:{frames[-1][1]}" if frames else ""
    return (
        f"torch.export cannot trace it{where}: {first}. Usual cures: replace branches on "
        "tensor values by torch.where, pass one image tensor, and fix the image size"
    )


def _only_input(graph: fx.Graph, name: str) -> fx.Node:
    placeholders: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    if len(placeholders) != 1:
        raise UnsupportedModelError(
            f"{name}: expected one image input, found {[n.name for n in placeholders]}"
        )
    return placeholders[0]


def _output_names(program: ExportedProgram) -> list[str]:
    """Return a flat name for each output: ``logits``, ``hidden_states.3``, ``""`` if bare."""
    spec = program.call_spec.out_spec
    assert spec is not None
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths, _ = pytree.tree_flatten_with_path(tree)
    names = []
    for path, _ in paths:
        keys = [
            getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path
        ]
        names.append(".".join(str(key) for key in keys))
    return names


def _attribute(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    value = getattr(module.get_submodule(path), leaf)
    assert isinstance(value, Tensor)
    return value


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for library in ("vitcompress", "timm", "torchvision", "transformers"):
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found
