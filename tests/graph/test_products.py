"""Products of tensors: one spelling, the same function, and shapes recorded as they are."""

from functools import partial

import pytest
import torch
from small import (
    assert_same_function,
    assert_shapes_are_recorded,
    called,
    noise,
    operations,
    written,
    written_together,
)
from torch import fx

from vitcompress.graph import enumerate_sites, unlisted_products
from vitcompress.graph.captured import CapturedGraph, Provenance
from vitcompress.graph.constants import fold_constants
from vitcompress.graph.metadata import TensorInfo, info, set_info
from vitcompress.graph.products import spell_products, spell_stored_products

aten = torch.ops.aten

FLAT = (1, 1, 120)


def operand(x, shape, first=True):
    """Return ``[B, *shape]`` of the first or last values of each image."""
    count = torch.Size(shape).numel()
    values = x.flatten(1)[:, :count] if first else x.flatten(1)[:, -count:]
    return values.reshape(-1, *shape)


def einsum(equation, *shapes, stored=None):
    """Return a graph of one einsum, and the same with its products spelled out.

    Operands are ``[B, *shape]``; one may be a stored table instead. Drawn by hand: tracing
    this many would take most of the time.
    """
    graph = fx.Graph()
    images = graph.placeholder("images")
    images.meta["info"] = TensorInfo(("B", *FLAT), "float32")
    tensors = {"table": noise(*shapes[stored])} if stored is not None else {}

    def call(target, arguments, shape):
        node = graph.call_function(target, arguments)
        node.meta["info"] = TensorInfo(shape, "float32")
        return node

    operands, values = [], []
    flat = call(aten.flatten.using_ints, (images, 1), ("B", 120))
    for position, shape in enumerate(shapes):
        if position == stored:
            operands.append(graph.get_attr("table"))
            set_info(operands[-1], tensors["table"])
            values.append(tensors["table"])
            continue
        count = torch.Size(shape).numel()
        ends = (0, count) if position == 0 else (120 - count, 120)
        part = call(aten.slice.Tensor, (flat, 1, *ends), ("B", count))
        operands.append(call(aten.reshape.default, (part, [-1, *shape]), ("B", *shape)))
        values.append(torch.zeros(7, *shape))
    result = torch.einsum(equation, *values).shape
    shape = tuple("B" if extent == 7 else extent for extent in result)
    graph.output((call(aten.einsum.default, (equation, operands), shape),))
    before = CapturedGraph.build(graph, tensors, ("",), Provenance("drawn", {}))
    after = before.clone()
    spell_products(after)
    fold_constants(after)
    spell_stored_products(after)
    after.recompile()
    return before, after


# einsum


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bij,bjk->bik", (3, 4), (4, 5)),
        (" b i j , b j k -> b i k ", (3, 4), (4, 5)),
        # Operands and result in other orders.
        ("bhnd,bhmd->bhnm", (2, 3, 4), (2, 5, 4)),
        ("bji,bkj->bki", (4, 3), (5, 4)),
        ("bdhn,bmdh->bnhm", (4, 2, 3), (5, 4, 2)),
        # Several batch letters.
        ("bghid,bghjd->bghij", (2, 3, 4, 2), (2, 3, 5, 2)),
        # A batch letter of one operand alone.
        ("bhnd,bmd->bhnm", (2, 3, 4), (5, 4)),
        ("bnd,bhmd->bhnm", (3, 4), (2, 5, 4)),
        ("bnd,bhmd->bnmh", (3, 4), (2, 5, 4)),
        # No row, no column, neither.
        ("bd,bnd->bn", (4,), (5, 4)),
        ("bnd,bd->bn", (5, 4), (4,)),
        ("bnd,bnd->nb", (5, 4), (5, 4)),
        # An extent of 1 is repeated.
        ("bhij,bhjk->bhik", (1, 3, 4), (2, 4, 5)),
        ("bhij,bhjk->bhik", (2, 3, 4), (1, 4, 5)),
    ],
)
def test_an_einsum_of_two_activations_becomes_a_matmul(equation, left, right):
    model, graph = einsum(equation, left, right)

    assert "einsum" not in operations(graph)
    assert len(called(graph, "matmul")) == 1
    assert unlisted_products(graph) == {}
    assert_same_function(model, graph)
    assert_shapes_are_recorded(graph)


@pytest.mark.parametrize(
    ("equation", "left", "right", "stored"),
    [
        ("bhwc,hkc->bhwk", (3, 5, 4), (3, 2, 4), 1),
        ("bhwc,wkc->bhwk", (3, 5, 4), (5, 2, 4), 1),
        ("nd,bdm->bnm", (3, 4), (4, 5), 0),
        ("nd,bd->bn", (3, 4), (4,), 0),
    ],
)
def test_an_einsum_with_a_stored_table_becomes_a_matmul(equation, left, right, stored):
    model, graph = einsum(equation, left, right, stored=stored)

    assert "einsum" not in operations(graph)
    assert len(called(graph, "matmul")) == 1
    assert_same_function(model, graph)
    assert_shapes_are_recorded(graph)


@pytest.mark.parametrize("equation", ["bnd,dk->bnk", "bnd,kd->bnk"])
def test_an_einsum_with_a_stored_matrix_becomes_a_linear(equation):
    shape = (4, 5) if "dk" in equation else (5, 4)

    model, graph = einsum(equation, (3, 4), shape, stored=1)

    assert operations(graph)[-1] == "linear"
    assert list(enumerate_sites(graph)) == [":input", ":weight"]
    assert_same_function(model, graph)
    assert_shapes_are_recorded(graph)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bi,bj->bij", [(3,), (4,)]),
        ("bijk,bjk->bi", [(3, 4, 5), (4, 5)]),
        ("biij,bj->bi", [(3, 3, 4), (4,)]),
        ("bi,bij,bj->b", [(3,), (3, 4), (4,)]),
        ("bijq,bjk->bik", [(3, 4, 2), (4, 5)]),
        ("bij,bjk", [(3, 4), (4, 5)]),
        ("bij->bji", [(3, 4)]),
        ("b...j,bjk->b...k", [(3, 4), (4, 5)]),
        # The summed axis is repeated, which a product of matrices does not do.
        ("bij,bjk->bik", [(3, 1), (4, 5)]),
    ],
    ids=[
        "outer",
        "two summed",
        "diagonal",
        "three operands",
        "summed in one operand",
        "implicit",
        "one operand",
        "ellipsis",
        "summed over a repeated axis",
    ],
)
def test_an_einsum_of_another_kind_stays_and_is_listed(equation, shapes):
    model, graph = einsum(equation, *shapes)

    assert len(called(graph, "einsum")) == 1
    assert list(unlisted_products(graph).values()) == [
        "aten.einsum.default is not recognised as a site"
    ]
    assert_same_function(model, graph)


# bmm, addmm, baddbmm


def test_bmm_becomes_a_matmul():
    model, graph = written(
        lambda self, x: torch.bmm(operand(x, (3, 4)), operand(x, (4, 5), False)), FLAT
    )

    assert [str(n.target) for n in called(graph, "matmul")] == ["aten.matmul.default"]
    assert_same_function(model, graph)


def test_addmm_with_a_stored_matrix_becomes_a_linear_and_a_sum():
    model, graph = written(
        lambda self, x: torch.addmm(self.bias, operand(x, (4,)), self.table),
        FLAT,
        bias=noise(5),
        table=noise(4, 5, seed=1),
    )

    assert operations(graph)[-2:] == ["linear", "add"]
    assert graph.parameter("table").shape == (5, 4)
    assert_same_function(model, graph)
    assert_shapes_are_recorded(graph)


def test_baddbmm_becomes_a_matmul_and_a_sum():
    model, graph = written(
        lambda self, x: torch.baddbmm(
            operand(x, (3, 5)), operand(x, (3, 4)), operand(x, (4, 5), False)
        ),
        FLAT,
    )

    assert operations(graph)[-2:] == ["matmul", "add"]
    assert_same_function(model, graph)
    assert_shapes_are_recorded(graph)


WEIGHTED = {
    "alpha": {"alpha": 0.5},
    "beta": {"beta": 0.5},
    "both": {"beta": 0, "alpha": 2},
}


@pytest.fixture(scope="module")
def weighted():
    def formula(self, x, factors):
        left, right = operand(x, (3, 4)), operand(x, (4, 5), False)
        return torch.baddbmm(operand(x, (3, 5)), left, right, **factors)

    return written_together(
        {name: partial(formula, factors=factors) for name, factors in WEIGHTED.items()}, FLAT
    )


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weighted_sum_stays_and_is_listed(name, weighted):
    model, graph = weighted[name]

    assert "matmul" not in operations(graph)
    assert list(unlisted_products(graph).values()) == [
        "aten.baddbmm.default is not recognised as a site"
    ]
    assert_same_function(model, graph)


def test_factors_of_1_are_none():
    _, graph = written(
        lambda self, x: torch.addmm(
            self.bias, operand(x, (4,)), self.table, beta=1.0, alpha=1.0
        ),
        FLAT,
        bias=noise(5),
        table=noise(4, 5),
    )

    assert operations(graph)[-2:] == ["linear", "add"]


# Stored matrices


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5)])
def test_a_product_with_a_stored_matrix_becomes_a_linear(shape):
    model, graph = written(
        lambda self, x: operand(x, (3, 4)) @ self.table, FLAT, table=noise(*shape)
    )

    (linear,) = called(graph, "linear")
    assert "matmul" not in operations(graph)
    assert info(linear).shape == ("B", 3, 5)
    torch.testing.assert_close(graph.parameter("table"), model.table.reshape(4, 5).T)
    assert_same_function(model, graph)
    assert_shapes_are_recorded(graph)


STORED = {
    "left operand": lambda self, x: self.left @ operand(x, (4, 3)),
    "several matrices": lambda self, x: operand(x, (2, 3, 4)) @ self.several,
    "vector": lambda self, x: operand(x, (3, 4)) @ self.vector,
    # The result has an axis that a linear would not give it.
    "more axes than the input": lambda self, x: operand(x, (4,)) @ self.several[:1],
}


@pytest.fixture(scope="module")
def stored():
    parts = {"left": noise(5, 4), "several": noise(2, 4, 5), "vector": noise(4)}
    return written_together(STORED, FLAT, **parts)


@pytest.mark.parametrize("name", STORED)
def test_any_other_stored_operand_stays_in_a_matmul(name, stored):
    model, graph = stored[name]

    assert len(called(graph, "matmul")) == 1
    assert "linear" not in operations(graph)
    assert_same_function(model, graph, (2, 3))
    assert_shapes_are_recorded(graph)


def test_a_stored_matrix_that_serves_twice_serves_both_linears():
    def formula(self, x):
        y = operand(x, (3, 4)) @ self.table
        return torch.relu(y) @ self.table * self.table.sum()

    model, graph = written(formula, FLAT, table=noise(4, 4))

    assert len(called(graph, "linear")) == 2
    assert_same_function(model, graph)
