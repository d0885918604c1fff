"""Which channels of a linear belong to which head, by hand."""

import pytest
import torch
from zoo import zoo_graph

from vitcompress.graph.heads import heads_of_operand, heads_of_output
from vitcompress.graph.metadata import module_path
from vitcompress.graph.patterns import attentions
from vitcompress.graph.residual import residual_streams


def first_attention(graph):
    return next(iter(attentions(graph)))


def channels(heads, size, first=0):
    return torch.arange(first, first + heads * size).reshape(heads, size)


@pytest.mark.parametrize(("index", "axis", "first"), [(0, -1, 0), (1, -2, 32)])
def test_queries_and_keys_of_one_linear_lie_one_behind_the_other(
    vit_graph, index, axis, first
):
    found = heads_of_operand(first_attention(vit_graph).scores, index, axis)

    assert torch.equal(found.channels, channels(2, 16, first))
    assert module_path(found.linear).path == "blocks.0.attn.qkv"


def test_values_come_last_and_are_read_in_the_order_of_heads(vit_graph):
    attention = first_attention(vit_graph)

    values = heads_of_operand(attention.output, 1, -1)
    readers = heads_of_output(attention.output)

    assert torch.equal(values.channels, channels(2, 16, 64))
    assert torch.equal(readers.channels, channels(2, 16))
    assert module_path(readers.linear).path == "blocks.0.attn.proj"


def test_linears_of_their_own_begin_at_zero():
    attention = first_attention(zoo_graph("hf_vit"))

    query = heads_of_operand(attention.scores, 0, -1)
    key = heads_of_operand(attention.scores, 1, -2)

    assert torch.equal(query.channels, channels(2, 16))
    assert torch.equal(key.channels, channels(2, 16))
    assert query.linear is not key.linear


def test_windows_do_not_matter():
    attention = first_attention(zoo_graph("timm_swin"))

    assert torch.equal(heads_of_operand(attention.output, 1, -1).channels, channels(2, 12, 48))


def test_what_is_in_the_way_is_named(vit_graph):
    attention = first_attention(vit_graph.clone())
    linear = heads_of_output(attention.output).linear
    read = linear.args[0]
    with linear.graph.inserting_before(linear):
        between = linear.graph.call_function(torch.ops.aten.hardswish.default, (read,))
    between.meta = dict(read.meta)
    linear.update_arg(0, between)

    reason = heads_of_output(attention.output)

    assert reason.startswith("hardswish")
    assert reason.endswith("lies between it and a linear")


def test_a_query_with_a_second_reader_is_left_alone(vit_graph):
    graph = vit_graph.clone()
    attention = first_attention(graph)
    query = attention.scores.args[0]
    with graph.graph.inserting_after(attention.scores):
        graph.graph.call_function(attention.scores.target, (query, attention.scores.args[1]))

    reason = heads_of_operand(attention.scores, 0, -1)

    assert reason.endswith("has other readers")


def test_the_stream_of_a_plain_network_is_found_whole(vit_graph):
    (stream,), refused = residual_streams(vit_graph)

    writers = {module_path(node).path for node in stream.writers}
    assert stream.channels == 32
    assert writers == {
        "patch_embed",
        *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.proj", "fc2")),
    }
    assert {str(node.target) for node in stream.constants} == {"cls_token", "pos_embed"}
    assert [module_path(group.norm).path for group in stream.norms] == [
        "blocks.0.norm1",
        "blocks.0.norm2",
        "blocks.1.norm1",
        "blocks.1.norm2",
        "norm",
    ]
    assert refused == {}
