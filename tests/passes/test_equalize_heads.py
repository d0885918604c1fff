"""Equal ranges for the channels of queries, keys and values, at the same answers."""

import pytest
import torch
from families import FAMILIES, family_graph
from tiny import images, make_source, relative_error, run_pass
from zoo import ZOO, zoo_graph, zoo_images

from vitcompress.calibration.interpreter import run
from vitcompress.errors import ConfigError
from vitcompress.graph import enumerate_sites
from vitcompress.graph.patterns import attentions
from vitcompress.passes import EqualizeHeads
from vitcompress.passes.equalize_heads import EqualizeHeadsConfig, centres_and_widths


def equalized(graph, source=None, **settings):
    graph = graph.clone()
    source = source or make_source(images(8, seed=5))
    return graph, run_pass(EqualizeHeads(EqualizeHeadsConfig(**settings)), graph, source)


def operand(graph, site, x):
    seen = []
    run(graph, x, taps={enumerate_sites(graph)[site].value: seen.append})
    return seen[0]


@pytest.fixture(scope="module")
def uneven(vit_graph):
    """A network with channels of queries, keys and values that differ many times."""
    graph = vit_graph.clone()
    factors = torch.logspace(-0.5, 0.5, 96)[torch.randperm(96, generator=seeded(1))]
    for block in ("blocks.0", "blocks.1"):
        weight = graph.parameter(f"{block}.attn.qkv.weight")
        graph.set_parameter(f"{block}.attn.qkv.weight", weight * factors[:, None])
        bias = graph.parameter(f"{block}.attn.qkv.bias")
        graph.set_parameter(f"{block}.attn.qkv.bias", bias + 2.0 * factors)
    return graph


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# Ranges


def test_ranges_are_of_each_channel_of_each_head():
    values = torch.zeros(2, 3, 50, 4)  # images, heads, tokens, dimensions
    values[:, 1, :, 2] = torch.linspace(-1.0, 5.0, 50)

    centres, widths = centres_and_widths(values, tail=0.0)

    assert centres.shape == widths.shape == (3, 4)
    assert (float(centres[1, 2]), float(widths[1, 2])) == (2.0, 6.0)
    assert int((widths == 1.0).sum()) == 11  # constant channels are left as they are


# The answers


@pytest.mark.parametrize("name", ["hf_vit", "timm_swin", "torchvision_vit", "timm_cait"])
def test_library_models_answer_as_before(name):
    graph = zoo_graph(name) if name in ZOO else family_graph(name)
    x = zoo_images(name) if name in ZOO else FAMILIES[name].images()

    changed, report = equalized(graph, make_source(x))

    assert report.changed > 0
    assert relative_error(changed.logits(x), graph.logits(x)) < 1e-4


def test_uneven_heads_answer_as_before(uneven):
    x = images(4, seed=9)

    changed, report = equalized(uneven)

    assert (report.changed, report.skipped) == (4, {})
    assert relative_error(changed.logits(x), uneven.logits(x)) < 1e-5


# The operands


def test_values_get_one_width_and_lie_around_zero(uneven):
    x = images(8, seed=5)
    changed, _ = equalized(uneven, tail=0.0)

    centres, widths = centres_and_widths(operand(changed, "blocks.0.attn:value", x), 0.0)

    assert float(widths.max() / widths.min()) == pytest.approx(1.0, abs=1e-3)
    assert float(centres.abs().max() / widths.max()) < 1e-3


def test_queries_and_keys_share_what_differs(uneven):
    x = images(8, seed=5)
    changed, _ = equalized(uneven, tail=0.0)

    _, query = centres_and_widths(operand(changed, "blocks.0.attn:query", x), 0.0)
    key_values = operand(changed, "blocks.0.attn:key", x).transpose(-1, -2)
    centres, key = centres_and_widths(key_values, 0.0)

    assert torch.allclose(query, key, rtol=1e-3)
    assert float(centres.abs().max() / key.max()) < 1e-3


def test_what_is_read_as_it_is_by_others_is_left_alone(uneven):
    graph = uneven.clone()
    attention = next(iter(attentions(graph)))
    query, key = attention.scores.args
    with graph.graph.inserting_after(attention.scores):
        graph.graph.call_function(attention.scores.target, (query, key))

    _, report = equalized(graph)

    (reason,) = report.skipped.values()
    assert reason.endswith("has other readers")
    assert report.changed == 3


@pytest.mark.parametrize("settings", [{"tail": 0.5}, {"tail": -0.1}, {"images": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EqualizeHeadsConfig(**settings)
