"""All rewrites together: in order, on a copy, and checked."""

import pytest
import torch
from frozen import assert_same_function, frozen_network

from vitcompress.errors import ExportError
from vitcompress.export import rewrites
from vitcompress.export.rewrites import REWRITES, rewritten


@pytest.fixture(scope="module")
def finished():
    return frozen_network("timm_vit")


def test_each_rewrite_says_how_many_places_it_changed(finished):
    found = rewritten(finished)

    assert found.changed == {
        "linear_patches": 1,
        "separate_projections": 2,
        "keep_needed_rows": 4,
        "simplify_moves": 3,  # patches to tokens; one query to heads, and back
    }
    assert list(found.changed) == list(REWRITES)
    assert_same_function(finished, found.graph)


@pytest.mark.parametrize("name", REWRITES)
def test_each_rewrite_keeps_the_function_alone(finished, name):
    found = rewritten(finished, (name,))

    assert list(found.changed) == [name]
    assert_same_function(finished, found.graph)


def test_a_second_time_finds_nothing(finished):
    once = rewritten(finished).graph

    assert not any(rewritten(once).changed.values())


def test_the_graph_itself_is_not_changed(finished):
    nodes = [(node.name, str(node.args)) for node in finished.graph.nodes]
    tensors = dict(finished.tensors())

    rewritten(finished)

    assert [(node.name, str(node.args)) for node in finished.graph.nodes] == nodes
    assert finished.tensors().keys() == tensors.keys()
    assert all(torch.equal(finished.parameter(name), value) for name, value in tensors.items())


def wrong_by(amount):
    """Return a rewrite with a defect: the head's bias moves."""

    def rewrite(graph):
        graph.set_parameter("head.bias", graph.parameter("head.bias") + amount)
        return 1

    return rewrite


def test_a_rewrite_that_moves_the_outputs_is_a_defect_and_is_said(finished, monkeypatch):
    monkeypatch.setitem(REWRITES, "keep_needed_rows", wrong_by(0.01))

    with pytest.raises(
        ExportError, match=r"timm_vit: rewriting .* moved its outputs by .*e-0"
    ):
        rewritten(finished)


def test_a_rewrite_that_makes_outputs_nan_is_a_defect(finished, monkeypatch):
    monkeypatch.setitem(REWRITES, "keep_needed_rows", wrong_by(float("nan")))

    with pytest.raises(ExportError, match="moved its outputs by nan"):
        rewritten(finished)


def crash(graph):
    raise KeyError("head.bias")


def dangle(graph):
    """Leave a reader of a node that is gone, which only the recompilation finds."""
    graph.graph.find_nodes(op="placeholder")[0].next.target = "absent"
    return 1


@pytest.mark.parametrize(
    ("defect", "words"), [(crash, r"KeyError\('head.bias'\)"), (dangle, "absent")]
)
def test_a_rewrite_that_fails_is_a_defect_and_is_named(finished, monkeypatch, defect, words):
    monkeypatch.setitem(REWRITES, "keep_needed_rows", defect)

    with pytest.raises(
        ExportError, match=rf"timm_vit: rewrite keep_needed_rows fails on the graph: .*{words}"
    ):
        rewritten(finished)


def test_differences_of_rounding_are_none(finished, monkeypatch):
    monkeypatch.setitem(REWRITES, "keep_needed_rows", wrong_by(1e-6))

    assert rewritten(finished).changed["keep_needed_rows"] == 1
    assert rewrites.FUNCTION_TOLERANCE == 1e-4
