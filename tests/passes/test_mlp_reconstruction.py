import pytest
import torch
import torch.nn.functional as F
from families import family_graph
from tiny import images, make_source, run_steps
from zoo import zoo_graph

from vitcompress.errors import ConfigError
from vitcompress.graph.ops import ACTIVATION, GELU, is_op
from vitcompress.passes.mlp_reconstruction import (
    MlpReconstructionConfig,
    gelu_mlps,
    mlp_loss,
)

STEP = {
    "pass": "mlp_reconstruction",
    "iterations": 60,
    "rate": 1e-3,
    "batch_size": 16,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def rebuilt(vit_graph):
    graph, records = run_steps([STEP], vit_graph, make_source(images(64), batch_size=16))
    return graph, records[0].report


def activations(graph):
    return [str(n.target).split(".")[1] for n in graph.graph.nodes if is_op(n, ACTIVATION)]


def test_every_gelu_becomes_a_relu(rebuilt, vit_graph):
    graph, report = rebuilt

    assert activations(vit_graph) == ["gelu", "gelu"]
    assert activations(graph) == ["relu", "relu"]
    assert (report.changed, report.found) == (2, 2)
    assert report.warnings == ("the float function changed: ReLU for GELU in 2 MLPs",)


def test_training_brings_the_answers_back(rebuilt, vit_graph):
    x, graph = images(128, seed=7), vit_graph.clone()
    for node in graph.graph.nodes:
        if is_op(node, GELU):
            node.target = torch.ops.aten.relu.default
    graph.recompile()

    expected = vit_graph(x)
    error = (rebuilt[0](x) - expected).square().mean()

    assert error < 0.3 * (graph(x) - expected).square().mean()


def test_the_report_says_how_much_of_the_float_function_is_left(rebuilt):
    details = rebuilt[1].details

    assert 85.0 <= details["float_agreement_percent"] < 100.0
    assert 0.0 < details["float_kl"] < 0.05
    assert details["held_out_better"] == "2 of 2 blocks"
    for figures in details["blocks"].values():
        assert figures["clamp"] > 0.5


def test_only_the_weights_around_the_activation_change(rebuilt, vit_graph):
    changed = {
        name
        for name, value in rebuilt[0].tensors().items()
        if not torch.equal(value, vit_graph.parameter(name))
    }

    assert changed == {
        f"blocks.{i}.{layer}.{kind}"
        for i in (0, 1)
        for layer in ("fc1", "fc2")
        for kind in ("weight", "bias")
    }


def test_the_loss_by_hand():
    hidden, target = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0]])
    weight = torch.tensor([[1.0, 1.0]])

    found = mlp_loss(hidden, lambda h: F.linear(h, weight), target, torch.tensor(2.0))

    # (1 + 3 - 2)^2 + 2 (1 + 2 - 2)^2
    assert found.item() == pytest.approx(6.0)


def test_both_halves_pull_values_beyond_the_clamp():
    hidden = torch.tensor([[5.0]], requires_grad=True)

    mlp_loss(hidden, lambda h: 2.0 * h, torch.zeros(1, 1), torch.tensor(1.0)).backward()

    assert hidden.grad.item() != 0.0


@pytest.mark.parametrize(
    "name",
    [
        "timm_swin",
        "hf_vit",
        pytest.param("timm_vit", marks=pytest.mark.slow),
        pytest.param("torchvision_vit", marks=pytest.mark.slow),
    ],
)
def test_the_mlps_of_library_models_are_found(name):
    graph = zoo_graph(name)

    found, skipped = gelu_mlps(graph)

    assert len(found) == activations(graph).count("gelu") >= 2
    assert skipped == {}
    assert all(len(mlp.block(graph).nodes) == 3 for mlp in found)


def test_something_between_linear_and_gelu_is_named(vit_graph):
    graph = vit_graph.clone()
    gelu = next(n for n in graph.graph.nodes if is_op(n, GELU))
    with graph.graph.inserting_before(gelu):
        between = graph.graph.call_function(torch.ops.aten.tanh.default, (gelu.args[0],))
    between.meta = dict(gelu.meta)
    gelu.update_arg(0, between)

    found, skipped = gelu_mlps(graph)

    assert len(found) == 1
    (reason,) = skipped.values()
    assert "not a linear of its own" in reason


@pytest.mark.slow
def test_a_convolution_between_linear_and_gelu_is_named():
    found, skipped = gelu_mlps(family_graph("timm_pvt"))

    assert found == []
    assert all("not a linear of its own" in reason for reason in skipped.values())
    assert len(skipped) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("iterations", 0), ("rate", 0.0), ("clamp_quantile", 0.0), ("held_out", 2.0)],
)
def test_settings_out_of_range_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        MlpReconstructionConfig(**{key: value})


def test_the_defaults_are_the_published_schedule():
    config = MlpReconstructionConfig()

    assert (config.iterations, config.batch_size) == (20_000, 32)
    assert (config.rate, config.clamp_quantile) == (4e-5, 0.99)
