"""Query, key and value as columns of projections, in whatever spelling."""

import pytest
import torch
from drawn import Drawing

from vitcompress.graph.moves import UnknownMoveError
from vitcompress.graph.patterns import attentions
from vitcompress.graph.projections import NotProjectedError, projected_operands

aten = torch.ops.aten

TOKENS, HEADS, DIM = 5, 2, 3
WIDTH = HEADS * DIM


@pytest.fixture
def draw():
    return Drawing(1, TOKENS, WIDTH)


def tokens(draw):
    return draw(aten.select.int, draw.images, 1, 0)


def linear(draw, x, width=WIDTH):
    return draw(aten.linear.default, x, draw.stored(width, draw.shape(x)[-1]))


def by_heads(draw, x, rows=TOKENS, dim=DIM):
    parts = draw(aten.reshape.default, x, [-1, rows, HEADS, dim])
    return draw(aten.permute.default, parts, [0, 2, 1, 3])


def columns(draw, x, start, stop):
    return draw(aten.slice.Tensor, x, 2, start, stop)


def core(draw, q, k, v):
    """Return what is found of ``softmax(q k^T) v`` from ``[B, H, N, D]`` each."""
    scores = draw(aten.matmul.default, q, draw(aten.transpose.int, k, -2, -1))
    output = draw(aten.matmul.default, draw(aten.softmax.int, scores, -1), v)
    (found,) = attentions(draw.captured(output))
    return projected_operands(found)


def test_columns_of_one_projection_lie_where_they_were_cut(draw):
    joint = linear(draw, tokens(draw), 3 * WIDTH)
    # Value first: positions are found, not assumed.
    order = {"v": 0, "q": WIDTH, "k": 2 * WIDTH}
    parts = {
        name: by_heads(draw, columns(draw, joint, start, start + WIDTH))
        for name, start in order.items()
    }

    found = core(draw, parts["q"], parts["k"], parts["v"])

    assert {o.base for o in (found.query, found.key, found.value)} == {joint}
    assert [o.start for o in (found.query, found.key, found.value)] == [6, 12, 0]
    assert [o.width for o in (found.query, found.key, found.value)] == [WIDTH] * 3
    assert (found.heads, found.tokens, found.factor) == (HEADS, TOKENS, 1.0)
    assert found.value.node is parts["v"]


def test_three_projections_are_whole(draw):
    x = tokens(draw)
    linears = [linear(draw, x) for _ in range(3)]

    found = core(draw, *(by_heads(draw, y) for y in linears))

    assert [o.base for o in (found.query, found.key, found.value)] == linears
    assert [o.start for o in (found.query, found.key, found.value)] == [0, 0, 0]
    assert not any(o.tokens_first for o in (found.query, found.key, found.value))


def test_fewer_queries_and_wider_values_are_found(draw):
    x = tokens(draw)
    row = draw(aten.slice.Tensor, x, 1, 0, 1)
    q = by_heads(draw, linear(draw, row), rows=1)
    v = by_heads(draw, linear(draw, x, HEADS * 4), dim=4)

    found = core(draw, q, by_heads(draw, linear(draw, x)), v)

    assert (found.tokens, found.query.width, found.value.width) == (1, WIDTH, HEADS * 4)


def test_a_number_that_the_query_is_multiplied_with_is_a_factor(draw):
    x = tokens(draw)
    q, k, v = (by_heads(draw, linear(draw, x)) for _ in range(3))

    found = core(draw, draw(aten.mul.Tensor, q, 0.25), k, v)

    assert found.factor == 0.25
    assert found.query.node is q


def test_tokens_in_front_of_images_are_noticed(draw):
    moved = draw(aten.permute.default, tokens(draw), [1, 0, 2])

    def heads(x):
        parts = draw(aten.reshape.default, x, [TOKENS, -1, HEADS, DIM])
        return draw(aten.permute.default, parts, [1, 2, 0, 3])

    found = core(draw, *(heads(linear(draw, moved)) for _ in range(3)))

    assert found.query.tokens_first
    assert (found.key.start, found.key.width) == (0, WIDTH)


# What is none


def norm_behind(draw, x):
    return draw(aten.layer_norm.default, by_heads(draw, x), [DIM])


def heads_last(draw, x):
    """Channels are cut into heads the other way round: no columns of one head side by side."""
    parts = draw(aten.reshape.default, x, [-1, TOKENS, DIM, HEADS])
    return draw(aten.permute.default, parts, [0, 3, 1, 2])


def rolled(draw, x):
    return by_heads(draw, draw(aten.roll.default, x, [1], [1]))


@pytest.mark.parametrize(
    ("arranged", "reason"),
    [
        (norm_behind, "layer_norm.* is no projection of tokens"),
        (heads_last, "is arranged in another way"),
        (rolled, "is arranged in another way"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_operand_that_is_no_columns_is_refused(draw, arranged, reason, place):
    x = tokens(draw)
    makers = [by_heads] * 3
    makers[place] = arranged

    with pytest.raises(NotProjectedError, match=reason):
        core(draw, *(make(draw, linear(draw, x)) for make in makers))


def test_one_head_of_three_axes_is_refused(draw):
    x = tokens(draw)

    with pytest.raises(NotProjectedError, match="other than four axes"):
        core(draw, *(linear(draw, x) for _ in range(3)))


def test_an_arrangement_as_another_value_is_unknown(draw):
    x = tokens(draw)
    q, k, v = (linear(draw, x) for _ in range(3))
    like = draw(aten.gelu.default, by_heads(draw, q))
    parts = draw(aten.view_as.default, q, like)

    with pytest.raises(UnknownMoveError, match="it depends on gelu"):
        core(draw, parts, by_heads(draw, k), by_heads(draw, v))
