import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from tiny import enliven, relative_error
from torch import nn

from vitcompress.graph import capture, normalize
from vitcompress.graph.branches import merge_branches
from vitcompress.graph.metadata import module_path


def noise(batch, channels=8, size=10):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(2))


def count(graph, operation):
    return sum(operation in str(node.target) for node in graph.graph.nodes)


def merged(model):
    """Return the captured model, after a check that it computes the same."""
    enliven(model)
    graph = capture(model, noise(2))
    for batch in (1, 3):
        x = noise(batch)
        with torch.no_grad():
            assert relative_error(graph(x), model(x)) <= 1e-5
    return graph


def convs_and_norms(graph):
    return count(graph, "aten.conv"), count(graph, "aten._native_batch_norm")


def conv_norm(kernel, inputs=8, outputs=8, **settings):
    settings = {"padding": kernel // 2, **settings}
    conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **settings)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Sum(nn.Module):
    """Branches over one input, added up."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        total = 0  # as the libraries write it: the graph gets an addition of 0
        for branch in self.branches:
            total = total + branch(x)
        return total


def one_block(groups=1, outputs=8, stride=1):
    """A block of MobileOne; the identity only where shapes allow."""
    settings = {"outputs": outputs, "groups": groups, "stride": stride}
    branches = [conv_norm(1, **settings), conv_norm(3, **settings), conv_norm(3, **settings)]
    if outputs == 8 and stride == 1:
        branches.insert(1, nn.BatchNorm2d(8))
    return Sum(*branches)


class Mixer(nn.Module):
    """The token mixer of FastViT, as it is trained."""

    def __init__(self, scale_shape=(8, 1, 1)):
        super().__init__()
        self.mixer = one_block(groups=8)
        self.norm = Sum(nn.BatchNorm2d(8))
        self.gamma = nn.Parameter(torch.rand(scale_shape) + 0.5)

    def forward(self, x):
        gamma = self.gamma if self.gamma.dim() > 1 else self.gamma.view(-1, 1, 1)
        return x + gamma * (self.mixer(x) - self.norm(x))


class NormedSum(nn.Module):
    """The depthwise block of RepViT: a norm behind the sum."""

    def __init__(self):
        super().__init__()
        self.conv = conv_norm(3, groups=8)
        self.conv1 = nn.Conv2d(8, 8, 1, groups=8)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x) + self.conv1(x) + x)


# What is merged


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions_and_a_normed_identity_become_one(groups):
    graph = merged(one_block(groups))

    assert convs_and_norms(graph) == (1, 0)
    assert count(graph, "aten.add") == 0
    assert graph.parameter("branches.2.0.weight").shape == (8, 8 // groups, 3, 3)


@pytest.mark.parametrize(
    "settings", [{"outputs": 16}, {"stride": 2}, {"groups": 2, "stride": 2}]
)
def test_without_an_identity_stride_and_width_are_free(settings):
    assert convs_and_norms(merged(one_block(**settings))) == (1, 0)


@pytest.mark.parametrize("scale_shape", [(8, 1, 1), (1, 8, 1, 1), (8,), (1,)])
def test_a_layer_scale_on_a_difference_and_the_residual_become_one(scale_shape):
    graph = merged(Mixer(scale_shape))

    assert convs_and_norms(graph) == (1, 0)
    assert count(graph, "aten.mul") == count(graph, "aten.sub") == 0


def test_a_norm_behind_the_sum_is_merged():
    graph = merged(NormedSum())

    assert convs_and_norms(graph) == (1, 0)
    assert count(graph, "aten.add") == 0


def test_norms_without_weights_are_merged():
    branches = conv_norm(3), nn.BatchNorm2d(8, affine=False)

    assert convs_and_norms(merged(Sum(*branches))) == (1, 0)


def test_numbers_scale_and_shift():
    class Numbers(NormedSum):
        def forward(self, x):
            return 2 - 0.5 * (self.conv(x) - 3 * self.conv1(x) + 1.5)

    # `2 - y` is an operation of its own, and stays.
    graph = merged(Numbers())

    assert convs_and_norms(graph) == (1, 0)
    assert count(graph, "aten.mul") == 0


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_paddings_by_name_are_understood(padding):
    kernels = (3, 1) if padding == "same" else (3, 3)
    # With groups, "valid" is spelled out; it is the default otherwise.
    branches = [nn.Conv2d(8, 8, kernel, padding=padding, groups=2) for kernel in kernels]

    assert convs_and_norms(merged(Sum(*branches))) == (1, 0)


def test_a_sum_in_one_dimension_is_merged():
    class Flat(Sum):
        def forward(self, x):
            return super().forward(x.flatten(2))

    branches = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8)

    assert convs_and_norms(merged(Flat(*branches))) == (1, 0)


def test_blocks_in_a_row_are_merged_one_by_one():
    model = nn.Sequential(one_block(), Mixer(), NormedSum(), one_block(groups=2), one_block(2))

    graph = merged(model)

    assert convs_and_norms(graph) == (5, 0)


def test_the_biggest_sum_inside_another_is_merged():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = NormedSum(), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.inner(x) + self.other(x.relu())

    graph = merged(Inside())

    assert convs_and_norms(graph) == (2, 0)
    assert count(graph, "aten.add") == 1


def test_a_sum_with_many_readers_is_merged():
    class Read(Sum):
        def forward(self, x):
            y = super().forward(x)
            return y.relu() + y

    assert convs_and_norms(merged(Read(*one_block().branches))) == (1, 0)


def test_the_merged_convolution_belongs_to_the_biggest_branch():
    graph = merged(one_block())

    [conv] = [node for node in graph.graph.nodes if "conv" in str(node.target)]

    assert set(graph.tensors()) == {"branches.2.0.weight", "branches.2.0.bias"}
    assert module_path(conv).path == "branches.2.0"
    assert module_path(conv).kind == "Conv2d"


def test_a_weight_that_others_read_is_left_to_them():
    class Shared(Sum):
        def forward(self, x):
            return super().forward(x) + self.branches[0](x.relu())

    graph = merged(Shared(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)))

    assert convs_and_norms(graph) == (2, 0)


def test_the_number_of_merged_sums_is_returned(monkeypatch):
    monkeypatch.setattr(normalize, "merge_branches", lambda captured: 0)
    model = enliven(nn.Sequential(one_block(), nn.ReLU(), NormedSum()))
    graph = capture(model, noise(2))
    assert count(graph, "aten.conv") == 5

    assert merge_branches(graph) == 2

    graph.recompile()
    assert merge_branches(graph) == 0
    assert relative_error(graph(noise(3)), model(noise(3))) <= 1e-5


# What is left alone


class Written(nn.Module):
    """Two convolutions and a norm, put together in a way of its own."""

    def __init__(self, formula, **settings):
        super().__init__()
        self.formula = formula
        self.three = nn.Conv2d(8, 8, 3, **{"padding": 1, **settings})
        self.one, self.narrow = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1)
        self.norm = nn.BatchNorm2d(8)
        self.register_buffer("map", torch.rand(1, 8, 10, 10))
        self.register_buffer("row", torch.rand(10))

    def forward(self, x):
        return self.formula(self, x)


def second_reader(m, x):
    y = m.three(x)
    return y + m.one(x) + y.relu()


def second_reader_of_a_partial_sum(m, x):
    y = m.three(x) * 2
    return (y + m.one(x)) * y.relu()


def second_reader_of_a_norm(m, x):
    y = m.norm(x)
    return (y + m.three(x)) * y.relu()


LEFT_ALONE = {
    "shortcut": lambda m, x: x + m.three(x),
    "scaled shortcut": lambda m, x: 3 * x - 0.5 * m.three(x),
    "norm of a shortcut": lambda m, x: m.norm(x + m.three(x)),
    "second reader": second_reader,
    "second reader of a partial sum": second_reader_of_a_partial_sum,
    "second reader of a norm": second_reader_of_a_norm,
    "other input": lambda m, x: m.three(x) + m.one(x.relu()),
    "norm of another input": lambda m, x: m.three(x) + m.norm(x.relu()),
    "shortcut of another input": lambda m, x: m.three(x) + m.one(x) * x.relu(),
    "broadcast": lambda m, x: m.three(x) + m.narrow(x),
    "factor by place": lambda m, x: m.three(x) + m.map * m.one(x),
    "factor by column": lambda m, x: m.three(x) + m.row * m.one(x),
    "product": lambda m, x: m.three(x) * m.one(x) + m.norm(x),
    "alpha": lambda m, x: torch.add(m.three(x), m.one(x), alpha=2),
    "alpha of a difference": lambda m, x: torch.sub(m.three(x), m.one(x), alpha=2),
    "no convolution": lambda m, x: 2 * m.norm(x) - m.norm(x),
    "norm before": lambda m, x: m.three(m.norm(x)) + m.one(x),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name, monkeypatch):
    formula = LEFT_ALONE[name]
    graph = merged(Written(formula))

    with monkeypatch.context() as patch:
        patch.setattr(normalize, "merge_branches", lambda captured: 0)
        expected = capture(enliven(Written(formula)), noise(2))
    assert [n.target for n in graph.graph.nodes] == [n.target for n in expected.graph.nodes]


@pytest.mark.parametrize(
    "settings",
    [{"dilation": 2, "padding": 2}, {"groups": 2}, {"padding_mode": "circular"}],
    ids=["dilation", "groups", "padding mode"],
)
def test_convolutions_of_another_kind_are_left_alone(settings):
    graph = merged(Written(lambda m, x: m.three(x) + m.one(x), **settings))

    assert convs_and_norms(graph) == (2, 0)


def test_an_image_without_a_batch_is_left_alone():
    # Its channels are axis 0, where norms and factors do not look for them.
    class Single(Sum):
        def forward(self, x):
            return super().forward(x.mean(0))

    graph = merged(Single(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)))

    assert convs_and_norms(graph) == (2, 0)


def test_strides_that_differ_are_left_alone():
    # Outputs agree in shape, 5 x 5, by a padding that is not the usual one.
    wide = nn.Conv2d(8, 8, 6), nn.Conv2d(8, 8, 6)
    branches = nn.Conv2d(8, 8, 3, stride=2, padding=1), *wide

    assert convs_and_norms(merged(Sum(*branches))) == (3, 0)


def test_an_even_kernel_with_padding_same_is_left_alone():
    branches = [nn.Conv2d(8, 8, kernel, padding="same") for kernel in (4, 3)]

    assert convs_and_norms(merged(Sum(*branches))) == (2, 0)


def test_a_shortcut_past_a_stride_is_left_alone():
    # One place each: the shapes agree although the stride is 2.
    class Pooled(Sum):
        def forward(self, x):
            return super().forward(x.mean((2, 3), keepdim=True))

    branches = nn.Conv2d(8, 8, 1, stride=2), nn.BatchNorm2d(8)

    assert convs_and_norms(merged(Pooled(*branches))) == (1, 1)


# Models


@torch.no_grad()
def settled(model, size):
    """Return the model with random norms whose statistics are those of its activations.

    Drawn statistics let activations grow from block to block until no bias matters.
    """
    enliven(model)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale.gamma"):
            parameter.uniform_(0.3, 1.0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0
    model.train()(noise(8, 3, size))
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_var.clamp_(min=0.05)  # channels without life would magnify rounding
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "convs", "example"),
    [
        ("fastvit_t8", 64, (68, 52), "stages.0.blocks.0.token_mixer.mixer.conv_kxk.0.conv"),
        ("repvit_m0_9", 64, (126, 103), "stages.0.blocks.0.token_mixer.conv.c"),
    ],
)
@torch.no_grad()
def test_a_model_has_as_many_convolutions_as_its_library_leaves_and_no_batch_norm(
    name, size, convs, example
):
    model = settled(timm.create_model(name, num_classes=10), size)
    library = reparameterize_model(model)

    graph = capture(model, noise(2, 3, size))

    counts = [
        sum(isinstance(module, nn.Conv2d) for module in whole.modules())
        for whole in (model, library)
    ]
    assert tuple(counts) == convs
    assert convs_and_norms(graph) == (convs[1], 0)
    assert {f"{example}.weight", f"{example}.bias"} <= set(graph.tensors())
    for batch in (1, 3):
        x = noise(batch, 3, size)
        assert relative_error(graph(x), model(x)) <= 1e-4
