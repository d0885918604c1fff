"""integer_bias: what an int32 accumulator can add, and nothing else."""

import pytest
import torch
from tiny import run_steps

from vitcompress.passes.base import quantizers_of
from vitcompress.passes.integer_bias import rounded_bias

ATTACH = {
    "pass": "attach",
    "rules": [
        {"roles": ["weight"], "bits": 4, "granularity": "per_channel"},
        {"roles": ["norm_output", "proj_input", "act_output"], "bits": 4},
    ],
}


def test_bias_by_hand():
    bias = torch.tensor([0.30, -0.26, 0.0])

    rounded = rounded_bias(bias, torch.tensor(0.5), torch.tensor([0.25, 0.25, 1.0]))

    torch.testing.assert_close(rounded, torch.tensor([0.25, -0.25, 0.0]))


def test_rounding_twice_changes_nothing():
    bias = torch.randn(64, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor(0.013), torch.rand(64, generator=torch.Generator().manual_seed(1))

    once = rounded_bias(bias, *scales)

    assert torch.equal(rounded_bias(once, *scales), once)


def test_bias_that_overflows_int32_is_left():
    assert rounded_bias(torch.tensor([1.0]), torch.tensor(1e-5), torch.tensor(1e-5)) is None


@pytest.fixture
def finished(vit_graph, source):
    steps = [ATTACH, {"pass": "calibrate"}, {"pass": "integer_bias"}]
    return run_steps(steps, vit_graph, source)


def test_every_bias_between_quantizers_is_whole_steps(vit_graph, finished):
    graph, _ = finished

    known = quantizers_of(graph)
    name = "blocks.0.fc1"
    x = next(q for q in known.values() if q.site == f"{name}:input")
    w = next(q for q in known.values() if q.site == f"{name}:weight")
    steps = graph.parameter(f"{name}.bias").double() / (x.scale * w.scale).double()
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert not torch.equal(
        graph.parameter(f"{name}.bias"), vit_graph.parameter(f"{name}.bias")
    )


def test_the_bias_of_a_convolution_is_whole_steps(vit_graph, source):
    rules = [*ATTACH["rules"], {"roles": ["patch_input"], "bits": 8}]
    steps = [{**ATTACH, "rules": rules}, {"pass": "calibrate"}, {"pass": "integer_bias"}]

    graph, _ = run_steps(steps, vit_graph, source)

    scales = {q.site: q.scale.double() for q in quantizers_of(graph).values()}
    whole = graph.parameter("patch_embed.bias").double() / (
        scales["patch_embed:input"] * scales["patch_embed:weight"]
    )
    torch.testing.assert_close(whole, whole.round(), atol=1e-3, rtol=0)


def test_linears_with_a_float_operand_are_reported(finished):
    _, records = finished

    report = records[-1].report

    assert report.changed + len(report.skipped) == report.found
    assert report.skipped["head"] == "its input or weight is float"
