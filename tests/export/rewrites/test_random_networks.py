"""Rows and moves on random small networks: whatever is drawn, the outputs stay the same."""

import random

import pytest
import torch
from drawn import Drawing, assert_same_outputs
from small import assert_shapes_are_recorded
from tiny import ranged

from vitcompress.export.rewrites.rows import keep_needed_rows
from vitcompress.graph.moves import simplify_moves
from vitcompress.quantizers import PerChannel

aten = torch.ops.aten

TOKENS, CHANNELS, HEADS = 7, 6, 2
SEEDS = range(150)


class Network:
    """A network on tokens ``[B, 7, 6]`` that grows at random.

    Every step takes values that are there and adds one of the same shape. Steps work on each
    row alone, mix rows, move values about, or broadcast.
    """

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.draw = Drawing(1, TOKENS, CHANNELS)
        self.values = [self.draw(aten.select.int, self.draw.images, 1, 0)]
        steps = [getattr(self, name) for name in dir(type(self)) if name.startswith("step_")]
        for _ in range(self.random.randint(1, 6)):
            self.values.append(self.random.choice(steps)(self.value()))
        # Most networks end as vision transformers do.
        by_row = [self.step_linear, self.step_norm, self.step_activation, self.step_sum]
        attention = [self.step_attention, self.step_heads, self.step_probabilities_twice]
        for choices in (attention, *[by_row] * 3) if self.random.random() < 0.8 else ():
            self.values.append(self.random.choice(choices)(self.value()))
        self.captured = self.draw.captured(*self.outputs())

    def value(self):
        """Return a value, a recent one most of the time."""
        return self.random.choice([*self.values, *self.values[-2:], *self.values[-1:] * 2])

    def linear(self, x):
        return self.draw(aten.linear.default, x, self.draw.stored(CHANNELS, CHANNELS))

    def softmax(self, x, axis=-1):
        return self.draw(aten.softmax.int, x, axis)

    def transposed(self, x, first=-2, second=-1):
        return self.draw(aten.transpose.int, x, first, second)

    def reshaped(self, x, *shape):
        """State the batch as an extent, or leave one extent to be inferred."""
        extents = list(shape)
        if self.random.random() < 0.5:
            extents[self.random.randrange(1, len(extents))] = -1
            extents[0] = self.draw.batch
        else:
            extents[0] = -1
        return self.draw(aten.reshape.default, x, extents)

    def cut(self, x, axis, *extents):
        """Cut an axis into several, in one of two spellings."""
        if self.random.random() < 0.5:
            return self.draw(aten.unflatten.int, x, axis, list(extents))
        shape = self.draw.shape(x)
        return self.reshaped(x, 0, *shape[1:axis], *extents, *shape[axis + 1 :])

    def joined(self, x, first, last):
        """Make one axis of several, in one of two spellings."""
        if self.random.random() < 0.5:
            return self.draw(aten.flatten.using_ints, x, first, last)
        shape = self.draw.shape(x)
        whole = torch.Size(shape[first : last + 1]).numel()
        return self.reshaped(x, 0, *shape[1:first], whole, *shape[last + 1 :])

    # Each row alone

    def step_linear(self, x):
        return self.linear(x)

    def step_norm(self, x):
        return self.draw(aten.layer_norm.default, x, [CHANNELS])

    def step_activation(self, x):
        return self.draw(self.random.choice([aten.gelu.default, aten.sigmoid.default]), x)

    def step_number(self, x):
        target = self.random.choice([aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor])
        return self.draw(target, x, 1.5)

    def step_quantizer(self, x):
        """Scales for the whole tensor, by channels, or by rows."""
        axis = self.random.choice([None, -1, 1, 2])
        count = {None: (), -1: (CHANNELS,), 1: (TOKENS,), 2: (CHANNELS,)}[axis]
        high = torch.linspace(2.0, 4.0, count[0]) if count else torch.tensor(3.0)
        spec = {} if axis is None else {"granularity": PerChannel(axis)}
        quantizer = ranged(-high, high, bits=8, **spec)
        return self.draw.quantized(x, quantizer, f"site_{len(self.values)}")

    # Rows and rows

    def step_sum(self, x):
        target = self.random.choice([aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor])
        return self.draw(target, x, self.value())

    def step_stored_sum(self, x):
        shapes = [(1, TOKENS, CHANNELS), (TOKENS, CHANNELS), (CHANNELS,), (TOKENS, 1)]
        stored = self.draw.stored(*self.random.choice(shapes))
        operands = [x, stored] if self.random.random() < 0.7 else [stored, x]
        return self.draw(aten.add.Tensor, *operands)

    def step_one_row_for_all(self, x):
        row = self.draw(aten.slice.Tensor, x, 1, 0, 1)
        return self.draw(aten.add.Tensor, row, self.value())

    # Rows mixed

    def step_attention(self, x):
        q, k, v = (self.linear(x) for _ in range(3))
        probs = self.softmax(self.draw(aten.matmul.default, q, self.transposed(k)))
        return self.draw(aten.matmul.default, probs, v)

    def step_heads(self, x):
        def by_heads(y):
            parts = self.cut(y, 2, HEADS, CHANNELS // HEADS)
            return self.draw(aten.permute.default, parts, [0, 2, 1, 3])

        q, k, v = (by_heads(self.linear(y)) for y in (x, self.value(), self.value()))
        probs = self.softmax(self.draw(aten.matmul.default, q, self.transposed(k)))
        found = self.transposed(self.draw(aten.matmul.default, probs, v), 1, 2)
        return self.joined(found, 2, 3)

    def step_cut_and_joined(self, x):
        """Rows cut into two axes, or one of one row, and joined again."""
        extents = self.random.choice([(1, TOKENS), (TOKENS, 1)])
        return self.joined(self.linear(self.cut(x, 1, *extents)), 1, 2)

    def step_probabilities_twice(self, x):
        """A product of a value with itself: one operand by rows, the other whole."""
        scores = self.draw(aten.matmul.default, x, self.transposed(self.value()))
        probs = self.softmax(scores, self.random.choice([-1, 1]))
        rollout = self.draw(aten.matmul.default, probs, probs)
        return self.draw(aten.matmul.default, rollout, self.value())

    def step_token_mixer(self, x):
        mixed = self.draw(
            aten.linear.default, self.transposed(x), self.draw.stored(TOKENS, TOKENS)
        )
        return self.transposed(mixed)

    def step_norm_of_images(self, x):
        return self.draw(aten.layer_norm.default, x, [TOKENS, CHANNELS])

    def step_softmax(self, x):
        return self.softmax(x, self.random.choice([-1, 1, 2]))

    # Moves

    def step_tokens_first(self, x):
        moved = self.draw(aten.permute.default, x, [1, 0, 2])
        return self.draw(aten.permute.default, self.linear(moved), [1, 0, 2])

    def step_regrouped(self, x):
        """Rows and channels in other groups: a row of the result is of several rows."""
        shape = self.random.choice([(6, 7), (2, 21), (42, 1), (1, 42), (14, 3)])
        parts = self.reshaped(x, 0, *shape)
        return self.reshaped(self.draw(aten.gelu.default, parts), 0, TOKENS, CHANNELS)

    def step_rolled(self, x):
        return self.draw(aten.roll.default, x, [self.random.randint(-2, 2)], [1])

    def step_class_token_elsewhere(self, x):
        cut = self.random.randint(1, TOKENS - 1)
        parts = (
            self.draw(aten.slice.Tensor, x, 1, *bounds)
            for bounds in ((cut, 2**63 - 1), (0, cut))
        )
        return self.draw(aten.cat.default, list(parts), 1)

    def outputs(self):
        """Return results as heads read them, sometimes several."""
        last = self.values[-2:]
        several = self.random.choice([1, 1, 2, 3])
        return [self.output(self.random.choice(last)) for _ in range(several)]

    def output(self, x):
        start = self.random.randint(-TOKENS, TOKENS - 1)
        stop = self.random.choice([2**63 - 1, *range(-2, TOKENS + 2)])
        kind = self.random.choice(["select"] * 4 + ["slice"] * 3 + ["step", "mean", "all"])
        if kind == "select":
            x = self.draw(aten.select.int, x, self.random.choice([1, -2]), start)
        elif kind == "slice":
            x = self.draw(aten.slice.Tensor, x, self.random.choice([1, -2]), start, stop)
        elif kind == "step":
            x = self.draw(aten.slice.Tensor, x, 1, 0, TOKENS, 2)
        elif kind == "mean":
            x = self.draw(aten.mean.dim, x, [1])
        return self.linear(x)


@pytest.fixture(scope="module")
def networks():
    return [Network(seed).captured for seed in SEEDS]


@pytest.mark.parametrize(
    "rewrites",
    [(keep_needed_rows,), (simplify_moves,), (simplify_moves, keep_needed_rows)],
    ids=["rows", "moves", "both"],
)
def test_outputs_of_random_networks_stay_the_same(networks, rewrites):
    changed = 0
    for captured in networks:
        graph = captured.clone()
        counts = []
        for rewrite in rewrites:
            counts.append(rewrite(graph))
            graph.recompile()

        assert_same_outputs(captured, graph)
        assert_shapes_are_recorded(graph)
        changed += any(counts)

    assert changed >= 20
