"""What holds for every toy, whatever its trait."""

import copy

import pytest
import torch
from tiny import float_outputs, relative_error
from torch import nn
from toys import TOYS, folded, toy, toy_graph, toy_images, toy_model

import vitcompress
from vitcompress.graph import enumerate_sites


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", TOYS)
@torch.no_grad()
def test_captured_equals_eager(name, batch):
    x = toy_images(batch)
    expected = toy(name)(x)

    found = toy_graph(name)(x)

    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", TOYS)
@torch.no_grad()
def test_every_block_shows_in_the_logits(name, index):
    """A toy whose blocks say nothing would pass everything below."""
    x = toy_images(3)
    expected = toy(name)(x)
    lacking = copy.deepcopy(toy(name))
    lacking.blocks[index] = nn.Identity()

    found = lacking(x)

    assert expected.std(dim=0).mean() > 0.05
    assert relative_error(found, expected) > 0.05


@pytest.mark.parametrize("name", sorted(TOYS))
def test_eight_bits_keep_the_logits(name):
    (evaluation,) = toy_model(name).report.evaluations

    assert evaluation.logits_sqnr_db >= 20.0


@pytest.mark.parametrize("name", TOYS)
def test_a_saved_model_answers_with_the_same_bits(name, tmp_path):
    x = toy_images(3)
    toy_model(name).save(tmp_path / "artefact")

    loaded = vitcompress.load(tmp_path / "artefact")

    assert torch.equal(loaded(x), toy_model(name)(x))


#: Windows, mixed heads, linear attention, convolutions; the others are slow.
EXPORTED_FIRST = frozenset(
    {
        "padded_windows",
        "separable_attention",
        "shifted_windows",
        "standardised_conv",
        "talking_heads",
    }
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in EXPORTED_FIRST else pytest.mark.slow)
        for name in sorted(TOYS)
    ],
)
def test_the_exported_file_is_verified_and_every_linear_runs_as_integers(name, export):
    found = export(name).verification

    assert found.cosine > 0.999
    assert found.integer_linears == found.linears > 0


@pytest.mark.parametrize("name", TOYS)
@torch.no_grad()
def test_folding_quantizers_into_norms_keeps_the_function(name):
    x = toy_images(3)
    expected = toy(name)(x)

    graph, _ = folded(name)

    # A fold moves values between a norm and its readers, which costs some digits.
    assert relative_error(float_outputs(graph, x), expected) <= 1e-4


@pytest.mark.parametrize("name", TOYS)
def test_every_quantized_activation_depends_on_the_image(name):
    graph = toy_model(name).graph
    reached = {graph.input_node}
    for node in graph.graph.nodes:
        if reached.intersection(node.all_input_nodes):
            reached.add(node)

    sites = [site for site in enumerate_sites(graph).values() if not site.stored]

    assert sites
    assert all(site.value in reached for site in sites)


@pytest.mark.parametrize("name", TOYS)
def test_no_arithmetic_on_constants_is_left(name):
    for node in toy_graph(name).nodes_of_kind("call_function"):
        assert any(source.op != "get_attr" for source in node.all_input_nodes), node
