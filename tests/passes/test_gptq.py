"""GPTQ as a pass: on the grid, closer to float than nearest rounding, open about the rest."""

import pytest
import torch
from tiny import images, make_source, run_pass, run_steps, smooth_images
from torch import nn

from vitcompress.calibration import RangeConfig, fit_range
from vitcompress.calibration.interpreter import walk
from vitcompress.errors import ConfigError
from vitcompress.graph import capture, ops
from vitcompress.graph.ops import is_op
from vitcompress.passes import Gptq
from vitcompress.passes.base import Fact, holds, quantizers_of
from vitcompress.passes.gptq import GptqConfig

ACTIVATIONS = ["norm_output", "proj_input", "act_output", "head_input"]


def attach(symmetric=False, **weight):
    weight = {"bits": 3, "granularity": "per_channel", "symmetric": symmetric, **weight}
    return {
        "pass": "attach",
        "rules": [
            {"roles": ["weight"], **weight},
            {"roles": ACTIVATIONS, "bits": 8},
            {"roles": ["patch_input"], "bits": 8},
        ],
    }


def prepared(graph, source, **settings):
    steps = [attach(**settings), {"pass": "calibrate"}]
    return run_steps(steps, graph, source)[0]


@pytest.fixture(scope="module")
def many():
    return make_source(smooth_images(32, seed=3), batch_size=8)


def logits_error(graph, reference, seed):
    x = smooth_images(32, seed=seed)
    return (graph.logits(x) - reference.logits(x)).square().mean().item()


@pytest.mark.parametrize("symmetric", [False, True])
def test_logits_come_closer_on_seen_and_unseen_images(vit_graph, many, symmetric):
    plain = prepared(vit_graph, many, symmetric=symmetric)
    repaired = plain.clone()

    report = run_pass(Gptq(GptqConfig()), repaired, many)

    assert report.changed == report.found == 10  # patches, four linears twice, head
    for seed in (3, 4):
        assert logits_error(repaired, vit_graph, seed) < 0.7 * logits_error(
            plain, vit_graph, seed
        )


def test_every_weight_lies_on_its_grid_and_freezes_without_further_loss(vit_graph, many):
    graph = prepared(vit_graph, many)

    run_pass(Gptq(GptqConfig()), graph, many)

    assert holds(Fact.CALIBRATED, graph)
    for node in graph.nodes_of_kind("call_module"):
        if node.args[0].op == "get_attr":
            weight = graph.parameter(str(node.args[0].target))
            quantizer = quantizers_of(graph)[str(node.target)]
            torch.testing.assert_close(quantizer(weight), weight, rtol=1e-5, atol=1e-6)
    finished, records = run_steps(
        [attach(), {"pass": "calibrate"}, {"pass": "gptq"}, {"pass": "freeze"}],
        vit_graph,
        many,
    )
    assert records[-1].report.details["weight_sqnr_db"] == {}  # nothing was left to round
    torch.testing.assert_close(finished.logits(images(4)), graph.logits(images(4)))


def test_activation_quantizers_keep_their_parameters(vit_graph, many):
    graph = prepared(vit_graph, many)
    before = {q.site: q.scale for q in quantizers_of(graph).values()}

    run_pass(Gptq(GptqConfig()), graph, many)

    for quantizer in quantizers_of(graph).values():
        if quantizer.site.endswith(":input"):
            assert torch.equal(quantizer.scale, before[quantizer.site])


def test_a_layer_sees_what_the_quantized_layers_before_it_make(vit_graph, many):
    # Its report compares with nearest rounding on the inputs of the walk; done by hand here.
    graph = prepared(vit_graph, many)
    run_pass(Gptq(GptqConfig()), graph, many)
    seen = {}

    def visit(node, values):
        if is_op(node, ops.LINEAR) and node not in seen:
            seen[node] = torch.cat(values)

    walk(graph, [batch.images for batch in many], visit)
    walk(vit_graph, [batch.images for batch in many], visit)

    names = {node.args[1].args[0].target for node in seen if node.args[1].op == "call_module"}
    inputs = {
        str(node.args[1].args[0].target): value
        for node, value in seen.items()
        if node.args[1].op == "call_module"
    }
    name = "blocks.1.fc1.weight"
    assert name in names
    x = inputs[name].reshape(-1, inputs[name].shape[-1])
    exact = vit_graph.parameter(name)
    nearest = next(q for q in quantizers_of(graph).values() if q.site == "blocks.1.fc1:weight")
    fit_range(nearest, exact, RangeConfig(method="mse", smallest=0.4))
    bias = graph.parameter("blocks.1.fc1.bias") - vit_graph.parameter("blocks.1.fc1.bias")
    repaired = x @ (graph.parameter(name) - exact).T + bias
    assert repaired.square().mean() < 0.8 * (x @ (nearest(exact) - exact).T).square().mean()


def test_a_convolution_is_rounded_over_its_patches(vit_graph, many):
    graph = prepared(vit_graph, many)
    unfolded = vit_graph.parameter("patch_embed.weight")
    x = smooth_images(16, seed=9)

    run_pass(Gptq(GptqConfig()), graph, many)

    quantizer = next(
        q for q in quantizers_of(graph).values() if q.site == "patch_embed:weight"
    )
    bias = vit_graph.parameter("patch_embed.bias")
    expected = nn.functional.conv2d(x, unfolded, bias, 8)
    nearest = nn.functional.conv2d(x, quantizer(unfolded), bias, 8)
    found = nn.functional.conv2d(
        x, graph.parameter("patch_embed.weight"), graph.parameter("patch_embed.bias"), 8
    )
    assert (found - expected).square().mean() < (nearest - expected).square().mean()


class Odd(nn.Module):
    """Layers that GPTQ leaves alone, and a strided, padded convolution that it does not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        x = self.same(self.depthwise(self.stem(x))).flatten(2).transpose(1, 2)
        return self.head(self.twice(torch.tanh(self.twice(x))).mean(dim=1))


@pytest.fixture(scope="module")
def odd():
    torch.manual_seed(0)
    return capture(Odd().eval(), images(2, size=16))


def test_what_it_cannot_repair_is_reported_and_stays_as_calibrated(odd):
    source = make_source(smooth_images(16, size=16))
    steps = [
        {"pass": "attach", "rules": [{"roles": ["weight"], "bits": 4}]},
        {"pass": "calibrate"},
    ]
    graph, _ = run_steps(steps, odd, source)
    before = graph.tensors()

    report = run_pass(Gptq(GptqConfig()), graph, source)

    assert report.changed == 2
    assert report.skipped["depthwise"] == "its convolution has groups"
    assert report.skipped["same"] == "only plain two-dimensional convolutions are unfolded"
    shared = [r for label, r in report.skipped.items() if label.startswith("twice")]
    assert shared == ["its weight serves several layers"] * 2
    changed = {n for n, t in graph.tensors().items() if not torch.equal(t, before[n])}
    assert changed == {"stem.weight", "stem.bias", "head.weight"}


def test_the_convolution_with_stride_and_padding_is_unfolded_as_it_is_computed(odd):
    source = make_source(smooth_images(16, size=16))
    rules = [{"sites": ["stem:weight"], "bits": 3, "granularity": "per_channel"}]
    plain, _ = run_steps(
        [{"pass": "attach", "rules": rules}, {"pass": "calibrate"}], odd, source
    )
    repaired = plain.clone()

    run_pass(Gptq(GptqConfig()), repaired, source)

    x = smooth_images(16, size=16, seed=5)
    exact = odd.logits(x)
    assert (repaired.logits(x) - exact).norm() < (plain.logits(x) - exact).norm()


def test_groups_within_a_row_have_grids_of_their_own(vit_graph, many):
    graph = prepared(vit_graph, many, granularity="per_group", group_size=8)

    run_pass(Gptq(GptqConfig()), graph, many)

    quantizer = next(q for q in quantizers_of(graph).values() if q.site == "head:weight")
    weight = graph.parameter("head.weight")
    assert quantizer.scale.shape == (10, 4)
    torch.testing.assert_close(quantizer(weight), weight, rtol=1e-5, atol=1e-6)


def test_tensors_are_replaced_not_written(vit_graph, many):
    graph = prepared(vit_graph, many)
    kept = {name: tensor.clone() for name, tensor in vit_graph.tensors().items()}

    run_pass(Gptq(GptqConfig()), graph, many)

    for name, tensor in vit_graph.tensors().items():
        assert torch.equal(tensor, kept[name])


def test_bounds_of_the_settings():
    with pytest.raises(ConfigError, match="damping"):
        GptqConfig(damping=0.0)
    with pytest.raises(ConfigError, match="output_mse"):
        GptqConfig(method="output_mse")
