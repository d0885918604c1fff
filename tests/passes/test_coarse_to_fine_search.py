"""range_search: the output error of each reader falls, and zero points stay codes."""

import pytest
import torch
from tiny import images, make_source, run_pass, run_steps

from vitcompress.errors import ConfigError
from vitcompress.graph import enumerate_sites
from vitcompress.numerics.search import coarse_to_fine
from vitcompress.passes import RangeSearch
from vitcompress.passes.base import quantizers_of
from vitcompress.passes.range_search import RangeSearchConfig, combinations
from vitcompress.quantizers import QuantSpec, make_quantizer

ALL = ["query", "key", "value", "proj_input", "act_output", "norm_output", "head_input"]


def attach(bits=4, probs="affine", attention="per_tensor", symmetric=False):
    return {
        "pass": "attach",
        "rules": [
            {"roles": ["weight"], "bits": 4, "granularity": "per_channel"},
            {"roles": ALL, "bits": bits, "symmetric": symmetric},
            {"roles": ["query", "key", "value"], "bits": bits, "granularity": attention},
            {"roles": ["probs"], "bits": bits, "format": probs},
        ],
    }


@pytest.fixture(scope="module")
def many():
    return make_source(images(16, seed=3), batch_size=4)


def calibrated(reference, source, method="minmax", **settings):
    steps = [attach(**settings), {"pass": "calibrate", "method": method}]
    return run_steps(steps, reference, source)[0]


def search(graph, source, **settings):
    settings = {"roles": (*ALL, "probs"), **settings}
    return run_pass(RangeSearch(RangeSearchConfig(**settings)), graph, source)


def logits_error(graph, reference, seed=5):
    x = images(32, seed=seed)
    return float((graph.logits(x) - reference.logits(x)).square().mean())


def test_coarse_to_fine_finds_the_least_of_each_group():
    goal = torch.tensor([0.731, 2.2])
    scales = torch.linspace(0.5, 3.0, 6)[:, None].expand(6, 2)
    points = torch.zeros(6, 2)

    scale, point, loss = coarse_to_fine(
        scales,
        points,
        torch.full((2,), 0.5),
        lambda s, p: (s - goal).square() + p,
        keep=2,
        children=4,
        rounds=4,
    )

    torch.testing.assert_close(scale, goal, atol=3e-3, rtol=0.0)
    assert point.tolist() == [0.0, 0.0]
    torch.testing.assert_close(loss, (scale - goal).square())


def test_coarse_to_fine_keeps_a_coarse_candidate_that_nothing_beats():
    scales = torch.tensor([[1.0], [2.0]])

    scale, point, _ = coarse_to_fine(
        scales,
        torch.tensor([[5.0], [6.0]]),
        torch.ones(1),
        lambda s, p: (s - 2.0).abs(),
        keep=1,
        children=2,
        rounds=3,
    )

    assert (scale.item(), point.item()) == (2.0, 6.0)


def test_combinations_hold_the_present_one_first_and_zero_points_that_are_codes():
    quantizer = make_quantizer(QuantSpec(bits=4), "site")
    quantizer.set_range(torch.tensor(-0.2), torch.tensor(3.0))
    values = torch.linspace(-0.2, 3.0, 101)

    scales, points, step = combinations(
        quantizer, values, RangeSearchConfig(points=6, scales=3)
    )

    assert scales.shape == points.shape == (1 + 3 * 6, 1)
    assert (scales[0].item(), points[0].item()) == (
        quantizer.scale.item(),
        quantizer.zero_point.item(),
    )
    assert sorted(set(points.flatten().tolist())) == [0.0, 1.0, 2.0, 3.0]
    widths = torch.tensor([0.8 * 3.2, 0.9 * 3.2, 3.2]) / 15
    torch.testing.assert_close(scales[1::6, 0], widths, rtol=1e-5, atol=0.0)
    assert step.item() == pytest.approx(0.1 * 3.2 / 15, rel=1e-4)


def test_every_output_error_falls_or_stays(vit_graph, many):
    graph = calibrated(vit_graph, many)

    report = search(graph, many)

    left = report.details["output_error_left"]
    assert len(left) == report.found == 17
    assert report.skipped == {}
    assert all(0.0 < share <= 1.0 + 1e-6 for share in left.values())
    assert sorted(left.values())[len(left) // 2] < 0.9


def test_the_network_comes_closer_than_with_the_ranges_of_min_max(vit_graph, many):
    graph = calibrated(vit_graph, many, bits=3)
    before = logits_error(graph, vit_graph)

    search(graph, many)

    assert logits_error(graph, vit_graph) < 0.9 * before


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantizers_stay_strict(vit_graph, many, symmetric):
    graph = calibrated(vit_graph, many, symmetric=symmetric)

    search(graph, many)

    for quantizer in quantizers_of(graph).values():
        assert quantizer.defect() is None
        if symmetric and quantizer.site.endswith("head:input"):
            assert quantizer.zero_point == 0.0


def test_bases_are_searched_with_scales(vit_graph, many):
    graph = calibrated(vit_graph, many, probs="adalog", method="mse")
    before = {q.site: q for q in quantizers_of(graph.clone()).values()}

    report = search(graph, many, roles=("probs",))

    assert report.found == 2
    assert report.details["formats"] == {"adalog:4 per_tensor": 2}
    after = {q.site: q for q in quantizers_of(graph).values()}
    site = "blocks.0.attn:probs"
    assert after[site].numerator != before[site].numerator or (
        after[site].scale != before[site].scale
    )
    assert after[site].shift == before[site].shift


def test_a_fixed_logarithm_has_a_scale_alone(vit_graph, many):
    graph = calibrated(vit_graph, many, probs="log_sqrt2")

    report = search(graph, many, roles=("probs",))

    assert report.changed == 2


def test_heads_get_ranges_of_their_own_where_they_have_quantizers_of_their_own(
    vit_graph, many
):
    together = calibrated(vit_graph, many, bits=3)
    apart = calibrated(vit_graph, many, bits=3, attention="per_head")
    roles = ("query", "key", "value")

    report = search(apart, many, roles=roles)
    search(together, many, roles=roles)

    assert report.details["formats"] == {"u3 per_head": 6}
    quantizer = next(q for q in quantizers_of(apart).values() if q.site.endswith("query"))
    assert quantizer.scale.shape == (2,)
    assert quantizer.scale[0] != quantizer.scale[1]


def test_rows_of_weights_are_searched_by_output_error(vit_graph, many):
    graph = calibrated(vit_graph, many)
    before = {q.site: q.scale for q in quantizers_of(graph).values()}

    report = search(graph, many, roles=("weight",))

    left = report.details["output_error_left"]
    assert report.skipped == {"patch_embed:weight": "not the weight of one linear"}
    assert len(left) == 9
    assert all(share < 0.95 for share in left.values())
    for quantizer in quantizers_of(graph).values():
        searched = quantizer.site in left
        assert torch.equal(quantizer.scale, before[quantizer.site]) is not searched


def test_only_the_named_roles_change(vit_graph, many):
    graph = calibrated(vit_graph, many)
    before = {q.site: q.scale for q in quantizers_of(graph).values()}
    roles = {site.name: site.role for site in enumerate_sites(graph).values()}

    search(graph, many, roles=("act_output",))

    changed = {
        q.site
        for q in quantizers_of(graph).values()
        if not torch.equal(q.scale, before[q.site])
    }
    assert changed
    assert {roles[site] for site in changed} == {"act_output"}


def test_two_runs_agree(vit_graph, many):
    found = []
    for _ in range(2):
        graph = calibrated(vit_graph, many)
        search(graph, many, tokens=50)
        found.append([q.scale for q in quantizers_of(graph).values()])

    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bounds_of_the_settings():
    with pytest.raises(ConfigError, match="points: expected at least 1"):
        RangeSearchConfig(points=0)
    with pytest.raises(ConfigError, match="children: expected at least 2"):
        RangeSearchConfig(children=1)
    with pytest.raises(ConfigError, match="rounds"):
        RangeSearchConfig(rounds=-1)
