import pytest
import torch
import torch.nn.functional as F

from vitcompress.graph.kernels import (
    Convolution,
    common_window,
    embed_kernel,
    fused_convolution,
    identity,
)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def run(convolution, x):
    kind = {3: F.conv1d, 4: F.conv2d}[x.dim()]
    c = convolution
    return kind(x, c.weight, stride=c.stride, padding=c.padding, groups=c.groups)


# The common window


@pytest.mark.parametrize(
    ("kernels", "paddings", "extent", "padding"),
    [
        ([(1, 1), (3, 3)], [(0, 0), (1, 1)], (3, 3), (1, 1)),
        ([(3, 3), (7, 7)], [(1, 1), (3, 3)], (7, 7), (3, 3)),
        ([(1, 3), (3, 1)], [(0, 1), (1, 0)], (3, 3), (1, 1)),
        # Behind a stride of 2, a kernel of 2 without padding begins where 3 has its centre.
        ([(2, 2), (3, 3)], [(0, 0), (1, 1)], (3, 3), (1, 1)),
        # Neither holds the other: one reaches further back, the other further ahead.
        ([(4,), (4,)], [(0,), (1,)], (5,), (1,)),
    ],
)
def test_the_common_window_by_hand(kernels, paddings, extent, padding):
    assert common_window(kernels, paddings) == (extent, padding)


def test_a_point_goes_to_the_centre_of_three():
    weight = torch.tensor([[[[5.0]]]])

    found = embed_kernel(weight, (1, 1), (3, 3))

    assert found.tolist() == [[[[0, 0, 0], [0, 5, 0], [0, 0, 0]]]]


def test_three_goes_to_the_middle_of_seven():
    weight = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3)

    found = embed_kernel(weight, (2, 2), (7, 7))

    assert found[0, 0, 2:5, 2:5].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert found.sum() == 45


def test_a_kernel_goes_where_its_offset_says_on_each_axis():
    weight = torch.tensor([[[[1.0, 2.0]]]])

    found = embed_kernel(weight, (2, 1), (3, 4))

    assert found.tolist() == [[[[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 2, 0]]]]


# Sums


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("axes", [1, 2])
def test_the_identity_copies_its_input(groups, axes):
    x = double(2, 6, *[5] * axes)

    copy = identity(6, groups, axes)

    assert copy.weight.shape == (6, 6 // groups, *[1] * axes)
    assert torch.equal(run(copy, x), x)


@pytest.mark.parametrize(
    ("windows", "stride"),
    [
        ([(3, 1), (1, 0)], 1),
        ([(7, 3), (3, 1)], 1),
        ([(7, 3), (3, 1)], 2),
        ([(2, 0), (3, 1)], 2),
        ([((1, 3), (0, 1)), ((3, 1), (1, 0)), (3, 1)], 1),
        ([((3, 5), (1, 2)), ((3, 1), (1, 0))], 2),
    ],
)
def test_the_fused_convolution_is_the_sum(windows, stride):
    def pair(extent):
        return (extent, extent) if isinstance(extent, int) else extent

    windows = [(pair(kernel), pair(padding)) for kernel, padding in windows]
    x = double(2, 4, 10, 8)
    parts = [
        (double(6), Convolution(double(6, 2, *kernel), padding, (stride, stride), 2))
        for kernel, padding in windows
    ]
    expected = sum(scale.reshape(-1, 1, 1) * run(part, x) for scale, part in parts)

    fused = fused_convolution(parts)

    torch.testing.assert_close(run(fused, x), expected)


def test_one_factor_may_serve_every_channel():
    parts = [(double(1), Convolution(double(4, 4, 3), (1,), (1,), 1)) for _ in range(2)]
    x = double(2, 4, 7)

    found = run(fused_convolution(parts), x)

    torch.testing.assert_close(found, sum(scale * run(part, x) for scale, part in parts))


@pytest.mark.parametrize(
    "other",
    [
        Convolution(torch.ones(4, 2, 3), (1,), (2,), 2),
        Convolution(torch.ones(4, 4, 3), (1,), (1,), 1),
    ],
    ids=["stride", "groups"],
)
def test_strides_and_groups_must_agree(other):
    one = torch.ones(1, dtype=torch.float64)
    first = Convolution(double(4, 2, 3), (1,), (1,), 2)

    assert fused_convolution([(one, first), (one, first)]) is not None
    assert fused_convolution([(one, first), (one, other)]) is None


def test_strips_are_not_fused_into_a_square():
    one = torch.ones(1, dtype=torch.float64)
    row = (one, Convolution(double(4, 1, 1, 7), (0, 3), (1, 1), 4))
    column = (one, Convolution(double(4, 1, 7, 1), (3, 0), (1, 1), 4))
    square = (one, Convolution(double(4, 1, 7, 7), (3, 3), (1, 1), 4))

    assert fused_convolution([row, column]) is None
    assert fused_convolution([row, column, square]) is not None
