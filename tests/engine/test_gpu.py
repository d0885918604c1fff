"""Passes that train run their blocks on a GPU and leave a network on the CPU."""

import pytest
import torch
from tiny import make_source, run_steps, smooth_images

from vitcompress.passes.losses import LOSSES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

PLAIN = [
    {
        "pass": "attach",
        "rules": [
            {"roles": ["weight"], "bits": "w", "granularity": "per_channel"},
            {"roles": ["query", "key", "value", "proj_input", "norm_output"], "bits": "a"},
            {"roles": ["probs", "act_output"], "bits": "a", "format": "adalog"},
            {"roles": ["head_input"], "bits": "a"},
        ],
    },
    {"pass": "calibrate", "method": "mse"},
]
SHIFTED = [
    {
        "pass": "attach",
        "rules": [
            {"roles": ["weight"], "bits": "w", "granularity": "per_channel"},
            {"roles": ["query", "key", "value", "proj_input", "act_output"], "bits": "a"},
            {"roles": ["norm_output"], "bits": "a", "granularity": "per_channel"},
            {"roles": ["probs"], "bits": "a", "format": "sulq"},
        ],
    },
]
TRAIN = {
    "pass": "reconstruct",
    "iterations": 40,
    "batch_size": 16,
    "weight_rate": 1e-3,
    "scale_rate": 2e-3,
    "device": "cuda",
}
SHORT = {"iterations": 40, "rate": 1e-3, "batch_size": 16, "device": "cuda"}


@pytest.mark.parametrize(
    ("loss", "weights"),
    [*((loss, "straight_through") for loss in sorted(LOSSES)), ("mse", "adaround")],
)
def test_training_brings_the_answers_nearer(vit_graph, loss, weights):
    many, x = make_source(smooth_images(96, seed=2), batch_size=16), smooth_images(64, seed=9)
    rate = {"adaround": 5e-2, "straight_through": 1e-3}[weights]
    step = {**TRAIN, "loss": loss, "weights": weights, "weight_rate": rate}
    expected = vit_graph(x)
    plain, _ = run_steps(PLAIN, vit_graph, many, "W3A6")

    graph, records = run_steps([*PLAIN, step], vit_graph, many, "W3A6")

    assert records[-1].report.changed == 4
    assert all(value.device.type == "cpu" for value in graph.tensors().values())
    before = (plain(x) - expected).square().mean()
    assert (graph(x) - expected).square().mean() < before


def test_is_vit_and_mlp_reconstruction_run_there(vit_graph):
    many, x = make_source(smooth_images(64, seed=2), batch_size=16), smooth_images(64, seed=9)
    staged = {"pass": "is_vit", "calibration_images": 32, **SHORT}

    shifted, _ = run_steps([*SHIFTED, staged], vit_graph, many, "W4A6")
    rebuilt, _ = run_steps([{"pass": "mlp_reconstruction", **SHORT}], vit_graph, many)

    for graph in (shifted, rebuilt):
        assert all(value.device.type == "cpu" for value in graph.tensors().values())
        assert bool(graph(x).isfinite().all())
