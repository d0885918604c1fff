"""massive_activations: a ruling channel leaves the quantized path, and nothing changes."""

import pytest
import torch
from tiny import images, make_source, relative_error, run_pass, run_steps, tiny_vit

from vitcompress.errors import ConfigError
from vitcompress.export.onnx import export_onnx
from vitcompress.graph import capture
from vitcompress.graph.costs import multiply_adds
from vitcompress.passes import MassiveActivations
from vitcompress.passes.massive_activations import (
    MassiveActivationsConfig,
    affordable,
    ruling_channels,
)

#: The tiny model is so small that one channel is a larger share of it.
ROOMY = {"max_share": 0.05, "ratio": 4.0}
SITE = "blocks.0.fc2:input"
RULES = [
    {"roles": ["weight"], "bits": 8, "granularity": "per_channel"},
    {"roles": ["norm_output", "proj_input", "head_input", "patch_input"], "bits": 8},
    {"roles": ["act_output"], "bits": 6},
]


@pytest.fixture(scope="module")
def giants():
    """A tiny model with two hidden units that are tens of times larger than all others."""
    model = tiny_vit(seed=2, depth=1)
    with torch.no_grad():
        model.blocks[0].fc1.bias[5] = 90.0
        model.blocks[0].fc1.bias[40] = 60.0
        model.blocks[0].fc2.weight[:, [5, 40]] *= 0.05
    return capture(model, images(2))


def diverted(reference, source, **settings):
    graph = reference.clone()
    config = MassiveActivationsConfig(**{**ROOMY, **settings})
    return graph, run_pass(MassiveActivations(config), graph, source)


def test_ruling_channels_by_hand():
    config = MassiveActivationsConfig(ratio=4.0, channels=2)

    assert ruling_channels(torch.tensor([1.0, 9.0, 2.0, 0.5]), config) == [1]
    assert ruling_channels(torch.tensor([8.0, 9.0, 2.0, 0.5]), config) == [1, 0]
    assert ruling_channels(torch.tensor([8.0, 9.0, 7.0, 0.5]), config) == []
    assert ruling_channels(torch.tensor([3.0, 2.0, 1.0]), config) == []
    # Silent channels are no range to win.
    assert ruling_channels(torch.tensor([5.0, 0.0, 0.0]), config) == []


def test_the_largest_gains_are_bought_first_and_the_budget_holds():
    gains = {"a": 3.0, "b": 30.0, "c": 5.0}
    costs = {"a": 10, "b": 60, "c": 50}

    assert affordable(gains, costs, 120) == ["b", "c", "a"]
    assert affordable(gains, costs, 75) == ["b", "a"]
    assert affordable(gains, costs, 5) == []


def test_the_float_function_is_unchanged(giants, source):
    graph, report = diverted(giants, source)

    assert report.changed == 1
    assert report.details["channels"] == {SITE: [5, 40]}
    assert report.details["range_ratio"][SITE] > 5.0
    x = images(6, seed=8)
    assert relative_error(graph(x), giants(x)) < 1e-5


def test_the_cost_is_counted_and_bounded(giants, source):
    _, report = diverted(giants, source)
    refused, sparing = diverted(giants, source, max_share=1e-4)

    # 17 tokens; a mask over 64 channels, two columns of 32 outputs.
    assert report.details["multiply_adds"] == 17 * (64 + 2 * 32)
    total = sum(multiply_adds(giants).values())
    assert report.details["share_of_multiply_adds"] == pytest.approx(17 * 128 / total)
    assert sparing.changed == 0
    assert "costs more than max_share" in sparing.skipped[SITE]
    assert torch.equal(refused(images(2)), giants(images(2)))


def test_multiply_adds_of_a_plain_model(vit_graph):
    found = multiply_adds(vit_graph)

    tokens, width = 17, 32
    block = tokens * width * (3 * width + width + 2 * width + 2 * width)
    products = 2 * 2 * tokens * tokens * (width // 2)
    patches = 16 * width * 3 * 64
    assert sum(found.values()) == 2 * (block + products) + patches + width * 10


def test_a_model_without_giants_is_left_alone(vit_graph, source):
    graph, report = diverted(vit_graph, source)

    assert report.changed == 0
    assert report.skipped == {}
    assert torch.equal(graph(images(2)), vit_graph(images(2)))


def test_quantized_logits_come_closer_than_with_one_range_for_all(giants, source):
    steps = [{"pass": "attach", "rules": RULES}, {"pass": "calibrate", "method": "mse"}]
    massive = {"pass": "massive_activations", **ROOMY}
    x = images(32, seed=8)
    exact = giants.logits(x)

    plain, _ = run_steps(steps, giants, source)
    split, _ = run_steps([massive, *steps], giants, source)

    error = [(graph.logits(x) - exact).square().mean() for graph in (plain, split)]
    assert error[1] < 0.5 * error[0]


def test_the_exported_file_runs_every_linear_as_integers(giants, source, tmp_path):
    steps = [
        {"pass": "massive_activations", **ROOMY},
        {"pass": "attach", "rules": [*RULES[:2], {"roles": ["act_output"], "bits": 8}]},
        {"pass": "calibrate"},
        {"pass": "integer_bias"},
        {"pass": "freeze"},
    ]
    graph, _ = run_steps(steps, giants, source)

    result = export_onnx(graph, tmp_path / "model.onnx", images(8, seed=4))

    found = result.verification
    assert (found.integer_linears, found.float_linears) == (found.linears, {})
    assert found.code_mismatch < 1e-3
    assert found.in_step_cosine > 0.99999


def test_several_readers_of_the_output_get_the_whole_sum(giants, source):
    # fc2 is followed by one add; the head reads the norm of it. A second reader is made here.
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc1, self.fc2 = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
            with torch.no_grad():
                self.fc1.bias[3] = 50.0

        def forward(self, x):
            y = self.fc2(torch.relu(self.fc1(x.mean(dim=1)[:, :, :8].flatten(0, 1))))
            y = y + torch.tanh(y)
            return y.reshape(x.shape[0], -1, 8).mean(dim=1)

    reference = capture(Twice().eval(), images(2, size=16))

    graph, report = diverted(reference, make_source(images(4, size=16)), max_share=0.9)

    assert report.details["channels"] == {"fc2:input": [3]}
    x = images(4, size=16, seed=9)
    torch.testing.assert_close(graph(x), reference(x), rtol=1e-5, atol=1e-5)


def test_bounds_of_the_settings():
    with pytest.raises(ConfigError, match="ratio"):
        MassiveActivationsConfig(ratio=1.0)
    with pytest.raises(ConfigError, match="channels"):
        MassiveActivationsConfig(channels=0)
    with pytest.raises(ConfigError, match="max_share"):
        MassiveActivationsConfig(max_share=1.0)
