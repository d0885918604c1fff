import pytest
import torch
from tiny import enliven, images, run_pass, run_steps
from torch import nn

from vitcompress.errors import PassError
from vitcompress.graph import Role, capture, enumerate_sites
from vitcompress.passes import Freeze
from vitcompress.passes.base import Fact, holds
from vitcompress.passes.freeze import FreezeConfig


def calibrated(graph, source, *rules):
    steps = [
        {"pass": "attach", "rules": list(rules)},
        {"pass": "calibrate", "method": "minmax"},
    ]
    return run_steps(steps, graph, source)[0]


def everything(**settings):
    return {"roles": [str(role) for role in Role], "bits": 4, **settings}


@pytest.mark.parametrize(
    ("settings", "dtype"), [({}, torch.uint8), ({"symmetric": True}, torch.int8)], ids=str
)
def test_the_same_bits_come_out_and_weights_are_codes(settings, dtype, vit_graph, source):
    per_row = {"roles": ["weight"], "bits": 4, "granularity": "per_channel", **settings}
    graph = calibrated(vit_graph, source, everything(), per_row)
    x = images(3)
    expected = graph(x)

    report = run_pass(Freeze(FreezeConfig()), graph, source)

    assert torch.equal(graph(x), expected)
    assert holds(Fact.FINAL, graph)
    weights = [n for n in graph.tensors() if n.endswith("weight") and "norm" not in n]
    assert report.changed == len(weights) == 10
    for name in weights:
        assert graph.parameter(name).dtype == dtype
        assert len(graph.parameter(name).unique()) <= 16
    assert graph.parameter("norm.weight").dtype == torch.float32


def test_the_float_model_keeps_its_weights(vit_graph, source):
    graph = calibrated(vit_graph, source, everything())

    run_pass(Freeze(FreezeConfig()), graph, source)

    assert vit_graph.parameter("head.weight").dtype == torch.float32
    assert graph.parameter("head.weight").dtype == torch.uint8


def test_nothing_is_final_before(vit_graph, source):
    graph = calibrated(vit_graph, source, everything())

    assert not holds(Fact.FINAL, graph)
    assert not holds(Fact.FINAL, vit_graph)


def test_sites_are_still_found_and_frozen_weights_keep_their_role(vit_graph, source):
    graph = calibrated(vit_graph, source, everything())
    before = list(enumerate_sites(graph))

    run_pass(Freeze(FreezeConfig()), graph, source)

    assert list(enumerate_sites(graph)) == before


def test_activations_that_are_not_strict_are_warned_about(vit_graph, source):
    loose = {"roles": ["probs"], "bits": 4, "format": "log_sqrt2", "strict": False}
    graph = calibrated(vit_graph, source, everything(), loose)

    report = run_pass(Freeze(FreezeConfig()), graph, source)

    assert report.warnings == tuple(
        f"blocks.{i}.attn:probs: not strictly 4 bits: 17 levels, 4 bits hold 16"
        for i in (0, 1)
    )


def test_weights_that_are_not_strict_are_refused(vit_graph, source):
    graph = calibrated(vit_graph, source, everything(strict=False))

    with pytest.raises(PassError, match="patch_embed:weight: weights must be strict"):
        run_pass(Freeze(FreezeConfig()), graph, source)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.patch(x).flatten(2).mean(2)).relu())


@pytest.fixture(scope="module")
def tied_graph():
    return capture(enliven(Tied()), images(2))


def test_a_tied_weight_is_frozen_once(tied_graph, source):
    graph = calibrated(tied_graph, source, everything())
    expected = graph(images(3))

    report = run_pass(Freeze(FreezeConfig()), graph, source)

    assert report.changed == 2
    assert torch.equal(graph(images(3)), expected)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"skip": True}, "also read without a quantizer"),
        ({"bits": 8}, "two quantizers of diff"),
    ],
    ids=str,
)
def test_a_tied_weight_with_two_readings_is_refused(rule, reason, tied_graph, source):
    graph = calibrated(tied_graph, source, everything(), {"sites": ["second:weight"], **rule})

    with pytest.raises(PassError, match=reason):
        run_pass(Freeze(FreezeConfig()), graph, source)
