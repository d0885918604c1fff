from pathlib import Path

import pytest
import torch
import yaml
from families import FAMILIES, family_graph, family_model
from tiny import images, relative_error
from torch import nn
from zoo import SLOW, ZOO, zoo_graph, zoo_model

from vitcompress.graph import Role, capture, enumerate_sites

GOLDEN = Path(__file__).parent.parent / "golden" / "sites"
#: Besides those of the zoo.
CAPTURED_SLOWLY = SLOW | {
    "timm_fastvit",
    "timm_levit",
    "timm_swinv2",
    "timm_xcit",
    "torchvision_maxvit",
}
MODELS = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ZOO]


def table(graph):
    return [
        [site.name, str(site.role), list(site.shape)]
        for site in enumerate_sites(graph).values()
    ]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=path.stem, marks=pytest.mark.slow if path.stem in CAPTURED_SLOWLY else ()
        )
        for path in sorted(GOLDEN.glob("*.yaml"))
    ],
)
def test_sites_are_those_of_the_golden_table(path):
    """A difference here is the first sign that a library, or recognition, has changed."""
    expected = yaml.safe_load(path.read_text(encoding="utf-8"))
    graph = zoo_graph(path.stem) if path.stem in ZOO else family_graph(path.stem)

    found = [
        [name, role, ["B" if e is None else e for e in shape]]
        for name, role, shape in table(graph)
    ]

    assert found == expected


def test_every_family_has_a_golden_table():
    tables = {path.stem for path in GOLDEN.glob("*.yaml")}

    assert tables >= {*FAMILIES, "timm_vit", "timm_deit_distilled", "timm_swin"}
    assert len(tables) >= 12


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_captured_as_it_is(name):
    batch = images(3, FAMILIES[name][1], seed=5)

    found, expected = family_graph(name).logits(batch), family_model(name)(batch)

    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_each_site_is_one_edge_of_a_float_tensor(name):
    sites = enumerate_sites(zoo_graph(name)).values()

    assert len({(site.reader, site.index) for site in sites}) == len(sites)
    for site in sites:
        assert site.value.meta["info"].dtype == "float32"
        assert (site.role is Role.WEIGHT) == (site.value.op == "get_attr")
        assert site.quantizer is None


def test_names_are_stable_between_captures(vit, vit_graph):
    again = capture(vit, images(3))

    assert table(again) == table(vit_graph)


def test_names_and_roles_are_stable_under_a_clone(vit_graph):
    assert table(vit_graph.clone()) == table(vit_graph)


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_and_linear_of_the_zoo_is_understood(name):
    roles = [site.role for site in enumerate_sites(zoo_graph(name)).values()]

    if name != "mobilevit":  # its convolutions read anything
        assert Role.OTHER not in roles
    count = roles.count(Role.PROBS)
    assert count >= 2
    assert [roles.count(r) for r in (Role.QUERY, Role.KEY, Role.VALUE)] == [count] * 3
    assert roles.count(Role.PATCH_INPUT) == 1
    assert roles.count(Role.WEIGHT) == sum(
        isinstance(m, (nn.Linear, nn.Conv2d)) for m in zoo_model(name).modules()
    ) + (2 if name == "torchvision_vit" else 0)  # in_proj is a bare parameter


def test_separate_query_key_and_value_linears_read_one_value():
    sites = enumerate_sites(zoo_graph("hf_vit"))

    values = {
        sites[f"vit.layers.0.attention.{part}_proj:input"].value for part in ("q", "k", "v")
    }

    assert len(values) == 1


def test_a_product_with_a_stored_matrix_is_a_linear():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 8, 8)
            self.mixing = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return torch.matmul(self.conv(x).flatten(2).mean(2), self.mixing @ self.mixing)

    sites = enumerate_sites(capture(Mixed(), images(2)))

    assert list(sites) == ["conv:input", "conv:weight", ":input", ":weight"]
    assert sites[":input"].operation == "linear"


def test_channel_axes_are_rows_of_weights_and_features_of_activations(vit_graph):
    sites = enumerate_sites(vit_graph)

    assert sites["patch_embed:input"].channel_axis == 1
    assert sites["patch_embed:weight"].channel_axis == 0
    assert sites["blocks.0.fc1:input"].channel_axis == -1
    assert sites["blocks.0.fc1:weight"].channel_axis == 0
