import pytest
from tiny import enliven, images
from torch import nn
from zoo import zoo_graph

from vitcompress.graph import capture
from vitcompress.graph.metadata import module_path
from vitcompress.graph.patterns import norm_linear_groups

CHANNELS = 16


class Behind(nn.Module):
    """A LayerNorm on ``[B, 16, 16]`` tokens, and something behind it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.patch = nn.Conv2d(3, CHANNELS, 8, 8)
        shape = (4, CHANNELS) if kind == "two_axes" else CHANNELS
        self.norm = nn.LayerNorm(shape)
        width = {"split_channels": 8, "padded_channels": 18, "tokens_last": 16}.get(
            kind, CHANNELS
        )
        self.first = nn.Linear(width, 8)
        self.second = nn.Linear(width, 8)
        self.back = nn.Linear(8, CHANNELS)
        if kind == "shared_weight":
            self.second.weight = self.first.weight

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return getattr(self, self.kind)(x)

    def one(self, x):
        return self.first(self.norm(x)).mean(dim=1)

    def two(self, x):
        x = self.norm(x)
        return (self.first(x) * self.second(x)).mean(dim=1)

    def four_axes(self, x):
        return self.first(self.norm(x.unflatten(1, (4, 4)))).mean(dim=(1, 2))

    def windows(self, x):
        x = self.norm(x.unflatten(1, (4, 4))).roll((-1, -1), (1, 2))
        x = x.reshape(-1, 2, 2, 2, 2, CHANNELS).permute(0, 1, 3, 2, 4, 5)
        return self.first(x.reshape(-1, 4, CHANNELS)).reshape(-1, 16, 8).mean(dim=1)

    def padded(self, x):
        x = nn.functional.pad(self.norm(x.unflatten(1, (4, 4))), (0, 0, 0, 1, 0, 2))
        return self.first(x).mean(dim=(1, 2))

    def token(self, x):
        return self.first(self.norm(x)[:, 0])

    def residual(self, x):
        x = self.norm(x)
        return (x + self.back(self.first(x))).mean(dim=1)

    def split_channels(self, x):
        x = self.norm(x).reshape(-1, 32, 8)
        return self.first(x).mean(dim=1)

    def padded_channels(self, x):
        return self.first(nn.functional.pad(self.norm(x), (1, 1))).mean(dim=1)

    def padded_with_ones(self, x):
        x = nn.functional.pad(self.norm(x), (0, 0, 0, 3), value=1.0)
        return self.first(x).mean(dim=1)

    def tokens_last(self, x):
        return self.first(self.norm(x).transpose(1, 2)).mean(dim=1)

    def rolled_channels(self, x):
        return self.first(self.norm(x).roll(1, 2)).mean(dim=1)

    def shared_weight(self, x):
        x = self.norm(x)
        return (self.first(x) * self.second(x)).mean(dim=1)

    def two_axes(self, x):
        return self.first(self.norm(x.unflatten(1, (4, 4)))).mean(dim=(1, 2))

    def twice(self, x):
        return self.first(self.norm(x) + self.norm(2 * x)).mean(dim=1)

    def output_too(self, x):
        x = self.norm(x)
        return self.first(x).mean(dim=1), x


def groups_of(kind):
    return norm_linear_groups(capture(enliven(Behind(kind)), images(2)))


@pytest.mark.parametrize(
    ("kind", "consumers", "pads"),
    [
        ("one", 1, 0),
        ("two", 2, 0),
        ("four_axes", 1, 0),
        ("windows", 1, 0),
        ("padded", 1, 1),
        ("token", 1, 0),
    ],
)
def test_paths_that_only_move_tokens_end_in_a_group(kind, consumers, pads):
    (group,), rejected = groups_of(kind)

    assert rejected == []
    assert module_path(group.norm).path == "norm"
    assert len(group.consumers) == consumers
    assert [len(consumer.pads) for consumer in group.consumers] == [pads] * consumers


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("residual", "read by add"),
        ("output_too", "read by output"),
        ("split_channels", "read by view"),
        ("padded_channels", "channels are padded"),
        ("padded_with_ones", "read by pad"),
        ("tokens_last", "read by transpose"),
        ("rolled_channels", "read by roll"),
        ("shared_weight", "is shared"),
        ("two_axes", "normalises over 2 axes"),
        ("twice", "its weight or bias serves another node"),
    ],
)
def test_norms_that_cannot_absorb_a_map_are_rejected_with_the_reason(kind, reason):
    groups, rejected = groups_of(kind)

    assert groups == []
    assert reason in rejected[0][1]


def coverage(name):
    groups, rejected = norm_linear_groups(zoo_graph(name))
    return (
        {module_path(group.norm).path: len(group.consumers) for group in groups},
        {module_path(norm).path for norm, _ in rejected},
    )


def test_a_plain_vit_folds_every_norm_the_final_one_into_the_head():
    groups, rejected = coverage("timm_vit")

    assert set(groups) == {"norm", *(f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2))}
    assert rejected == set()


def test_both_heads_of_a_distilled_model_read_its_final_norm():
    assert coverage("timm_deit_distilled")[0]["norm"] == 2


def test_hugging_face_norms_have_three_consumers_before_attention():
    groups, _ = coverage("hf_vit")

    assert groups["vit.layers.0.layernorm_before"] == 3
    assert groups["vit.layers.0.layernorm_after"] == 1


@pytest.mark.parametrize(
    "name", ["timm_swin", "torchvision_swin", pytest.param("hf_swin", marks=pytest.mark.slow)]
)
def test_swin_folds_through_windows_but_not_into_a_residual_or_a_mean(name):
    groups, rejected = coverage(name)

    # Two norms in each of three blocks, and the one before the reduction.
    assert len(groups) == 7
    assert len(rejected) == 2


def test_padding_between_norm_and_windows_is_recorded():
    groups, _ = norm_linear_groups(zoo_graph("timm_swin_padded"))

    pads = {module_path(g.norm).path: len(g.consumers[0].pads) for g in groups}
    assert {path for path, count in pads.items() if count} == {
        "layers.0.blocks.0.norm1",
        "layers.0.blocks.1.norm1",
        "layers.1.blocks.0.norm1",
    }
