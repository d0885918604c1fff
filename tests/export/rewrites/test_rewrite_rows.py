"""Rows that nothing reads: where they go, where they stay, and that nothing else changes."""

import pytest
import torch
from drawn import Drawing, extents
from frozen import assert_same_function, bytes_of, frozen_network, stored_weight, weighted
from small import assert_shapes_are_recorded, called

from vitcompress.export.rewrites import rewritten
from vitcompress.export.rewrites.rows import keep_needed_rows
from vitcompress.quantizers import PerChannel

aten = torch.ops.aten
END = 2**63 - 1
TOKENS, CHANNELS = 7, 6


def narrowed(before):
    """Return a copy that computes needed rows alone, and how many linears are narrower."""
    after = before.clone()
    count = keep_needed_rows(after)
    after.recompile()
    assert_same_function(before, after)
    assert_shapes_are_recorded(after)
    return after, count


# Networks


@pytest.mark.parametrize(
    ("name", "count", "rows"),
    [
        ("timm_vit", 4, 1),
        ("timm_deit_distilled", 4, 2),
        ("timm_beit", 0, None),
        ("hf_vit", 4, 1),
        ("timm_swin", 0, None),
    ],
)
def test_the_last_block_computes_what_the_head_reads(name, count, rows):
    before = frozen_network(name)

    found = rewritten(before)

    assert_same_function(before, found.graph)
    assert_shapes_are_recorded(found.graph)
    assert found.changed["keep_needed_rows"] == count
    tokens = [extents(node)[1] for node in called(found.graph, "linear") if rank(node) == 3]
    assert tokens.count(rows) == count


def rank(node):
    return len(extents(node))


def test_keys_and_values_are_computed_for_every_token():
    found = rewritten(frozen_network("timm_vit")).graph

    tokens = {
        site: [extents(node)[1] for node in nodes]
        for site, nodes in weighted(found).items()
        if site.startswith("blocks.1.")
    }

    assert tokens == {
        "blocks.1.attn.qkv:weight[0:48]": [1],
        "blocks.1.attn.qkv:weight[48:96]": [5],
        "blocks.1.attn.qkv:weight[96:144]": [5],
        "blocks.1.attn.proj:weight": [1],
        "blocks.1.mlp.fc1:weight": [1],
        "blocks.1.mlp.fc2:weight": [1],
    }


def test_merged_rows_and_images_stop_the_way_back():
    """The library's own attention puts tokens first: rows and images become one axis."""
    found = rewritten(frozen_network("torchvision_vit"))

    assert found.changed["keep_needed_rows"] == 2
    assert_same_function(frozen_network("torchvision_vit"), found.graph)


# Drawn networks


@pytest.fixture
def draw():
    return Drawing(1, TOKENS, CHANNELS)


def tokens(draw):
    return draw(aten.select.int, draw.images, 1, 0)


def linear(draw, x, **spec):
    return draw(aten.linear.default, x, stored_weight(draw, CHANNELS, CHANNELS, **spec))


def body(draw):
    """Return tokens behind a linear and a norm that work on each row alone."""
    x = draw(aten.add.Tensor, tokens(draw), draw.stored(1, TOKENS, CHANNELS))
    return draw(aten.layer_norm.default, linear(draw, x), [CHANNELS])


@pytest.mark.parametrize(
    ("pick", "rows"),
    [
        ((aten.select.int, 1, 0), 1),
        ((aten.select.int, 1, 3), 1),
        ((aten.select.int, 1, -1), 1),
        ((aten.select.int, -2, -7), 1),
        ((aten.slice.Tensor, 1, 1, 3), 2),
        ((aten.slice.Tensor, 1, -3, -1), 2),
        ((aten.slice.Tensor, -2, 4, END), 3),
        ((aten.slice.Tensor, 1, 6, 99), 1),
    ],
    ids=lambda value: str(value).replace("aten.", ""),
)
def test_rows_at_any_place_are_kept(draw, pick, rows):
    target, *arguments = pick
    picked = draw(target, body(draw), *arguments)

    after, count = narrowed(draw.captured(linear(draw, picked)))

    assert count == 1
    assert extents(called(after, "linear")[0]) == ("B", rows, CHANNELS)
    assert extents(called(after, "layer_norm")[0]) == ("B", rows, CHANNELS)


@pytest.mark.parametrize(
    "pick",
    [
        (aten.slice.Tensor, 1, 0, TOKENS, 2),
        (aten.slice.Tensor, 1, 0, END),
        (aten.slice.Tensor, 1, 1, END),
        (aten.slice.Tensor, 1, -4, END),
        (aten.slice.Tensor, 2, 0, 2),
        (aten.select.int, 2, 0),
        (aten.slice.Tensor, 1, 3, 3),
        (aten.mean.dim, [1]),
        (aten.roll.default, [1], [1]),
    ],
    ids=lambda value: str(value[0]).replace("aten.", "") + str(value[1:]),
)
def test_what_picks_no_range_of_few_rows_leaves_all(draw, pick):
    target, *arguments = pick
    before = draw.captured(draw(target, body(draw), *arguments))
    after = before.clone()

    assert keep_needed_rows(after) == 0
    assert len(after.graph.nodes) == len(before.graph.nodes)


def test_two_readers_need_the_range_that_holds_both(draw):
    x = body(draw)
    first, last = (draw(aten.select.int, x, 1, index) for index in (1, 3))

    after, count = narrowed(draw.captured(draw(aten.add.Tensor, first, last)))

    assert count == 1
    assert extents(called(after, "linear")[0])[1] == 3
    # The first row that is left is the second.
    assert [node.args[2] for node in called(after, "select")[1:]] == [0, 2]


def test_readers_of_different_rows_behind_a_reshape_get_theirs(draw):
    """The reshape's operand is narrow already, but not as narrow."""
    x = body(draw)
    picked = []
    for index in (0, 2):
        heads = draw(aten.reshape.default, x, [-1, TOKENS, 2, 3])
        back = draw(aten.reshape.default, draw(aten.gelu.default, heads), [-1, TOKENS, 6])
        picked.append(draw(aten.select.int, linear(draw, back), 1, index))

    after, count = narrowed(draw.captured(*picked))

    assert count == 3
    assert [extents(node)[1] for node in called(after, "linear")] == [3, 1, 1]


def test_one_output_that_needs_every_token_keeps_them(draw):
    x = body(draw)
    outputs = [draw(aten.select.int, x, 1, 0), draw(aten.mean.dim, x, [1])]
    before = draw.captured(*outputs)

    assert keep_needed_rows(before.clone()) == 0


def test_an_output_of_all_tokens_keeps_them(draw):
    x = body(draw)
    before = draw.captured(draw(aten.select.int, x, 1, 0), x)

    assert keep_needed_rows(before.clone()) == 0


def test_a_residual_that_is_read_elsewhere_is_cut_for_the_sum_alone(draw):
    x = body(draw)
    total = draw(aten.add.Tensor, x, linear(draw, x))
    outputs = [draw(aten.select.int, total, 1, 0), draw(aten.mean.dim, x, [1])]

    after, count = narrowed(draw.captured(*outputs))

    assert count == 1
    assert [extents(node)[1] for node in called(after, "linear")] == [TOKENS, 1]
    assert len(called(after, "slice")) == 1  # the sum and the linear read the same one


def test_a_product_of_a_value_with_itself_needs_all_of_it(draw):
    x = body(draw)
    probs = draw(aten.softmax.int, draw(aten.matmul.default, x, transposed(draw, x)), -1)
    twice = draw(aten.matmul.default, probs, probs)
    mixed = linear(draw, draw(aten.matmul.default, twice, x))

    after, count = narrowed(draw.captured(draw(aten.select.int, mixed, 1, 0)))

    assert count == 1
    scores, rollout, attended = called(after, "matmul")
    assert [extents(node)[1] for node in (scores, rollout, attended)] == [TOKENS, 1, 1]


def transposed(draw, x):
    return draw(aten.transpose.int, x, 1, 2)


def test_a_softmax_over_tokens_needs_them_all(draw):
    x = draw(aten.softmax.int, body(draw), 1)

    assert keep_needed_rows(draw.captured(draw(aten.select.int, x, 1, 0))) == 0


def test_a_norm_over_tokens_needs_them_all(draw):
    x = draw(aten.layer_norm.default, body(draw), [TOKENS, CHANNELS])

    assert keep_needed_rows(draw.captured(draw(aten.select.int, x, 1, 0))) == 0


def test_groups_that_are_no_rows_any_more_are_left_alone(draw):
    x = draw(aten.reshape.default, body(draw), [-1, 6, TOKENS])
    x = draw(aten.reshape.default, draw(aten.gelu.default, x), [-1, TOKENS, CHANNELS])

    assert keep_needed_rows(draw.captured(draw(aten.select.int, x, 1, 0))) == 0


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_batch_in_an_extent_or_inferred_is_the_same(draw, batch_first):
    heads = [-1, TOKENS, 2, 3] if batch_first else [draw.batch, -1, 2, 3]
    x = draw(aten.gelu.default, draw(aten.reshape.default, body(draw), heads))
    x = draw(aten.reshape.default, x, [draw.batch, TOKENS, -1])

    after, count = narrowed(draw.captured(draw(aten.select.int, x, 1, 2)))

    assert count == 1
    assert extents(called(after, "linear")[0])[1] == 1


def test_axes_that_are_cut_and_joined_behind_the_rows_keep_them(draw):
    x = draw(aten.unflatten.int, body(draw), 2, [2, 3])
    x = draw(aten.flatten.using_ints, draw(aten.gelu.default, x), 2)

    after, count = narrowed(draw.captured(draw(aten.select.int, x, 1, 2)))

    assert count == 1
    assert extents(called(after, "linear")[0])[1] == 1


@pytest.mark.parametrize("extents_", [[1, TOKENS], [TOKENS, 1]])
def test_rows_that_a_cut_states_are_left_alone(draw, extents_):
    x = draw(aten.unflatten.int, body(draw), 1, extents_)
    x = draw(aten.flatten.using_ints, draw(aten.gelu.default, x), 1, 2)

    assert keep_needed_rows(draw.captured(draw(aten.select.int, x, 1, 2))) == 0


# Quantizers


def test_a_quantizer_that_others_read_whole_is_copied_for_rows_once(draw):
    """As in front of query, key and value, and two linears that read the query's rows."""
    value = bytes_of(draw, body(draw), "input")
    first, second, whole = (linear(draw, value) for _ in range(3))
    outputs = [draw(aten.select.int, node, 1, 1) for node in (first, second)]
    outputs.append(draw(aten.mean.dim, whole, [1]))

    after, count = narrowed(draw.captured(*outputs))

    assert count == 2
    assert sites(after) == ["input", "input:rows"]
    copies = [node for node in after.nodes_of_kind("call_module") if "rows" in node.target]
    (copy,) = copies
    assert len(copy.users) == 2
    assert extents(copy) == ("B", 1, CHANNELS)
    assert copy.args[0].target is aten.slice.Tensor


def sites(graph):
    return [q.site for q in graph.quantizers().values() if not q.frozen]


def test_readers_of_other_rows_get_copies_of_their_own(draw):
    value = bytes_of(draw, body(draw), "input")
    first, second, whole = (linear(draw, value) for _ in range(3))
    outputs = [
        draw(aten.select.int, first, 1, 1),
        draw(aten.slice.Tensor, second, 1, 2, 4),
        draw(aten.mean.dim, whole, [1]),
    ]

    after, count = narrowed(draw.captured(*outputs))

    assert count == 2
    assert sorted(sites(after)) == ["input", "input:rows", "input:rows.1"]


@pytest.mark.parametrize("axis", [-1, 2])
def test_scales_by_channels_are_kept_with_the_rows(draw, axis):
    value = by_axis(draw, body(draw), axis, CHANNELS)

    after, count = narrowed(draw.captured(draw(aten.select.int, linear(draw, value), 1, 2)))

    assert count == 2
    assert [extents(node)[1] for node in called(after, "linear")] == [1, 1]


@pytest.mark.parametrize("axis", [1, -2])
def test_scales_by_rows_need_every_row(draw, axis):
    value = by_axis(draw, body(draw), axis, TOKENS)

    after, count = narrowed(draw.captured(draw(aten.select.int, linear(draw, value), 1, 2)))

    assert count == 1
    assert [extents(node)[1] for node in called(after, "linear")] == [TOKENS, 1]
    assert sites(after) == ["input"]


def by_axis(draw, value, axis, count):
    quantized = bytes_of(draw, value, "input", granularity=PerChannel(axis))
    quantizer = draw._tensors[quantized.target]
    quantizer.load(
        scale=torch.linspace(0.02, 0.05, count), zero_point=torch.full((count,), 128.0)
    )
    return quantized
