"""Rotation of the residual stream and of heads; item 7 of the method's test list."""

import pytest
import torch
from families import FAMILIES, family_graph
from tiny import images, make_source, relative_error, run_pass, run_steps, tiny_vit
from zoo import ZOO, zoo_graph, zoo_images

from vitcompress.calibration.interpreter import run
from vitcompress.errors import ConfigError
from vitcompress.graph import capture, enumerate_sites
from vitcompress.graph.ops import LAYER_NORM, RMS_NORM, is_op
from vitcompress.graph.patterns import attentions
from vitcompress.graph.residual import residual_streams
from vitcompress.numerics.hadamard import random_rotation
from vitcompress.passes import Hadamard
from vitcompress.passes.hadamard import (
    HadamardConfig,
    fold_norms,
    rotate_heads,
    rotate_stream,
)
from vitcompress.recipe import Recipe

PLAIN = [
    "hf_vit",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("timm_vit", "timm_deit_distilled", "torchvision_vit", "timm_beit")
    ),
]
CLASS_ATTENTION = ["timm_cait", pytest.param("timm_volo", marks=pytest.mark.slow)]


def model(name):
    return zoo_graph(name) if name in ZOO else family_graph(name)


def rotated(graph, **settings):
    graph = graph.clone()
    report = run_pass(Hadamard(HadamardConfig(**settings)), graph, None)
    return graph, report


def generator():
    return torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def one_large_channel(vit_graph):
    """A network one channel of whose norms is twenty times the others."""
    graph, factors = vit_graph.clone(), torch.ones(32)
    factors[5] = 20.0
    for norm, linear in (
        ("blocks.0.norm2", "blocks.0.fc1"),
        ("blocks.1.norm1", "blocks.1.attn.qkv"),
        ("blocks.1.norm2", "blocks.1.fc1"),
    ):
        for name, factor in ((norm, factors), (linear, 1.0 / factors)):
            weight = graph.parameter(f"{name}.weight")
            graph.set_parameter(f"{name}.weight", weight * factor)
    return graph


def values_at(graph, site, x):
    seen = []
    run(graph, x, taps={enumerate_sites(graph)[site].value: seen.append})
    return seen[0]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_each_step_keeps_the_answers(graph, dtype, most):
    for name, value in graph.tensors().items():
        graph.set_parameter(name, value.to(dtype))
    x = images(3, seed=2).to(dtype)
    expected = graph(x)
    (stream,), refused = residual_streams(graph)

    fold_norms(graph, stream)
    graph.recompile()
    after_norms = graph(x)
    rotate_stream(graph, stream, random_rotation(32, generator()))
    graph.recompile()
    after_rotation = graph(x)
    for attention in list(attentions(graph)):
        assert rotate_heads(graph, attention, generator()) == {}
    graph.recompile()
    after_heads = graph(x)

    assert refused == {}
    for found in (after_norms, after_rotation, after_heads):
        assert found.dtype == dtype
        assert relative_error(found, expected) < most


@pytest.mark.parametrize("name", [*PLAIN, *CLASS_ATTENTION])
def test_library_models_answer_as_before(name):
    x = images(3, (ZOO.get(name) or FAMILIES[name])[1], seed=5)

    graph, report = rotated(model(name))

    assert relative_error(graph.module(x)[0], model(name).module(x)[0]) < 1e-4
    assert len(report.details["streams"]) == 1
    assert report.details["heads"]


@pytest.mark.parametrize("name", PLAIN)
def test_every_norm_of_a_plain_network_loses_its_affine(name):
    graph, report = rotated(model(name))

    assert not [n for n in graph.graph.nodes if is_op(n, LAYER_NORM)]
    norms = [n for n in graph.graph.nodes if is_op(n, RMS_NORM)]
    assert len(norms) == len(report.details["streams"][0]["norms"]) == 5
    assert all(norm.args[2] is None for norm in norms)
    assert report.skipped == {}


def test_weights_really_turn(vit_graph):
    graph, _ = rotated(vit_graph)

    for name in ("patch_embed", "blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.1.fc2"):
        before, after = (g.parameter(f"{name}.weight") for g in (vit_graph, graph))
        assert (before - after).abs().max() > 0.05
    assert not torch.equal(graph.parameter("pos_embed"), vit_graph.parameter("pos_embed"))


def test_a_channel_that_stands_out_no_longer_does(one_large_channel):
    graph, x = one_large_channel, images(8)

    turned, _ = rotated(graph)

    def peak(of):
        value = values_at(of, "blocks.1.attn.qkv:input", x)
        return value.abs().max() / value.square().mean().sqrt()

    assert peak(turned) < 0.6 * peak(graph)


def test_quantized_at_four_bits_a_rotated_network_with_such_a_channel_errs_less(
    one_large_channel,
):
    graph, x = one_large_channel, images(32, seed=6)
    rules = [{"roles": ["norm_output"], "bits": 4}]
    steps = [{"pass": "attach", "rules": rules}, {"pass": "calibrate", "method": "mse"}]
    source = make_source(images(16))

    plain = run_steps(steps, graph, source)[0]
    turned = run_steps([{"pass": "hadamard"}, *steps], graph, source)[0]

    expected = graph(x)
    error = (turned(x) - expected).square().mean()
    assert error < 0.3 * (plain(x) - expected).square().mean()


def test_the_sites_of_a_rotated_network_keep_their_roles(vit_graph):
    graph, _ = rotated(vit_graph)

    before, after = enumerate_sites(vit_graph), enumerate_sites(graph)
    assert {n: s.role for n, s in before.items()} == {n: s.role for n, s in after.items()}


# What cannot be done


def test_a_hierarchical_network_is_rotated_by_heads_alone_and_says_why():
    x = zoo_images("timm_swin", 3)

    graph, report = rotated(zoo_graph("timm_swin"))

    assert relative_error(graph.logits(x), zoo_graph("timm_swin").logits(x)) < 1e-4
    assert report.details["streams"] == []
    assert len(report.details["heads"]) == 6
    reasons = report.skipped
    assert reasons["layers.0.blocks.0.norm1"] == (
        "patch_embed.norm: layer_norm is written into the stream"
    )
    assert "reads the stream without a norm" in reasons["layers.0.blocks.0.norm2"]
    assert "is written into the stream" in reasons["layers.1.downsample.norm"]


@pytest.mark.slow
def test_a_norm_that_is_padded_before_its_linear_stays():
    _, report = rotated(zoo_graph("timm_swin_padded"))

    assert "is padded before the linear" in report.skipped["layers.0.blocks.1.norm1"]


def test_queries_behind_an_operation_of_their_own_are_not_rotated(vit_graph):
    graph = vit_graph.clone()
    scores = next(iter(attentions(graph))).scores
    query = scores.args[0]
    with graph.graph.inserting_before(scores):
        changed = graph.graph.call_function(torch.ops.aten.tanh.default, (query,))
    changed.meta = dict(query.meta)
    scores.update_arg(0, changed)
    graph.recompile()

    turned, report = rotated(graph)

    assert "lies between it and a linear" in report.skipped["blocks.0.attn: scores"]
    assert "blocks.0.attn: values" in report.details["heads"]
    assert relative_error(turned(images(2)), graph(images(2))) < 1e-4


@pytest.mark.slow
def test_normalised_queries_and_keys_are_not_rotated():
    graph, report = rotated(family_graph("timm_swinv2"))
    x = images(2)

    path = "layers.0.blocks.0.attn"
    assert "lies between it and a linear" in report.skipped[f"{path}: scores"]
    assert f"{path}: values" in report.details["heads"]
    assert relative_error(graph.logits(x), family_graph("timm_swinv2").logits(x)) < 1e-4


@pytest.mark.slow
def test_attention_over_channels_stays():
    _, report = rotated(family_graph("timm_xcit"))

    assert "blocks.0.attn: scores" in report.skipped
    assert "mixes tokens and channels" in report.skipped["blocks.0.attn: values"]


def test_a_width_without_a_hadamard_matrix_stays():
    graph = capture(tiny_vit(dim=36, depth=1), images(2))

    turned, report = rotated(graph)

    assert report.skipped["blocks.0.norm1"] == "there is no Hadamard matrix of size 36"
    assert report.skipped["blocks.0.attn: scores"] == "there is no Hadamard matrix of size 18"
    assert torch.equal(turned(images(2)), graph(images(2)))


def test_a_weight_that_two_layers_share_stays(vit_graph):
    graph = vit_graph.clone()
    for node in graph.graph.find_nodes(op="get_attr", target="blocks.1.fc2.weight"):
        keep = graph.graph.find_nodes(op="get_attr", target="blocks.0.fc2.weight")[0]
        node.replace_all_uses_with(keep)
    graph.recompile()

    turned, report = rotated(graph, heads=False)

    assert "is shared or computed" in report.skipped["blocks.0.norm1"]
    assert torch.equal(turned(images(2)), graph(images(2)))


@pytest.mark.parametrize(
    ("settings", "streams", "heads"),
    [({"heads": False}, 1, None), ({"residual": False}, None, 4)],
)
def test_each_half_can_be_left_out(vit_graph, settings, streams, heads):
    graph, report = rotated(vit_graph, **settings)

    found = [report.details.get(key) for key in ("streams", "heads")]
    assert [None if f is None else len(f) for f in found] == [streams, heads]
    assert relative_error(graph(images(2)), vit_graph(images(2))) < 1e-4


def test_leaving_out_both_is_refused():
    with pytest.raises(ConfigError, match="expected at least one to be true"):
        HadamardConfig(residual=False, heads=False)


def test_quantizers_come_later():
    rules = [{"roles": ["weight"]}]
    fields = {"schema": 1, "name": "x", "scheme": "W4A4"}
    passes = [{"pass": "attach", "rules": rules}, {"pass": "hadamard"}]

    with pytest.raises(ConfigError, match="'hadamard' cannot follow a pass that provides"):
        Recipe.from_dict({**fields, "passes": passes})
