"""Joint projections in parts: which, with which rows of codes, and which stay whole."""

import pytest
import torch
from drawn import Drawing, extents
from frozen import assert_same_function, bytes_of, frozen_network, stored_weight, weighted
from small import assert_shapes_are_recorded, called

from vitcompress.export.rewrites.projections import separate_projections
from vitcompress.quantizers import PerChannel, PerGroup, PerTensor

aten = torch.ops.aten

TOKENS, HEADS, DIM = 5, 2, 3
WIDTH = HEADS * DIM
BY_ROWS = PerChannel(0)


def separated(before):
    """Return a copy with projections in parts, and of how many cores."""
    after = before.clone()
    count = separate_projections(after)
    after.recompile()
    assert_same_function(before, after)
    assert_shapes_are_recorded(after)
    return after, count


@pytest.mark.parametrize(
    ("name", "count", "joint"),
    [
        ("timm_vit", 2, 2),
        ("timm_swin", 3, 3),
        ("timm_pvt", 2, 2),  # query apart, key and value together
        ("torchvision_vit", 2, 2),  # tokens come first
    ],
)
def test_networks_have_as_many_joint_projections(name, count, joint):
    before = frozen_network(name)

    after, found = separated(before)

    assert found == count
    parts = [site for site in weighted(after) if site.endswith("]")]
    kept = 2 if name == "timm_pvt" else 3
    assert len(parts) == kept * joint


def test_parts_hold_the_codes_and_scales_of_the_whole_in_order():
    before = frozen_network("timm_vit")

    after, _ = separated(before)

    for block in (0, 1):
        site = f"blocks.{block}.attn.qkv:weight"
        parts = [f"{site}[{start}:{start + 48}]" for start in (0, 48, 96)]
        (whole,) = weighted(before)[site]
        linears = [weighted(after)[part][0] for part in parts]
        for argument in (1, 2):
            tensors = [tensor_of(after, linear.args[argument]) for linear in linears]
            assert torch.equal(torch.cat(tensors), tensor_of(before, whole.args[argument]))
        scales = [quantizer_of(after, linear).scale for linear in linears]
        assert torch.equal(torch.cat(scales), quantizer_of(before, whole).scale)
        assert len({linear.args[0] for linear in linears}) == 1


def tensor_of(graph, node):
    source = node if node.op == "get_attr" else node.args[0]
    return graph.parameter(str(source.target))


def quantizer_of(graph, linear):
    return graph.quantizers()[linear.args[1].target]


# Drawn attention


@pytest.fixture
def draw():
    return Drawing(1, TOKENS, WIDTH)


def joint(draw, granularity=BY_ROWS, rows=3 * WIDTH, bias=True):
    """Return a joint projection of quantized tokens."""
    x = bytes_of(draw, draw(aten.select.int, draw.images, 1, 0), "input")
    weight = stored_weight(draw, rows, WIDTH, granularity=granularity)
    return draw(aten.linear.default, x, weight, *([draw.stored(rows)] if bias else []))


def part(draw, projection, index, quantized=False):
    """Return query, key or value by heads; keys transposed."""
    x = draw(aten.slice.Tensor, projection, 2, index * WIDTH, (index + 1) * WIDTH)
    x = draw(aten.reshape.default, x, [-1, TOKENS, HEADS, DIM])
    x = draw(aten.permute.default, x, [0, 2, 3, 1] if index == 1 else [0, 2, 1, 3])
    return bytes_of(draw, x, f"operand_{index}") if quantized else x


def attended(draw, q, k, v):
    scores = draw(aten.matmul.default, q, k)
    return draw(aten.matmul.default, draw(aten.softmax.int, scores, -1), v)


@pytest.mark.parametrize(
    "granularity",
    [PerTensor(), BY_ROWS, PerGroup(2)],
    ids=["per_tensor", "per_channel", "per_group"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_scales_follow_their_rows(draw, granularity, bias):
    projection = joint(draw, granularity, bias=bias)
    operands = [part(draw, projection, index) for index in (0, 1, 2)]
    before = draw.captured(attended(draw, *operands))

    after, count = separated(before)

    assert count == 1
    linears = called(after, "linear")
    assert [extents(node) for node in linears] == [("B", TOKENS, WIDTH)] * 3
    assert [len(node.args) for node in linears] == [2 + bias] * 3
    whole = quantizer_of(before, called(before, "linear")[0])
    scales = [quantizer_of(after, linear).scale for linear in linears]
    if granularity == PerTensor():
        assert all(torch.equal(scale, whole.scale) for scale in scales)
    else:
        # Query, value, key: the order in which they are read.
        by_site = sorted(linears, key=lambda node: int(start_of(after, node)))
        found = torch.cat([quantizer_of(after, linear).scale for linear in by_site])
        assert torch.equal(found, whole.scale)


def start_of(graph, linear):
    site = quantizer_of(graph, linear).site
    return site.rpartition("[")[2].partition(":")[0]


def test_quantized_operands_are_looked_through_and_keep_their_quantizers(draw):
    projection = joint(draw)
    operands = [part(draw, projection, index, quantized=True) for index in (0, 1, 2)]

    after, count = separated(draw.captured(attended(draw, *operands)))

    assert count == 1
    sites = [q.site for q in after.quantizers().values() if not q.frozen]
    assert sorted(sites) == ["input", "operand_0", "operand_1", "operand_2"]


def test_key_and_value_together_become_two(draw):
    projection = joint(draw, rows=2 * WIDTH)
    weight = stored_weight(draw, WIDTH, WIDTH)
    query = draw(aten.linear.default, projection.args[0], weight)
    heads = draw(aten.reshape.default, query, [-1, TOKENS, HEADS, DIM])
    q = draw(aten.permute.default, heads, [0, 2, 1, 3])
    key = draw(aten.slice.Tensor, projection, 2, 0, WIDTH)
    key = draw(aten.reshape.default, key, [-1, TOKENS, HEADS, DIM])
    key = draw(aten.permute.default, key, [0, 2, 3, 1])
    value = part_of_two(draw, projection)

    after, count = separated(draw.captured(attended(draw, q, key, value)))

    assert count == 1
    assert len(called(after, "linear")) == 3


def part_of_two(draw, projection):
    x = draw(aten.slice.Tensor, projection, 2, WIDTH, 2 * WIDTH)
    x = draw(aten.reshape.default, x, [-1, TOKENS, HEADS, DIM])
    return draw(aten.permute.default, x, [0, 2, 1, 3])


def test_two_cores_may_share_a_projection(draw):
    """Four parts: two queries, and one key that is the value's neighbour for both."""
    projection = joint(draw, rows=4 * WIDTH)
    k, v = part(draw, projection, 1), part(draw, projection, 2)
    outputs = [attended(draw, part(draw, projection, index), k, v) for index in (0, 3)]

    after, count = separated(draw.captured(*outputs))

    assert count == 2
    assert len(called(after, "linear")) == 4


def projections_that_stay():
    def read_as_a_whole(draw, projection):
        return draw(aten.gelu.default, projection)

    def value_read_in_another_arrangement(draw, projection):
        """A convolution beside attention reads the value as an image."""
        x = draw(aten.slice.Tensor, projection, 2, 2 * WIDTH, 3 * WIDTH)
        return draw(aten.sigmoid.default, draw(aten.transpose.int, x, 1, 2))

    return list(locals().values())


@pytest.mark.parametrize("other", projections_that_stay(), ids=lambda made: made.__name__)
def test_a_projection_with_another_reader_is_computed_once(draw, other):
    projection = joint(draw)
    operands = [part(draw, projection, index) for index in (0, 1, 2)]
    before = draw.captured(attended(draw, *operands), other(draw, projection))
    after = before.clone()

    assert separate_projections(after) == 0
    assert len(called(after, "linear")) == 1


def test_another_reader_of_a_part_gets_it_as_well(draw):
    projection = joint(draw)
    operands = [part(draw, projection, index) for index in (0, 1, 2)]
    read = draw(aten.sigmoid.default, operands[2])

    after, count = separated(draw.captured(attended(draw, *operands), read))

    assert count == 1
    assert len(called(after, "linear")) == 3


def test_a_float_projection_stays(draw):
    x = draw(aten.select.int, draw.images, 1, 0)
    projection = draw(aten.linear.default, x, draw.stored(3 * WIDTH, WIDTH))
    operands = [part(draw, projection, index) for index in (0, 1, 2)]

    assert separate_projections(draw.captured(attended(draw, *operands))) == 0


def test_weights_that_are_no_codes_yet_stay(draw):
    projection = joint(draw)
    draw._tensors[projection.args[1].target].frozen = False
    operands = [part(draw, projection, index) for index in (0, 1, 2)]

    assert separate_projections(draw.captured(attended(draw, *operands))) == 0


def test_a_computed_bias_stays(draw):
    projection = joint(draw, bias=False)
    computed = draw(aten.mean.dim, draw(aten.flatten.using_ints, draw.images, 1), [0, 1])
    bias = draw(aten.expand.default, computed, [3 * WIDTH])
    projection = draw(aten.linear.default, *projection.args, bias)
    operands = [part(draw, projection, index) for index in (0, 1, 2)]

    assert separate_projections(draw.captured(attended(draw, *operands))) == 0


def test_a_projection_behind_a_quantizer_of_its_result_stays(draw):
    projection = bytes_of(draw, joint(draw), "joint")
    operands = [part(draw, projection, index) for index in (0, 1, 2)]

    assert separate_projections(draw.captured(attended(draw, *operands))) == 0
