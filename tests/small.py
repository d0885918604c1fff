"""Small models for tests of the graph: one formula with the tensors it reads."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from tiny import enliven, relative_error
from torch import Tensor, nn

from vitcompress.calibration.interpreter import run
from vitcompress.graph import CapturedGraph, capture
from vitcompress.graph.metadata import info

#: Extents that differ, so that a wrong axis shows.
SHAPE = (4, 6, 10)


class Formula(nn.Module):
    """Computes ``formula(self, x)``; modules, parameters and buffers are its attributes."""

    def __init__(self, formula: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.formula = formula
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif part.is_floating_point():
                self.register_parameter(name, nn.Parameter(part))
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


class Case(NamedTuple):
    """A function, and the graph that was made of it."""

    model: Callable[[Tensor], Tensor]
    graph: CapturedGraph


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return noise(batch, *shape, seed=batch)


def written(
    formula: Callable[..., Any], shape: tuple[int, ...] = SHAPE, **parts: nn.Module | Tensor
) -> tuple[nn.Module, CapturedGraph]:
    """Return a formula as a model, and captured."""
    model = enliven(Formula(formula, **parts))
    return model, capture(model, inputs(2, shape))


def written_together(
    formulas: Mapping[str, Callable[..., Tensor]],
    shape: tuple[int, ...] = SHAPE,
    **parts: nn.Module | Tensor,
) -> dict[str, Case]:
    """Return formulas over the same parts, captured as one model and then cut apart.

    Tracing takes most of the time of a small test, whatever the size of the model.
    """
    model, whole = written(
        lambda self, x: {name: formula(self, x) for name, formula in formulas.items()},
        shape,
        **parts,
    )
    cases = {}
    for index, name in enumerate(whole.output_names):
        graph = whole.clone()
        graph.output_node.args = ((graph.output_node.args[0][index],),)
        graph.output_names = ("",)
        graph.recompile()
        cases[name] = Case(partial(formulas[name], model), graph)
    return cases


@torch.no_grad()
def assert_same_function(
    model: Callable[[Tensor], Tensor], graph: CapturedGraph, batches: tuple[int, ...] = (1, 3)
) -> None:
    for batch in batches:
        x = inputs(batch, graph.input_shape)
        expected = model(x)
        assert graph(x).shape == expected.shape
        assert relative_error(graph(x), expected) <= 1e-5, f"at batch {batch}"


def assert_shapes_are_recorded(graph: CapturedGraph, batch: int = 3) -> None:
    """Compare the shape in each node's metadata with the one that it has when run."""
    known = [node for node in graph.nodes_of_kind("call_function") if "info" in node.meta]
    found: dict[str, tuple[int, ...]] = {}
    taps = {
        node: lambda value, name=node.name: found.update({name: tuple(value.shape)})
        for node in known
    }

    run(graph, inputs(batch, graph.input_shape), taps=taps)

    expected = {
        node.name: tuple(
            eval(extent, {"B": batch}) if isinstance(extent, str) else extent
            for extent in info(node).shape
        )
        for node in known
    }
    assert found == expected


def operations(graph: CapturedGraph) -> list[str]:
    """Return the short name of each operation, in graph order."""
    return [
        str(node.target).split(".")[1] if "." in str(node.target) else node.name
        for node in graph.nodes_of_kind("call_function")
    ]


def called(graph: CapturedGraph, operation: str) -> list[torch.fx.Node]:
    """Return the calls of an operation."""
    return [
        node
        for node in graph.nodes_of_kind("call_function")
        if str(node.target).split(".")[1:2] == [operation]
    ]
