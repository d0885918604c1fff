"""What may lie between scores and their softmax: a factor and a bias, found by trying."""

import pytest
import torch
from drawn import Drawing, assert_same_outputs
from fused import fused_graph

from vitcompress.export.onnx.attention import fusable_attentions

aten = torch.ops.aten

TOKENS, HEADS, DIM, WINDOWS = 4, 2, 3, 3
WIDTH = HEADS * DIM


@pytest.fixture
def draw():
    """Tokens of three windows of each image."""
    return Drawing(WINDOWS, TOKENS, WIDTH)


def attention(draw, path):
    """Return attention in windows, with ``path`` between the scores and the softmax."""
    x = draw(aten.reshape.default, draw.images, [-1, TOKENS, WIDTH])
    q, k, v = (by_heads(draw, x) for _ in range(3))
    scores = draw(aten.matmul.default, q, draw(aten.transpose.int, k, -2, -1))
    probs = draw(aten.softmax.int, path(draw, scores), -1)
    out = draw(aten.transpose.int, draw(aten.matmul.default, probs, v), 1, 2)
    out = draw(aten.reshape.default, out, [-1, TOKENS, WIDTH])
    return draw.captured(draw(aten.linear.default, out, draw.stored(WIDTH, WIDTH)))


def by_heads(draw, x):
    y = draw(aten.linear.default, x, draw.stored(WIDTH, WIDTH))
    y = draw(aten.reshape.default, y, [-1, TOKENS, HEADS, DIM])
    return draw(aten.permute.default, y, [0, 2, 1, 3])


def in_windows(draw, scores):
    return draw(aten.reshape.default, scores, [-1, WINDOWS, HEADS, TOKENS, TOKENS])


def together(draw, scores):
    return draw(aten.reshape.default, scores, [-1, HEADS, TOKENS, TOKENS])


# Fused


def paths_of_a_factor_and_a_bias():
    """Return functions, each with the factor and the shape of the bias that it adds."""

    def nothing(draw, scores):
        return scores

    def factor(draw, scores):
        return draw(aten.mul.Tensor, scores, 0.5)

    def divided(draw, scores):
        return draw(aten.div.Tensor, scores, 2.0)

    def factors_and_biases(draw, scores):
        """In any order: what is added first is multiplied as well."""
        x = draw(aten.add.Tensor, scores, draw.stored(1, HEADS, TOKENS, TOKENS))
        x = draw(aten.mul.Tensor, draw(aten.mul.Tensor, x, 0.25), 2.0)
        return draw(aten.sub.Tensor, x, draw.stored(TOKENS, TOKENS))

    def one_bias_for_all_heads(draw, scores):
        return draw(aten.add.Tensor, scores, draw.stored(TOKENS, TOKENS))

    def bias_in_front(draw, scores):
        return draw(aten.add.Tensor, draw.stored(1, HEADS, TOKENS, TOKENS), scores)

    def keys_that_are_left_out(draw, scores):
        mask = torch.zeros(TOKENS, TOKENS)
        mask[1:, 3] = -torch.inf
        return draw(aten.add.Tensor, scores, draw.tensor(mask))

    def mask_of_windows(draw, scores):
        x = in_windows(draw, scores)
        mask = draw.stored(WINDOWS, 1, TOKENS, TOKENS)
        return together(draw, draw(aten.add.Tensor, x, mask))

    def bias_of_heads_and_mask_of_windows(draw, scores):
        x = draw(aten.add.Tensor, scores, draw.stored(1, HEADS, TOKENS, TOKENS))
        return mask_of_windows(draw, x)

    def bias_of_windows_and_heads(draw, scores):
        """No sum of one of windows and one of heads."""
        x = in_windows(draw, scores)
        table = draw.stored(WINDOWS, HEADS, TOKENS, TOKENS)
        return together(draw, draw(aten.add.Tensor, x, table))

    def windows_that_are_left_out(draw, scores):
        mask = torch.zeros(WINDOWS, 1, TOKENS, TOKENS)
        mask[1, :, 1:, 0] = -torch.inf
        x = draw(aten.add.Tensor, in_windows(draw, scores), draw.tensor(mask))
        return together(draw, x)

    def mask_that_grows_with_the_batch(draw, scores):
        """The mask is repeated for each image before it is added."""
        mask = draw.stored(1, WINDOWS, 1, TOKENS, TOKENS)
        grown = draw(aten.expand.default, mask, [draw.batch, -1, -1, -1, -1])
        grown = draw(aten.reshape.default, grown, [-1, 1, TOKENS, TOKENS])
        return draw(aten.add.Tensor, scores, grown)

    table = (1, HEADS, TOKENS, TOKENS)
    windows = (WINDOWS, HEADS, TOKENS, TOKENS)
    return [
        (nothing, 1.0, None),
        (factor, 0.5, None),
        (divided, 0.5, None),
        (factors_and_biases, 0.5, table),
        (one_bias_for_all_heads, 1.0, table),
        (bias_in_front, 1.0, table),
        (keys_that_are_left_out, 1.0, table),
        (mask_of_windows, 1.0, windows),
        (bias_of_heads_and_mask_of_windows, 1.0, windows),
        (bias_of_windows_and_heads, 1.0, windows),
        (windows_that_are_left_out, 1.0, windows),
        (mask_that_grows_with_the_batch, 1.0, windows),
    ]


def name_of(value):
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(
    ("path", "scale", "shape"), paths_of_a_factor_and_a_bias(), ids=name_of
)
def test_a_factor_and_a_bias_are_found_in_any_spelling(draw, path, scale, shape):
    graph = attention(draw, path)

    (found,), reasons = fusable_attentions(graph)
    copy, count = fused_graph(graph)

    assert (count, reasons) == (1, {})
    assert found.scale == pytest.approx(scale)
    assert (None if found.bias is None else tuple(found.bias.shape)) == shape
    assert_same_outputs(graph, copy)


def test_a_bias_of_windows_and_heads_is_stored_as_the_sum_that_it_is(draw):
    """A table of every window and head would be much larger."""
    paths = {path.__name__: path for path, _, _ in paths_of_a_factor_and_a_bias()}
    graph = attention(draw, paths["bias_of_heads_and_mask_of_windows"])

    copy, _ = fused_graph(graph)

    stored = {name: value for name, value in copy.tensors().items() if "bias" in name}
    assert sorted(tuple(value.shape) for value in stored.values()) == [
        (1, HEADS, TOKENS, TOKENS),
        (WINDOWS, 1, TOKENS, TOKENS),
    ]


# Not fused


def bounded(limit):
    def clamped(draw, scores):
        return draw(aten.clamp.default, scores, -limit, limit)

    return clamped


def squared(draw, scores):
    return draw(aten.mul.Tensor, scores, scores)


def filled(value):
    def masked(draw, scores):
        mask = torch.zeros(TOKENS, TOKENS)
        mask[1:, 3] = 1
        keep = draw(aten.mul.Tensor, scores, draw.tensor(1 - mask))
        return draw(aten.add.Tensor, keep, draw.tensor(value * mask))

    return masked


def transposed(draw, scores):
    return draw(aten.transpose.int, scores, -2, -1)


def head_by_head(draw, scores):
    """A factor for each head is no number."""
    return draw(aten.mul.Tensor, scores, draw.tensor(torch.tensor([[[1.0]], [[2.0]]])))


CHANGED = "its scores are changed by more than a factor and a bias"


@pytest.mark.parametrize(
    "path",
    [
        *(bounded(limit) for limit in (1.0, 5.0, 100.0, 50000.0)),
        *(filled(value) for value in (-100.0, -1e4)),
        *(squared, transposed, head_by_head),
    ],
    ids=["1", "5", "100", "50000", "-100", "-10000", "squared", "transposed", "by head"],
)
def test_scores_that_are_bounded_or_changed_otherwise_are_not_fused(draw, path):
    found, reasons = fusable_attentions(attention(draw, path))

    assert (found, list(reasons.values())) == ([], [CHANGED])


def test_a_bias_of_each_image_is_not_fused(draw):
    def path(draw, scores):
        own = draw(aten.mean.dim, draw.images, [1, 2, 3])
        own = draw(aten.reshape.default, own, [-1, 1, 1, 1, 1])
        return together(draw, draw(aten.add.Tensor, in_windows(draw, scores), own))

    found, reasons = fusable_attentions(attention(draw, path))

    assert found == []
    assert next(iter(reasons.values())).startswith("it depends on reshape")


def test_windows_in_front_of_images_are_not_fused(draw):
    """The same stored mask then falls on other windows of each image."""

    def path(draw, scores):
        shape = [WINDOWS, -1, HEADS, TOKENS, TOKENS]
        x = draw(aten.reshape.default, scores, shape)
        mask = draw.stored(WINDOWS, 1, 1, TOKENS, TOKENS)
        return together(draw, draw(aten.add.Tensor, x, mask))

    found, reasons = fusable_attentions(attention(draw, path))

    assert (found, list(reasons.values())) == ([], ["its bias differs between images"])


def test_scores_that_others_read_are_not_fused(draw):
    def path(draw, scores):
        gate = draw(aten.mean.dim, scores, [-1], True)
        return draw(aten.add.Tensor, scores, gate)

    found, reasons = fusable_attentions(attention(draw, path))

    assert (found, list(reasons.values())) == ([], ["its scores have another reader"])


def test_scores_of_some_of_the_keys_are_not_fused(draw):
    x = draw(aten.reshape.default, draw.images, [-1, TOKENS, WIDTH])
    q, k, v = (by_heads(draw, x) for _ in range(3))
    scores = draw(aten.matmul.default, q, draw(aten.transpose.int, k, -2, -1))
    probs = draw(aten.softmax.int, draw(aten.slice.Tensor, scores, 3, 0, 3), -1)
    output = draw(aten.matmul.default, probs, draw(aten.slice.Tensor, v, 2, 0, 3))

    found, reasons = fusable_attentions(draw.captured(output))

    assert (found, len(reasons)) == ([], 1)
