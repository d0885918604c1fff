"""Which traits of attention a fused operator can take, and which not."""

import pytest
import torch
from fused import fused_graph
from scaffold import HEAD_DIM, HEADS, SIDE
from tiny import relative_error
from toys import toy_graph, toy_images

from vitcompress.export.onnx.attention import fusable_attentions


@pytest.mark.parametrize("name", ["class_attention", "shifted_windows", "padded_windows"])
@torch.no_grad()
def test_one_query_and_windows_are_fused(name):
    graph, found = fused_graph(toy_graph(name))

    assert found == 2
    for batch in (1, 3):
        x = toy_images(batch)
        assert relative_error(graph.logits(x), toy_graph(name).logits(x)) <= 1e-5


def test_windows_with_masks_of_their_own_count_as_heads():
    found, _ = fusable_attentions(toy_graph("shifted_windows"))

    windows = (SIDE // 2) ** 2
    for fused in found:
        assert tuple(fused.bias.shape) == (windows, HEADS, 4, 4)
        assert fused.scale == pytest.approx(HEAD_DIM**-0.5)


def test_one_of_two_spellings_is_fused_and_the_other_depends_on_the_image():
    """The second block adds products of queries with a table to the scores."""
    found, reasons = fusable_attentions(toy_graph("einsum"))

    assert len(found) == 1
    (reason,) = reasons.values()
    assert reason.startswith("it depends on ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("talking_heads", "it is no softmax of scores times values"),
        ("outlook_attention", "it is no softmax of scores times values"),
        ("cosine_attention", "is no projection of tokens"),
        ("learned_query", "is no projection of tokens"),
        ("blocked_attention", "its operands have other than four axes"),
    ],
)
def test_other_attention_stays_as_it_is_for_a_reason(name, reason):
    found, reasons = fusable_attentions(toy_graph(name))

    assert found == []
    assert len(reasons) == 2
    assert all(reason in text for text in reasons.values())
