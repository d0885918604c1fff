"""Maps on channels join the weights beside them where that is exact, and only there."""

import pytest
import torch
import torch.nn.functional as F
from small import (
    Formula,
    assert_same_function,
    inputs,
    noise,
    operations,
    written,
    written_together,
)
from tiny import enliven
from torch import fx, nn

from vitcompress.graph import capture
from vitcompress.graph.captured import CapturedGraph, Provenance
from vitcompress.graph.folding import batch_norm_map

aten = torch.ops.aten
#: Channels, height and width; the square cases are tests of their own.
SHAPE = (4, 6, 10)


def keeps_norm(graph):
    return any("batch_norm" in name for name in operations(graph))


def tokens(x):
    return x.flatten(2).transpose(1, 2)


# Batch norm as a map


def drawn_norm(*present):
    """Return a batch norm on two channels with only some of its tensors stored."""
    stored = {
        "weight": torch.tensor([2.0, 3.0]),
        "bias": torch.tensor([0.5, -1.0]),
        "mean": torch.tensor([1.0, -2.0]),
        "var": torch.tensor([3.0, 0.0]),
    }
    graph = fx.Graph()
    images = graph.placeholder("images")
    arguments = [graph.get_attr(name) if name in present else None for name in stored]
    target = aten._native_batch_norm_legit_no_training.default
    norm = graph.call_function(target, (images, *arguments, 0.1, 1.0))
    graph.output((norm,))
    return CapturedGraph.build(graph, stored, ("",), Provenance("drawn", {})), norm


def test_batch_norm_map_by_hand():
    found = batch_norm_map(*drawn_norm("weight", "bias", "mean", "var"))

    # 1 / sqrt(3 + 1) = 1/2 and 1 / sqrt(0 + 1) = 1; 0.5 - 1 * 1 and -1 + 2 * 3.
    assert found.factor.tolist() == [1.0, 3.0]
    assert found.shift.tolist() == [-0.5, 5.0]
    assert found.factor.dtype == torch.float64


def test_a_batch_norm_without_affine_by_hand():
    found = batch_norm_map(*drawn_norm("mean", "var"))

    assert found.factor.tolist() == [0.5, 1.0]
    assert found.shift.tolist() == [-0.5, 2.0]


def test_a_batch_norm_whose_statistics_are_computed_is_no_map():
    assert batch_norm_map(*drawn_norm("weight", "bias", "var")) is None


# In front of a layer


UNPADDED = {
    "1x1": nn.Conv2d(4, 8, 1),
    "without bias": nn.Conv2d(4, 8, 1, bias=False),
    "strided": nn.Conv2d(4, 8, 2, 2),
    "valid": nn.Conv2d(4, 8, 2, 2, padding="valid"),
    "dilated": nn.Conv2d(4, 8, (2, 3), dilation=2),
    "grouped": nn.Conv2d(4, 8, 1, groups=2),
    "grouped and strided": nn.Conv2d(4, 8, 2, 2, groups=2),
    "depthwise": nn.Conv2d(4, 4, 2, 2, groups=4),
    "depthwise to more": nn.Conv2d(4, 8, 2, 2, groups=4),
}


@pytest.fixture(scope="module")
def unpadded():
    formulas = {
        name: lambda self, x, name=name: self.layers[name](self.norm(x)) for name in UNPADDED
    }
    layers = nn.ModuleDict(UNPADDED)
    return written_together(formulas, SHAPE, norm=nn.BatchNorm2d(4), layers=layers)


@pytest.mark.parametrize("name", UNPADDED)
def test_a_batch_norm_joins_the_columns_of_an_unpadded_convolution(name, unpadded):
    model, graph = unpadded[name]

    assert operations(graph) == ["conv2d"]
    assert set(graph.tensors()) == {f"layers.{name}.weight", f"layers.{name}.bias"}
    assert_same_function(model, graph)


@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_joins_the_columns_of_a_linear(bias):
    model, graph = written(
        lambda self, x: self.layer(tokens(self.norm(x))),
        SHAPE,
        norm=nn.BatchNorm2d(4),
        layer=nn.Linear(4, 7, bias=bias),
    )

    assert operations(graph)[-1] == "linear"
    assert not keeps_norm(graph)
    assert set(graph.tensors()) == {"layer.weight", "layer.bias"}
    assert_same_function(model, graph)


@torch.no_grad()
def test_columns_by_hand():
    norm, layer = nn.BatchNorm1d(2), nn.Linear(2, 1)
    norm.running_mean.copy_(torch.tensor([1.0, -2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0]))
    norm.eps = 0.0
    layer.weight.copy_(torch.tensor([[6.0, 3.0]]))
    layer.bias.fill_(5.0)
    model = Formula(
        lambda self, x: self.layer(self.norm(x.flatten(1))), norm=norm, layer=layer
    )

    graph = capture(model.eval(), inputs(2, (2, 1, 1)))

    # 6 (x - 1) / 2 + 3 (y + 2) + 5 = 3 x + 3 y + 8.
    torch.testing.assert_close(graph.parameter("layer.weight"), torch.tensor([[3.0, 3.0]]))
    torch.testing.assert_close(graph.parameter("layer.bias"), torch.tensor([8.0]))


def test_a_linear_and_a_convolution_that_read_one_norm_both_take_it():
    def formula(self, x):
        x = self.norm(x)
        picked = self.conv(tokens(x)[:, :30].transpose(1, 2).reshape(-1, 4, 5, 6))
        return self.fc(tokens(x)[:, :7]).mean(1) + picked.mean((2, 3))

    model, graph = written(
        formula, SHAPE, norm=nn.BatchNorm2d(4), fc=nn.Linear(4, 3), conv=nn.Conv2d(4, 3, 2)
    )

    assert not keeps_norm(graph)
    assert {"fc.weight", "conv.weight"} <= set(graph.tensors())
    assert_same_function(model, graph)


def padded_outside(self, x):
    return self.plain(F.pad(self.norm(x), (1, 1)))


def also_added(self, x):
    y = self.norm(x)
    return self.plain(y) + y


def returned_too(self, x):
    y = self.norm(x)
    return torch.cat([self.plain(y), y], dim=1)


def computed_weight(self, x):
    weight = (x.mean() * self.plain.weight).tanh()
    return F.conv2d(self.norm(x), weight)


def computed_bias(self, x):
    return F.conv2d(self.norm(x), self.plain.weight, x.mean((0, 2, 3)))


def as_the_weight(self, x):
    return F.linear(self.table, self.norm(x).mean((0, 3))).sum() + x


def merged_channels(self, x):
    return self.rows(self.norm(x).flatten(1, 2).transpose(1, 2))


STAYING_IN_FRONT = {
    "padding as a string": lambda self, x: self.same(self.norm(x)),
    "padding as numbers": lambda self, x: self.padded(self.norm(x)),
    "padding along one axis": lambda self, x: self.narrow(self.norm(x)),
    "padding in front": padded_outside,
    "also added": also_added,
    "also returned": returned_too,
    "computed weight": computed_weight,
    "computed bias": computed_bias,
    "as the weight": as_the_weight,
    "merged channels": merged_channels,
}


@pytest.fixture(scope="module")
def staying_in_front():
    return written_together(
        STAYING_IN_FRONT,
        SHAPE,
        norm=nn.BatchNorm2d(4),
        same=nn.Conv2d(4, 8, 3, padding="same"),
        padded=nn.Conv2d(4, 8, 3, padding=1),
        narrow=nn.Conv2d(4, 8, 3, padding=(0, 1)),
        plain=nn.Conv2d(4, 4, 1),
        rows=nn.Linear(24, 5),
        table=noise(3, 6),
    )


@pytest.mark.parametrize("name", STAYING_IN_FRONT)
def test_a_batch_norm_that_no_layer_can_take_stays(name, staying_in_front):
    model, graph = staying_in_front[name]

    assert keeps_norm(graph)
    assert_same_function(model, graph)


def test_the_rows_of_a_square_map_are_not_taken_for_its_channels():
    """Channels and width agree: only the order tells that the linear reads the width."""
    model, graph = written(
        lambda self, x: self.fc(self.norm(x)),
        (4, 4, 4),
        norm=nn.BatchNorm2d(4),
        fc=nn.Linear(4, 3),
    )

    assert keeps_norm(graph)
    assert_same_function(model, graph)


# Behind a layer


COMPUTED = {
    "weight": lambda self, x: self.norm(F.conv2d(x, (x.mean() * self.kernel).tanh())),
    "bias": lambda self, x: self.norm(F.conv2d(x, self.kernel, x.mean((0, 1, 2))[:5])),
    "weight of a linear": lambda self, x: self.flat(
        F.linear(x.mean((2, 3)), (x.mean() * self.matrix).tanh())
    ),
}


@pytest.fixture(scope="module")
def computed():
    return written_together(
        COMPUTED,
        SHAPE,
        norm=nn.BatchNorm2d(5),
        flat=nn.BatchNorm1d(5),
        kernel=noise(5, 4, 1, 1),
        matrix=noise(5, 4),
    )


@pytest.mark.parametrize("name", COMPUTED)
def test_a_batch_norm_behind_a_layer_with_a_computed_tensor_stays(name, computed):
    model, graph = computed[name]

    assert keeps_norm(graph)
    assert_same_function(model, graph)


# LayerScale


def scaled_linear(self, x):
    return self.fc(tokens(x)) * self.scale


def scaled_convolution(self, x):
    return self.conv(x) * self.scale[:, None, None]


def scaled_through_a_permutation(self, x):
    return self.conv(x).permute(0, 2, 3, 1) * self.scale


def scaled_as_a_map(self, x):
    return self.fc(tokens(x)).transpose(1, 2).reshape(-1, 8, 6, 10) * self.scale[:, None, None]


def scaled_behind_rolled_windows(self, x):
    windows = self.fc(x.permute(0, 2, 3, 1)).reshape(-1, 2, 3, 10, 8)
    return self.scale * torch.roll(windows.reshape(-1, 6, 10, 8), (1, 2), dims=(1, 2))


def scaled_twice(self, x):
    return self.fc(tokens(x)) * self.scale * self.other


def scaled_behind_zeros(self, x):
    return F.pad(self.fc(tokens(x)), (0, 0, 1, 2)) * self.scale


def hidden(self, x):
    """Return tokens of eight features; the exponential keeps maps from joining its weights."""
    return self.wide(tokens(x))[:, :3].exp()


SCALED = {
    "linear": scaled_linear,
    "convolution": scaled_convolution,
    "permuted": scaled_through_a_permutation,
    "reshaped to a map": scaled_as_a_map,
    "rolled": scaled_behind_rolled_windows,
    "twice": scaled_twice,
    "behind zeros": scaled_behind_zeros,
    "linear without bias": lambda self, x: self.plain(tokens(x)) * self.scale,
    "norm": lambda self, x: self.norm(hidden(self, x)) * self.scale,
    "norm without bias": lambda self, x: self.unbiased(hidden(self, x)) * self.scale,
    "norm without both": lambda self, x: self.bare(hidden(self, x)) * self.scale,
}


@pytest.fixture(scope="module")
def scaled():
    return written_together(
        SCALED,
        SHAPE,
        fc=nn.Linear(4, 8),
        plain=nn.Linear(4, 8, bias=False),
        wide=nn.Linear(4, 8),
        conv=nn.Conv2d(4, 8, 3, padding=1),
        norm=nn.LayerNorm(8),
        bare=nn.LayerNorm(8, elementwise_affine=False),
        unbiased=nn.LayerNorm(8, bias=False),
        scale=noise(8, seed=1),
        other=noise(8, seed=2),
    )


@pytest.mark.parametrize("name", SCALED)
def test_a_vector_over_the_channels_joins_the_rows(name, scaled):
    model, graph = scaled[name]

    assert "mul" not in operations(graph)
    assert "scale" not in graph.tensors()
    assert_same_function(model, graph)


def read_twice(self, x):
    y = self.fc(tokens(x))
    return y * self.scale + y


def read_twice_in_the_other_order(self, x):
    """Readers of a parameter are listed in the order of the parameters."""
    y = self.fc(tokens(x))
    return y * self.scale + (y + self.positions)


def read_behind(self, x):
    y = self.fc(tokens(x)).reshape(-1, 6, 10, 8)
    return y * self.scale + y.roll(1, dims=1)


UNSCALED = {
    "layer read twice": read_twice,
    "layer read twice in the other order": read_twice_in_the_other_order,
    "layer read twice behind a reshape": read_behind,
    "full table": lambda self, x: self.fc(tokens(x)) * self.positions,
    "number": lambda self, x: self.fc(tokens(x)) * 0.25,
    "scalar parameter": lambda self, x: self.fc(tokens(x)) * self.factor,
    "activation between": lambda self, x: self.fc(tokens(x)).relu() * self.scale,
    "ones padded between": lambda self, x: (
        F.pad(self.fc(tokens(x)), (0, 0, 1, 2), value=1.0) * self.scale
    ),
    "wider than the value": lambda self, x: self.fc(tokens(x))[:, :1] * self.column,
    "computed weight": lambda self, x: (
        F.linear(tokens(x), (x.mean() * self.fc.weight).tanh()) * self.scale
    ),
}


@pytest.fixture(scope="module")
def unscaled():
    return written_together(
        UNSCALED,
        SHAPE,
        fc=nn.Linear(4, 8),
        scale=noise(8),
        positions=noise(60, 8),
        factor=noise(1),
        column=noise(8, 1),
    )


@pytest.mark.parametrize("name", UNSCALED)
def test_any_other_product_stays(name, unscaled):
    model, graph = unscaled[name]

    assert operations(graph).count("mul") == 1 + (name == "computed weight")
    assert_same_function(model, graph)


OTHER_AXES = {
    "rows": lambda self, x: self.fc(x[:, 0]) * self.scale[:, None],
    "width": lambda self, x: self.conv(x) * self.scale,
    "height": lambda self, x: self.conv(x) * self.scale[:, None],
    "transposed": lambda self, x: self.fc(x[:, 0]).transpose(1, 2) * self.scale,
    "repeated": lambda self, x: self.fc(x[:, 0, 0])[:, :, None].expand(-1, 8, 8) * self.scale,
}


@pytest.fixture(scope="module")
def other_axes():
    parts = {"fc": nn.Linear(8, 8), "conv": nn.Conv2d(8, 8, 1), "scale": noise(8)}
    return written_together(OTHER_AXES, (8, 8, 8), **parts)


@pytest.mark.parametrize("name", OTHER_AXES)
def test_a_vector_over_another_axis_of_equal_extent_stays(name, other_axes):
    model, graph = other_axes[name]

    assert "mul" in operations(graph)
    assert_same_function(model, graph)


# Names, and tensors that serve others


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.gamma = nn.Parameter(noise(4))

    def forward(self, x):
        return x + self.fc(x) * self.gamma


def test_folded_tensors_keep_their_names():
    model, graph = written(
        lambda self, x: self.blocks(self.norm(tokens(self.first(x))).relu()),
        SHAPE,
        first=nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False)),
        norm=nn.LayerNorm(4),
        blocks=nn.Sequential(Scaled(), Scaled()),
    )

    assert set(graph.tensors()) == {
        "first.1.weight",
        "first.1.bias",
        "norm.weight",
        "norm.bias",
        *(f"blocks.{i}.fc.{name}" for i in (0, 1) for name in ("weight", "bias")),
    }
    assert_same_function(model, graph)


def test_a_shared_module_is_folded_for_one_call_and_left_for_the_other():
    def formula(self, x):
        x = tokens(x)
        return self.fc(x) * self.scale + self.fc(torch.relu(x))

    model, graph = written(formula, SHAPE, fc=nn.Linear(4, 8), scale=noise(8))

    assert "mul" not in operations(graph)
    assert torch.equal(graph.parameter("fc.weight"), model.fc.weight)
    assert torch.equal(graph.parameter("fc.bias"), model.fc.bias)
    assert_same_function(model, graph)


@pytest.mark.parametrize("order", [1, -1], ids=["folded first", "folded last"])
def test_tied_weights_are_parted_by_a_fold(order):
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    model = Formula(
        lambda self, x: torch.cat(
            [self.first(x), self.second(self.norm(x).roll(1, dims=2))][::order], dim=1
        ),
        first=first,
        second=second,
        norm=nn.BatchNorm2d(4),
    )
    enliven(model)
    second.weight = first.weight

    graph = capture(model, inputs(2, SHAPE))

    assert not keeps_norm(graph)
    assert torch.equal(graph.parameter("first.weight"), first.weight)
    assert_same_function(model, graph)


def test_two_scales_on_tied_weights_do_not_mix():
    def formula(self, x):
        x = tokens(x)
        return self.fc(x) * self.scale + self.fc(torch.relu(x)) * self.other

    model, graph = written(
        formula, SHAPE, fc=nn.Linear(4, 8), scale=noise(8, seed=1), other=noise(8, seed=2)
    )

    assert "mul" not in operations(graph)
    assert_same_function(model, graph)


def test_a_bias_that_two_layers_share_is_parted():
    def formula(self, x):
        x = tokens(x)
        first = F.linear(x, self.matrix, self.offset) * self.scale
        return first + F.linear(torch.relu(x), self.matrix.neg(), self.offset)

    model, graph = written(
        formula, SHAPE, matrix=noise(8, 4), offset=noise(8, seed=1), scale=noise(8, seed=2)
    )

    assert "mul" not in operations(graph)
    assert_same_function(model, graph)
