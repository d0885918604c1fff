import pytest
import torch
from tiny import enliven, images, run_pass
from torch import nn
from zoo import zoo_graph

from vitcompress.errors import ConfigError
from vitcompress.graph import Role, capture, enumerate_sites
from vitcompress.passes import Attach
from vitcompress.passes.attach import AttachConfig, AttachRule
from vitcompress.quantizers import PerChannel, PerGroup, PerHead, PerTensor


def attach(graph, *rules):
    return run_pass(
        Attach(AttachConfig(rules=tuple(AttachRule(**r) for r in rules))), graph, None
    )


def spec_at(graph, site):
    return graph.quantizers()[enumerate_sites(graph)[site].quantizer].spec


def test_later_rules_win(graph):
    attach(
        graph,
        {"roles": [Role.WEIGHT], "bits": 4},
        {"sites": ["blocks.0.*:weight"], "bits": 3},
        {"sites": ["blocks.0.fc1:weight"], "bits": 8},
    )

    assert spec_at(graph, "head:weight").bits == 4
    assert spec_at(graph, "blocks.0.fc2:weight").bits == 3
    assert spec_at(graph, "blocks.0.fc1:weight").bits == 8


def test_sites_without_a_quantizer_are_reported_with_the_reason(graph):
    report = attach(
        graph,
        {"roles": [Role.WEIGHT, Role.HEAD_INPUT]},
        {"sites": ["head:*"], "skip": True},
    )

    assert report.found == len(enumerate_sites(graph))
    assert report.changed == report.found - len(report.skipped)
    assert report.skipped["head:input"] == "skipped by a rule"
    assert report.skipped["blocks.0.attn:probs"] == "no rule matches"
    assert "blocks.0.fc1:weight" not in report.skipped


def test_edges_that_read_one_value_share_one_quantizer():
    graph = zoo_graph("hf_vit").clone()

    report = attach(graph, {"roles": [Role.NORM_OUTPUT]})

    sites = enumerate_sites(graph)
    parts = [sites[f"vit.layers.0.attention.{part}_proj:input"] for part in ("q", "k", "v")]
    assert len({site.quantizer for site in parts}) == 1
    assert report.changed == 8
    assert len(graph.quantizers()) == 4


def test_edges_that_want_different_formats_do_not_share():
    graph = zoo_graph("hf_vit").clone()

    attach(graph, {"roles": [Role.NORM_OUTPUT]}, {"sites": ["*.v_proj:input"], "bits": 4})

    q, v = (spec_at(graph, f"vit.layers.0.attention.{part}_proj:input") for part in ("q", "v"))
    assert (q.bits, v.bits) == (8, 4)
    assert len(graph.quantizers()) == 6


def test_a_tied_weight_has_one_quantizer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 8, 8)
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(self.patch(x).flatten(2).mean(2)).relu())

    graph = capture(enliven(Tied()), images(2))

    attach(graph, {"roles": [Role.WEIGHT]})

    assert len(graph.quantizers()) == 2  # the convolution's and the shared one


def test_attaching_keeps_sites_names_and_roles(graph, vit_graph):
    attach(graph, {"roles": list(Role)})

    before = [(s.name, s.role, s.shape) for s in enumerate_sites(vit_graph).values()]
    assert [(s.name, s.role, s.shape) for s in enumerate_sites(graph).values()] == before
    assert all(site.quantizer for site in enumerate_sites(graph).values())


def test_constants_get_no_activation_quantizer(graph):
    attach(graph, {"roles": list(Role)})

    for node in graph.graph.nodes:
        if node.target in graph.quantizers() and node.args[0].op == "get_attr":
            assert node.args[0].target.endswith(".weight")


def test_a_glob_that_matches_nothing_is_an_error(graph):
    with pytest.raises(
        ConfigError, match=r"rules\[1\]\.sites: 'blok\*' matches none of \d+ sites"
    ):
        attach(graph, {"roles": [Role.WEIGHT]}, {"sites": ["blok*"]})


@pytest.mark.parametrize("role", [Role.OTHER, Role.HEAD_MIXING])
def test_rules_that_match_no_site_at_all_are_an_error(graph, role):
    count = len(enumerate_sites(graph))

    with pytest.raises(ConfigError, match=rf"rules: each of {count} sites stays float"):
        attach(graph, {"roles": [role]})

    assert graph.quantizers() == {}


def test_a_role_that_the_model_lacks_is_no_error(graph):
    report = attach(graph, {"roles": [Role.WEIGHT, Role.OTHER]})

    assert report.changed > 0


def test_granularity_follows_the_site(graph):
    attach(
        graph,
        {"roles": [Role.WEIGHT], "granularity": "per_channel"},
        {"roles": [Role.NORM_OUTPUT, Role.PATCH_INPUT], "granularity": "per_channel"},
        {"roles": [Role.QUERY, Role.KEY], "granularity": "per_head"},
        {"roles": [Role.VALUE]},
    )

    granularities = {
        site: spec_at(graph, site).granularity
        for site in (
            "head:weight",
            "patch_embed:input",
            "blocks.0.fc1:input",
            "blocks.0.attn:key",
            "blocks.0.attn:value",
        )
    }
    assert list(granularities.values()) == [
        PerChannel(0),
        PerChannel(1),
        PerChannel(-1),
        PerHead(1),
        PerTensor(),
    ]


def test_groups_are_for_weights_alone(graph):
    attach(graph, {"roles": [Role.WEIGHT], "granularity": "per_group", "group_size": 16})

    assert spec_at(graph, "head:weight").granularity == PerGroup(16)
    with pytest.raises(ConfigError, match="per_group is for role weight alone"):
        AttachRule(roles=(Role.WEIGHT, Role.QUERY), granularity="per_group")


def test_heads_need_an_axis_of_their_own(graph):
    class Folded(nn.Module):
        """Heads merged into the batch, as ``nn.MultiheadAttention`` does for weights."""

        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 8, 8)
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            return self.attn(x, x, x, need_weights=True)[0].mean(1)

    with pytest.raises(ConfigError, match=r"head:input: role head_input has no heads"):
        attach(graph, {"roles": [Role.HEAD_INPUT], "granularity": "per_head"})
    with pytest.raises(ConfigError, match=r"attn:query: heads have no axis of their own"):
        attach(
            capture(enliven(Folded()), images(2)),
            {"roles": [Role.QUERY], "granularity": "per_head"},
        )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "a rule needs roles or sites"),
        ({"roles": (Role.WEIGHT,), "bits": 1}, "bits: expected 2 to 8, got 1"),
        ({"roles": (Role.WEIGHT,), "format": "log3"}, "format: expected one of"),
    ],
)
def test_rules_that_make_no_sense_are_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        AttachRule(**settings)


def test_the_float_function_is_untouched(graph, vit_graph):
    attach(graph, {"roles": list(Role)})

    assert all(
        torch.equal(value, vit_graph.parameter(name))
        for name, value in graph.tensors().items()
    )
