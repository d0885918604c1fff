"""Where an axis goes, worked out by hand. ``B`` is the batch; extents are mostly unequal."""

import pytest
import torch
from torch import fx

from vitcompress.graph.axes import moved_axis
from vitcompress.graph.metadata import TensorInfo

aten = torch.ops.aten

RESHAPE = aten.reshape.default


def moved(before, target, arguments, after, axis):
    """Return where an axis of ``before`` is behind an operation that yields ``after``."""
    graph = fx.Graph()
    source = graph.placeholder("x")
    source.meta["info"] = TensorInfo(before, "float32")
    node = graph.call_function(target, (source, *arguments))
    if after is not None:
        node.meta["info"] = TensorInfo(after, "float32")
    return moved_axis(node, source, axis)


def all_moved(before, target, arguments, after):
    return [moved(before, target, arguments, after, axis) for axis in range(len(before))]


# Reshape


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # Splitting: the other axes keep what lies behind them.
        (("B", 16, 12), ("B", 16, 3, 4), [0, 1, None]),
        (("B", 12, 16), ("B", 3, 4, 16), [0, None, 3]),
        # Merging.
        (("B", 3, 4, 16), ("B", 12, 16), [0, None, None, 2]),
        (("B", 16, 3, 4), ("B", 16, 12), [0, 1, None, None]),
        (("B", 8, 5, 5), ("B", 200), [0, None, None, None]),
        # Splitting one and merging others at the same time.
        (("B", 2, 6, 8), ("B", 12, 2, 4), [0, None, None, None]),
        # An extent that depends on the batch is split or merged like any other.
        (("B", 16, 12), ("16*B", 12), [None, None, 1]),
        (("4*B", 9, 12), ("B", 4, 9, 12), [None, 2, 3]),
        (("4*B", 9, 12), ("4*B", 3, 3, 12), [0, None, 3]),
        # An axis behind the batch, in front of it.
        ((3, "B", 5), (3, "B", 5, 1), [0, 1, 2]),
        # An axis of extent 1 beside has as much behind it, but is another.
        (("B", 7, 1), ("B", 7), [0, 1, None]),
        (("B", 1, 7), ("B", 7), [0, None, 1]),
        (("B", 7), ("B", 1, 7, 1), [0, 2]),
        (("B", 7, 5), ("B", 7, 1, 5), [0, 1, 3]),
        # The same number of elements, but in other rows.
        (("B", 6, 4), ("B", 4, 6), [0, None, None]),
    ],
)
def test_reshape_keeps_an_axis_with_as_much_behind_it(before, after, expected):
    assert all_moved(before, RESHAPE, (list(after),), after) == expected


@pytest.mark.parametrize(
    ("target", "arguments", "after"),
    [
        (aten.flatten.using_ints, (2,), ("B", 4, 30)),
        (aten.view.default, ([-1, 4, 30],), ("B", 4, 30)),
    ],
)
def test_every_spelling_of_reshape_counts(target, arguments, after):
    assert all_moved(("B", 4, 5, 6), target, arguments, after) == [0, 1, None, None]


def test_unsqueeze_and_squeeze_shift_the_axes_behind():
    assert all_moved(("B", 5, 6), aten.unsqueeze.default, (1,), ("B", 1, 5, 6)) == [0, 2, 3]
    assert all_moved(("B", 1, 6), aten.squeeze.dim, (1,), ("B", 6)) == [0, None, 1]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((1, 5, 6), ("B", 5, 6), [None, 1, 2]),
        # The new axis has the extent of the old one and nothing behind it.
        (("B", 4, 1), ("B", 4, 4), [0, 1, None]),
        ((4, 1), ("B", 4, 4), [1, None]),
        ((5, 6), ("B", 5, 6), [1, 2]),
    ],
)
def test_expand_keeps_the_axes_that_it_does_not_repeat(before, after, expected):
    assert all_moved(before, aten.expand.default, (list(after),), after) == expected
    assert all_moved(before, aten.expand_as.default, ("other",), after) == expected


# Permutations


def test_permute_takes_axes_along():
    arguments, after = ([0, 2, 3, 1],), ("B", 5, 6, 4)

    assert all_moved(("B", 4, 5, 6), aten.permute.default, arguments, after) == [0, 3, 1, 2]


def test_negative_positions_count_from_the_end():
    arguments, after = ([0, -1, -3, -2],), ("B", 6, 4, 5)

    assert all_moved(("B", 4, 5, 6), aten.permute.default, arguments, after) == [0, 2, 3, 1]


def test_transpose_swaps_two_axes():
    found = all_moved(("B", 4, 5, 6), aten.transpose.int, (1, 3), ("B", 6, 5, 4))
    negative = all_moved(("B", 4, 5, 6), aten.transpose.int, (-1, -2), ("B", 4, 6, 5))

    assert found == [0, 3, 2, 1]
    assert negative == [0, 1, 3, 2]


# Roll, slice, select, pad


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (([2, 2], [1, 2]), [0, None, None, 3]),
        (([2], [-1]), [0, 1, 2, None]),
        # Without axes the tensor is flattened first: nothing stays in its row.
        (([2],), [None] * 4),
        (([2], []), [None] * 4),
    ],
)
def test_roll_loses_the_axes_that_it_rolls(arguments, expected):
    shape = ("B", 4, 5, 6)

    assert all_moved(shape, aten.roll.default, arguments, shape) == expected


@pytest.mark.parametrize(
    ("target", "arguments", "after", "expected"),
    [
        (aten.slice.Tensor, (1, 0, 2), ("B", 2, 5, 6), [0, None, 2, 3]),
        (aten.slice.Tensor, (-1, 0, 2), ("B", 4, 5, 2), [0, 1, 2, None]),
        (aten.narrow.default, (2, 1, 3), ("B", 4, 3, 6), [0, 1, None, 3]),
        # The axis is 0 where none is named.
        (aten.slice.Tensor, (), ("B", 4, 5, 6), [None, 1, 2, 3]),
    ],
)
def test_a_slice_loses_its_axis_and_no_other(target, arguments, after, expected):
    assert all_moved(("B", 4, 5, 6), target, arguments, after) == expected


@pytest.mark.parametrize(
    ("axis", "after", "expected"),
    [
        (1, ("B", 5, 6), [0, None, 1, 2]),
        (3, ("B", 4, 5), [0, 1, 2, None]),
        (-2, ("B", 4, 6), [0, 1, None, 2]),
    ],
)
def test_select_shifts_the_axes_behind(axis, after, expected):
    assert all_moved(("B", 4, 5, 6), aten.select.int, (axis, 0), after) == expected


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        # From the last axis, two widths for each.
        ([0, 0, 1, 2], [0, 1, None, 3]),
        ([1, 0], [0, 1, 2, None]),
        ([0, 0, 0, 0, 0, 1], [0, None, 2, 3]),
        ([2, 0, 0, 0, 0, 1, 0, 0], [0, None, 2, None]),
    ],
)
@pytest.mark.parametrize("target", [aten.pad.default, aten.constant_pad_nd.default])
def test_padding_loses_the_axes_that_it_pads(target, widths, expected):
    shape = ("B", 4, 5, 6)

    assert all_moved(shape, target, (widths,), shape) == expected


# Others


@pytest.mark.parametrize(
    ("target", "arguments", "after"),
    [
        (aten.relu.default, (), ("B", 4, 5, 6)),
        (aten.mul.Tensor, (2.0,), ("B", 4, 5, 6)),
        (aten.repeat.default, ([1, 1, 1, 2],), ("B", 4, 5, 12)),
        (aten.mean.dim, ([1], True), ("B", 1, 5, 6)),
    ],
)
def test_an_operation_of_another_kind_says_nothing(target, arguments, after):
    assert all_moved(("B", 4, 5, 6), target, arguments, after) == [None] * 4


def test_a_value_of_unknown_shape_says_nothing():
    assert moved(("B", 4), RESHAPE, ([-1, 4],), None, 1) is None
