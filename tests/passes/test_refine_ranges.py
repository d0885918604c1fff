"""refine_ranges: a lone giant channel that the network hardly reads must not rule a range."""

import pytest
import torch
from tiny import make_source
from torch import nn

from vitcompress.engine import run_recipe
from vitcompress.errors import ConfigError
from vitcompress.graph import capture
from vitcompress.passes.base import quantizers_of
from vitcompress.passes.refine_ranges import (
    RefineRangesConfig,
    candidate_ranges,
    outstanding,
)
from vitcompress.recipe import Recipe

GIANT = 300.0


class GiantUnit(nn.Module):
    """A two-layer network one of whose hidden units is huge and whose reader normalises."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 16, 8, stride=8)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 10)
        with torch.no_grad():
            self.fc1.bias[3] = GIANT
            # Nothing reads the giant but the range that must cover it.
            self.fc2.weight[:, 3] = 1e-6
            self.head.weight.mul_(4.0)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        hidden = torch.nn.functional.gelu(self.fc1(tokens))
        return self.head(self.norm(tokens + self.fc2(hidden)).mean(dim=1))


def recipe(*, refine):
    passes = [
        {
            "pass": "attach",
            "rules": [
                {"roles": ["weight"], "bits": 8, "granularity": "per_channel"},
                {"roles": ["act_output", "norm_output", "head_input", "other"], "bits": 8},
            ],
        },
        {"pass": "calibrate", "method": "minmax"},
    ]
    passes += [{"pass": "refine_ranges"}] if refine else []
    passes.append({"pass": "freeze"})
    return Recipe.from_dict({"schema": 1, "name": "test", "scheme": "W8A8", "passes": passes})


@pytest.fixture(scope="module")
def giant():
    return capture(GiantUnit().eval(), torch.zeros(2, 3, 32, 32))


@pytest.fixture(scope="module")
def images():
    return torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits_error(graph, reference, images):
    return (graph.logits(images) - reference.logits(images)).square().mean().item()


def test_only_the_wider_end_shrinks_and_stops_at_the_narrower():
    config = RefineRangesConfig(steps=3, smallest=0.01)

    ranges = candidate_ranges(torch.tensor(-2.0), torch.tensor(100.0), config)

    lows, highs = zip(*ranges, strict=True)
    assert [float(low) for low in lows] == [-2.0, -2.0, -2.0]
    assert [float(high) for high in highs] == pytest.approx([100.0, 10.0, 2.0])


def test_sites_far_below_the_median_are_chosen_noisiest_first():
    noise = {"a": 40.0, "b": 39.0, "c": 12.0, "d": 41.0, "e": 20.0}

    assert outstanding(noise, RefineRangesConfig(sites=2)) == ["c", "e"]
    assert outstanding(noise, RefineRangesConfig(sites=1)) == ["c"]
    assert outstanding({"a": 40.0, "b": 39.0}, RefineRangesConfig()) == []


def test_the_giant_site_is_refined_and_the_logits_come_closer(giant, images):
    source = make_source(images)

    plain, _ = run_recipe(recipe(refine=False), giant, source)
    refined, records = run_recipe(recipe(refine=True), giant, source)

    details = records[-2].report.details
    assert list(details["ranges"]) == ["fc2:input"]
    assert details["ranges"]["fc2:input"][3] < GIANT / 2
    assert logits_error(refined, giant, images) < logits_error(plain, giant, images) / 2


def test_other_quantizers_keep_their_parameters(giant, images):
    source = make_source(images)

    plain, _ = run_recipe(recipe(refine=False), giant, source)
    refined, _ = run_recipe(recipe(refine=True), giant, source)

    after = quantizers_of(refined)
    for target, quantizer in quantizers_of(plain).items():
        same = torch.equal(quantizer.scale, after[target].scale)
        assert same == (quantizer.site != "fc2:input")


def test_bounds_of_the_settings():
    with pytest.raises(ConfigError, match="margin_db"):
        RefineRangesConfig(margin_db=0.0)
    with pytest.raises(ConfigError, match="smallest"):
        RefineRangesConfig(smallest=1.0)
    with pytest.raises(ConfigError, match="at least 1"):
        RefineRangesConfig(sites=0)
