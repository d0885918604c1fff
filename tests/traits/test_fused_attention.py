"""Which traits of attention a fused operator can take, and which not."""

import pytest
import torch
from fused import fused_graph
from tiny import relative_error
from toys import toy_graph, toy_images

from vitcompress.export.onnx.attention import fusable_attentions


@torch.no_grad()
def test_one_query_is_fused():
    graph, found = fused_graph(toy_graph("class_attention"))

    assert found == 2
    x = toy_images(3)
    assert relative_error(graph.logits(x), toy_graph("class_attention").logits(x)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("talking_heads", "it is no softmax of scores times values"),
        ("outlook_attention", "it is no softmax of scores times values"),
        ("cosine_attention", "its scores pass through"),
        ("shifted_windows", "its scores pass through"),
        ("blocked_attention", "its operands have other than four axes"),
    ],
)
def test_other_attention_stays_as_it_is_for_a_reason(name, reason):
    found, reasons = fusable_attentions(toy_graph(name))

    assert found == []
    assert len(reasons) == 2
    assert all(text.startswith(reason) for text in reasons.values())
