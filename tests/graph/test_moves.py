"""Chains that only move values: found by positions, whatever they are spelled like."""

import random
from operator import getitem

import pytest
import torch
from drawn import Drawing, assert_same_outputs, extents
from small import assert_shapes_are_recorded, operations

from vitcompress.graph.metadata import TensorInfo
from vitcompress.graph.moves import (
    UnknownMoveError,
    moves_behind,
    positions_of,
    probe_shape,
    sent_through,
    simplify_moves,
)

aten = torch.ops.aten


@pytest.fixture
def draw():
    return Drawing(4, 6, 10)


def simplified(draw, *outputs):
    """Return the operations that are left, and how many chains were replaced."""
    before = draw.captured(*outputs)
    after = before.clone()
    count = simplify_moves(after)
    after.recompile()
    assert_same_outputs(before, after, tolerance=0.0)
    assert_shapes_are_recorded(after)
    return [name for name in operations(after) if name != "sym_size"], count


# Shapes and positions


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (("B", 4, 6), (2, 4, 6)),
        (("12*B", 3), (24, 3)),
        ((1, 5), (1, 5)),
        (("B//2", 4), None),
        (("B + 1", 4), None),
        (("B*B", 4), None),
    ],
)
def test_extents_are_multiples_of_the_probing_batch(shape, expected):
    assert probe_shape(TensorInfo(shape, "float32")) == expected


def test_extents_at_another_batch():
    assert probe_shape(TensorInfo(("3*B", 4), "float32"), batch=101) == (303, 4)


def test_positions_count_the_values_of_two_images(draw):
    found = positions_of(draw.images)

    assert found.shape == (2, 4, 6, 10)
    assert torch.equal(found.flatten(), torch.arange(480, dtype=torch.float64))


def test_positions_need_extents_that_are_multiples_of_the_batch(draw):
    draw.images.meta["info"] = TensorInfo(("B + 1", 4), "float32")

    with pytest.raises(UnknownMoveError, match="depends on the batch in another way"):
        positions_of(draw.images)


def test_a_chain_is_what_moves_values_up_to_a_node(draw):
    gelu = draw(aten.gelu.default, draw.images)
    parts = draw(aten.unbind.int, draw(aten.transpose.int, gelu, 2, 3), 1)
    last = draw(aten.unsqueeze.default, draw(getitem, parts, 1), 1)

    chain = moves_behind(last)

    assert [node.name for node in chain] == [
        *("transpose_int", "unbind_int", "getitem", "unsqueeze_default"),
    ]
    positions = positions_of(gelu)
    expected = positions.transpose(2, 3)[:, 1, None]
    assert torch.equal(sent_through(chain, gelu, positions), expected)


def test_one_of_several_results_of_an_operation_is_no_move(draw):
    largest = draw(getitem, draw(aten.max.dim, draw.images, 1), 0)
    last = draw(aten.unsqueeze.default, largest, 1)

    assert moves_behind(last) == [last]


# What a chain may read


def test_a_chain_reads_stored_tensors_and_what_grows_of_them_with_the_batch(draw):
    table = draw.stored(1, 4, 6, 10)
    grown = draw(aten.expand.default, table, [draw.batch, -1, -1, -1])
    added = draw(aten.add.Tensor, draw.images, draw(aten.mul.Tensor, grown, 2.0))
    zeros = torch.zeros(2, 4, 6, 10)
    stored = draw.captured(added).parameter

    found = sent_through([added], draw.images, zeros, stored)

    assert torch.equal(found, 2 * stored("stored_0").expand(2, -1, -1, -1))


def test_a_chain_that_reads_a_stored_tensor_is_unknown_where_none_is_given(draw):
    added = draw(aten.add.Tensor, draw.images, draw.stored(1, 4, 6, 10))

    with pytest.raises(UnknownMoveError, match="it depends on stored_0"):
        sent_through([added], draw.images, torch.zeros(2, 4, 6, 10))


def test_a_chain_that_reads_another_value_of_the_image_is_unknown(draw):
    other = draw(aten.gelu.default, draw.images)
    added = draw(aten.add.Tensor, draw.images, other)

    with pytest.raises(UnknownMoveError, match="it depends on gelu"):
        sent_through([added], draw.images, torch.zeros(2, 4, 6, 10), lambda name: None)


# Chains that are replaced


def test_a_chain_in_order_becomes_one_reshape(draw):
    x = draw(aten.reshape.default, draw.images, [draw.batch, 24, 10])
    x = draw(aten.unsqueeze.default, x, 1)
    x = draw(aten.flatten.using_ints, x, 2)

    assert simplified(draw, draw(aten.gelu.default, x)) == (["reshape", "gelu"], 1)


def test_a_chain_that_ends_as_it_began_goes(draw):
    x = draw(aten.transpose.int, draw(aten.transpose.int, draw.images, 1, 3), 1, 3)

    assert simplified(draw, draw(aten.gelu.default, x)) == (["gelu"], 1)


def test_one_move_that_does_nothing_goes(draw):
    x = draw(aten.reshape.default, draw.images, [-1, 4, 6, 10])

    assert simplified(draw, draw(aten.gelu.default, x)) == (["gelu"], 1)


def test_a_chain_in_front_of_the_output_is_replaced(draw):
    x = draw(aten.permute.default, draw.images, [0, 2, 1, 3])
    x = draw(aten.permute.default, x, [0, 2, 1, 3])

    assert simplified(draw, x) == ([], 1)


def test_extents_that_are_multiples_of_the_batch_are_inferred(draw):
    x = draw(aten.reshape.default, draw.images, [-1, 6, 10])
    x = draw(aten.unsqueeze.default, x, 1)

    assert extents(x) == ("4*B", 1, 6, 10)
    assert simplified(draw, draw(aten.gelu.default, x)) == (["reshape", "gelu"], 1)


def test_neighbourhoods_of_one_value_are_in_order(draw):
    """``im2col`` knows floats alone."""
    x = draw(aten.im2col.default, draw.images, [1, 1], [1, 1], [0, 0], [1, 1])
    x = draw(aten.unsqueeze.default, x, 1)

    assert simplified(draw, draw(aten.gelu.default, x)) == (["reshape", "gelu"], 1)


def test_what_others_read_in_the_middle_of_a_chain_stays(draw):
    middle = draw(aten.transpose.int, draw.images, 1, 2)
    last = draw(aten.transpose.int, middle, 1, 2)

    found = simplified(draw, draw(aten.gelu.default, middle), draw(aten.sigmoid.default, last))

    assert found == (["transpose", "gelu", "sigmoid"], 1)


# Chains that stay


def chains_that_stay():
    def another_order(draw):
        x = draw(aten.permute.default, draw.images, [0, 2, 3, 1])
        return draw(aten.reshape.default, x, [-1, 60, 4])

    def one_reshape(draw):
        return draw(aten.reshape.default, draw.images, [-1, 240])

    def fewer_values(draw):
        x = draw(aten.slice.Tensor, draw.images, 1, 0, 2)
        return draw(aten.flatten.using_ints, x, 1)

    def more_values(draw):
        x = draw(aten.unsqueeze.default, draw.images, 1)
        return draw(aten.expand.default, x, [-1, 3, -1, -1, -1])

    def rolled(draw):
        x = draw(aten.roll.default, draw.images, [1], [3])
        return draw(aten.flatten.using_ints, x, 1)

    def overlapping_neighbourhoods(draw):
        x = draw(aten.im2col.default, draw.images, [3, 3], [1, 1], [1, 1], [1, 1])
        return draw(aten.unsqueeze.default, x, 1)

    def as_another_value(draw):
        x = draw(aten.flatten.using_ints, draw.images, 1)
        other = draw(aten.gelu.default, draw.images)
        return draw(aten.view_as.default, x, other)

    def two_extents_of_the_batch(draw):
        rows = draw(aten.flatten.using_ints, draw.images, 1)
        square = draw(aten.mm.default, rows, draw(aten.permute.default, rows, [1, 0]))
        x = draw(aten.unsqueeze.default, square, 0)
        return draw(aten.squeeze.dim, draw(aten.unsqueeze.default, x, 0), 0)

    return list(locals().values())


@pytest.mark.parametrize("chain", chains_that_stay(), ids=lambda chain: chain.__name__)
def test_a_chain_that_is_more_than_a_reshape_stays(draw, chain):
    last = draw(aten.gelu.default, chain(draw))

    left, count = simplified(draw, last)

    assert count == 0
    assert len(left) == len([n for n in draw.graph.nodes if n.op == "call_function"]) - 1


# Random chains


def random_move(draw, x, choice):
    """Return a move of a value, if a randomly chosen one is possible."""
    rank, shape = x.meta["info"].shape.__len__(), draw.shape(x)
    axis = choice.randrange(1, rank) if rank > 1 else 0
    kinds = ["permute", "transpose", "reshape", "unsqueeze", "slice", "roll", "flatten"]
    kind = choice.choice([*kinds, "squeeze", "select", "unbind", "expand"])
    if kind == "permute":
        order = list(range(1, rank))
        choice.shuffle(order)
        return draw(aten.permute.default, x, [0, *order])
    if kind == "transpose":
        return draw(aten.transpose.int, x, axis, choice.randrange(1, rank) if rank > 1 else 0)
    if kind == "reshape":
        rest = list(shape[1:])
        if rest and rest[-1] % 2 == 0:
            rest[-1:] = [rest[-1] // 2, 2]
        elif len(rest) > 1:
            rest[:2] = [rest[0] * rest[1]]
        return draw(aten.reshape.default, x, [choice.choice([-1, draw.batch]), *rest])
    if kind == "unsqueeze":
        return draw(aten.unsqueeze.default, x, choice.randint(1, rank))
    if kind == "flatten" and rank > 2:
        return draw(aten.flatten.using_ints, x, 1, choice.randint(1, rank - 1))
    if kind == "squeeze":
        return draw(aten.squeeze.dim, x, axis)
    if kind == "expand" and 1 in shape[1:]:
        return draw(
            aten.expand.default, x, [-1, *(2 if extent == 1 else -1 for extent in shape[1:])]
        )
    if rank > 2 and shape[axis] > 1:
        if kind == "slice":
            return draw(aten.slice.Tensor, x, axis, choice.choice([0, 1, -2]), 2**63 - 1)
        if kind == "roll":
            return draw(aten.roll.default, x, [choice.randint(-1, shape[axis])], [axis])
        if kind == "select":
            return draw(aten.select.int, x, axis, choice.randrange(-shape[axis], shape[axis]))
        if kind == "unbind":
            parts = draw(aten.unbind.int, x, axis)
            return draw(getitem, parts, choice.randrange(shape[axis]))
    return x


def test_random_chains_move_values_to_the_same_places():
    replaced = 0
    for seed in range(150):
        choice, draw = random.Random(seed), Drawing(2, 4, 3)
        x, outputs = draw.images, []
        for _ in range(choice.randint(1, 10)):
            x = random_move(draw, x, choice)
            if choice.random() < 0.15:
                outputs.append(draw(aten.gelu.default, x))
            if choice.random() < 0.15:
                x = draw(aten.sigmoid.default, x)

        replaced += simplified(draw, *outputs, x)[1]

    assert replaced > 50
