"""Norms, scales, gates and convolutions: what is folded, what stays, what it is called."""

import pytest
import torch
from scaffold import DIM
from toys import operations, roles, toy, toy_graph, toy_model, toy_sites

from vitcompress.graph import Role, enumerate_sites
from vitcompress.graph.edit import is_quantizer

BLOCKS = ("blocks.0", "blocks.1")


def calls(graph, name):
    return [n for n in graph.nodes_of_kind("call_function") if f".{name}." in str(n.target)]


def scales(name):
    """Return the products with a stored tensor."""
    return [
        node
        for node in calls(toy_graph(name), "mul")
        if any(source.op == "get_attr" for source in node.all_input_nodes)
    ]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# LayerScale


def test_layer_scales_join_the_rows_of_the_layers_in_front():
    graph, block = toy_graph("layer_scale"), toy("layer_scale").blocks[0]

    gamma = block.gamma1.detach()

    close(graph.parameter("blocks.0.proj.weight"), gamma[:, None] * block.proj.weight)
    close(graph.parameter("blocks.0.proj.bias"), gamma * block.proj.bias)
    close(graph.parameter("blocks.0.fc2.weight"), block.gamma2[:, None] * block.fc2.weight)


def test_a_layer_scale_stays_where_something_else_reads_the_layer():
    graph, block = toy_graph("layer_scale"), toy("layer_scale").blocks[1]

    kept = {str(n.target) for node in scales("layer_scale") for n in node.all_input_nodes}

    assert {name for name in kept if "gamma" in name} == {"blocks.1.gamma1", "blocks.1.gamma2"}
    assert torch.equal(graph.parameter("blocks.1.fc.weight"), block.fc.weight)


def test_a_layer_scale_of_a_map_joins_the_pointwise_convolution():
    block = toy("map_layer_scale").blocks[0]

    weight = toy_graph("map_layer_scale").parameter("blocks.0.reduce.weight")

    close(weight, block.gamma[..., None] * block.reduce.weight)


def test_a_layer_scale_behind_a_pool_has_no_layer_to_join():
    (kept,) = scales("map_layer_scale")

    assert "blocks.1.gamma" in {str(source.target) for source in kept.all_input_nodes}


# Batch norms


def test_a_batch_norm_behind_the_rows_of_a_linear_is_folded():
    graph = toy_graph("norm_behind_linear")

    assert not [name for name in operations("norm_behind_linear") if "batch_norm" in name]
    for path, block in zip(BLOCKS, toy("norm_behind_linear").blocks, strict=True):
        factor = block.bn.weight / (block.bn.running_var + block.bn.eps).sqrt()
        shift = block.bn.bias - block.bn.running_mean * factor
        close(graph.parameter(f"{path}.linear.weight"), factor[:, None] * block.linear.weight)
        close(graph.parameter(f"{path}.linear.bias"), shift)


def test_a_batch_norm_in_front_joins_the_columns_of_every_reader():
    graph = toy_graph("norm_before_layers")

    assert not [name for name in operations("norm_before_layers") if "batch_norm" in name]
    for path, block in zip(BLOCKS, toy("norm_before_layers").blocks, strict=True):
        factor = block.bn.weight / (block.bn.running_var + block.bn.eps).sqrt()
        shift = block.bn.bias - block.bn.running_mean * factor
        close(graph.parameter(f"{path}.linear.weight"), factor * block.linear.weight)
        close(graph.parameter(f"{path}.linear.bias"), block.linear.weight @ shift)
        # Each of three groups of rows reads eight channels.
        own = factor.reshape(3, 1, 8).expand(3, 8, 8).reshape(DIM, 8, 1, 1)
        close(graph.parameter(f"{path}.conv.weight"), own * block.conv.weight)


def test_a_batch_norm_stays_in_front_of_padding_and_where_a_sum_reads_it():
    graph = toy_graph("kept_norms")

    assert operations("kept_norms").count("_native_batch_norm_legit_no_training") == 2
    for path, block in zip(BLOCKS, toy("kept_norms").blocks, strict=True):
        assert torch.equal(graph.parameter(f"{path}.conv.weight"), block.conv.weight)


# Convolutions


def test_a_standardised_weight_is_stored_as_it_runs():
    sites = toy_sites("standardised_conv")

    assert not [name for name in operations("standardised_conv") if "batch_norm" in name]
    for path, block in zip(BLOCKS, toy("standardised_conv").blocks, strict=True):
        site = sites[f"{path}:weight"]
        stored = toy_graph("standardised_conv").parameter(str(site.value.target))
        close(stored, block.standardised())
        assert site.role is Role.WEIGHT
        # Without its gain each row has mean 0 and the deviation of unit rows.
        rows = (stored / block.gain[:, None, None, None]).flatten(1)
        assert rows.mean(dim=1).abs().max() < 1e-5


def test_a_standardised_weight_is_quantized_once():
    sites = enumerate_sites(toy_model("standardised_conv").graph)

    quantizers = [site.quantizer for site in sites.values() if site.role is Role.WEIGHT]

    assert len(quantizers) == len(set(quantizers)) == 4
    assert None not in quantizers


def test_separable_attention_is_convolutions_and_gates():
    sites = toy_sites("separable_attention")

    assert "matmul" not in operations("separable_attention")
    assert operations("separable_attention").count("softmax") == 2
    blocks = {name: site for name, site in sites.items() if name.startswith("blocks")}
    assert {site.operation for site in blocks.values()} == {"conv2d"}
    for path in BLOCKS:
        assert blocks[f"{path}.qkv:input"].role is Role.OTHER
        assert blocks[f"{path}.out:input"].role is Role.ACT_OUTPUT


def test_pooling_minus_identity_stays_float():
    graph = toy_model("map_layer_scale").graph

    (difference,) = calls(graph, "sub")

    pooled, same = difference.all_input_nodes
    assert ".avg_pool2d." in str(pooled.target)
    assert pooled.args[0] is same
    assert not is_quantizer(same)


def test_a_gated_convolution_joins_its_parts_in_front_of_the_last_linear():
    found = roles("gated_conv")

    assert set(operations("gated_conv")).isdisjoint({"matmul", "softmax"})
    for path in BLOCKS:
        assert found[f"{path}.fc1:input"] is Role.NORM_OUTPUT
        assert found[f"{path}.conv:input"] is Role.OTHER
        assert found[f"{path}.fc2:input"] is Role.ACT_OUTPUT


# Gates, activations, heads


@pytest.mark.parametrize("path", BLOCKS)
@pytest.mark.parametrize("name", ["gated_mlp", "composed_activations"])
def test_what_a_gate_or_a_composed_activation_gives_is_an_activation(name, path):
    assert roles(name)[f"{path}.fc1:input"] is Role.NORM_OUTPUT
    assert roles(name)[f"{path}.fc2:input"] is Role.ACT_OUTPUT


def test_both_heads_of_a_mean_are_heads():
    found = [name for name, role in roles("stored_product").items() if role is Role.HEAD_INPUT]

    assert found == ["head:input", "head_dist:input"]


def test_both_heads_of_a_mean_are_quantized_on_one_value():
    sites = enumerate_sites(toy_model("stored_product").graph)

    shared = {sites[f"{head}:input"].quantizer for head in ("head", "head_dist")}

    assert len(shared) == 1
    assert shared != {None}
