"""What is computed ahead: values without an image, and one row of those that repeat."""

import pytest
import torch
from small import (
    Formula,
    assert_same_function,
    assert_shapes_are_recorded,
    called,
    inputs,
    noise,
    operations,
    written,
    written_together,
)
from torch import fx, nn

from vitcompress.errors import UnsupportedModelError
from vitcompress.graph import capture
from vitcompress.graph.captured import CapturedGraph, Provenance
from vitcompress.graph.constants import fold_constants
from vitcompress.graph.metadata import TensorInfo, info, set_info
from vitcompress.graph.ops import is_op
from vitcompress.graph.partition import extract_block
from vitcompress.graph.patterns import blocks, producer

aten = torch.ops.aten
SHAPE = (2, 3, 5)
BATCHES = (1, 3, 5)


def constants(graph):
    return [value for name, value in graph.tensors().items() if "constant" in name]


def repeated(row, x):
    """Return a row ``[1, ...]`` for every image."""
    return row.expand(x.shape[0], *[-1] * (row.dim() - 1))


# Constants


def test_arithmetic_and_picks_on_parameters_are_computed_ahead():
    model, graph = written(
        lambda self, x: x + 16 * torch.sigmoid(self.table[self.index]).permute(2, 0, 1),
        SHAPE,
        table=noise(7, 2),
        index=torch.arange(15).reshape(3, 5) % 7,
    )

    (constant,) = constants(graph)
    expected = 16 * torch.sigmoid(model.table[model.index]).permute(2, 0, 1)
    torch.testing.assert_close(constant, expected)
    assert operations(graph) == ["add"]
    assert list(graph.tensors()) == ["constant"]
    assert_same_function(model, graph)


def test_a_parameter_that_is_read_as_it_is_keeps_its_name_beside_a_constant():
    model, graph = written(
        lambda self, x: (x + self.table) * torch.exp(self.table), SHAPE, table=noise(5)
    )

    assert set(graph.tensors()) == {"table", "constant"}
    assert_same_function(model, graph)


def test_filled_tensors_of_a_static_shape_are_stored():
    def formula(self, x):
        mask = x.new_zeros((1, 2, 1, 5)) + self.table
        return x * mask + x.new_full((5,), 0.5) - x.new_ones((3, 1))

    model, graph = written(formula, SHAPE, table=noise(5))

    assert not [name for name in operations(graph) if name.startswith("new_")]
    assert {tuple(value.shape) for value in constants(graph)} == {(1, 2, 1, 5), (5,), (3, 1)}
    assert_same_function(model, graph)


def test_a_filled_tensor_has_the_dtype_of_its_source():
    model, graph = written(lambda self, x: x * x.to(torch.int64).new_full((5,), 3), SHAPE)

    (constant,) = constants(graph)
    assert constant.dtype == torch.int64
    assert_same_function(model, graph)


# Repeated for every image


def test_zeros_for_every_image_with_positions_become_one_row():
    def formula(self, x):
        start = torch.zeros(x.shape[0], 2, 3, 5)
        return x * torch.sin(start + self.positions)

    model, graph = written(formula, SHAPE, positions=noise(3, 5))

    assert operations(graph) == ["mul"]
    (row,) = constants(graph)
    torch.testing.assert_close(row, torch.sin(model.positions).expand(1, 2, 3, 5))
    assert_same_function(model, graph, BATCHES)


def test_a_repeated_query_is_projected_and_normalised_once():
    def formula(self, x):
        query = self.norm(self.fc(repeated(self.query, x)))
        return query @ x.flatten(1, 2).transpose(1, 2)

    model, graph = written(
        formula, SHAPE, query=noise(1, 4, 5), fc=nn.Linear(5, 5), norm=nn.LayerNorm(5)
    )

    assert not {"linear", "layer_norm", "expand"} & set(operations(graph))
    (row,) = constants(graph)
    torch.testing.assert_close(row, model.norm(model.fc(model.query)).detach())
    assert_same_function(model, graph, BATCHES)


def test_waves_over_a_mask_of_ones_become_one_row():
    def formula(self, x):
        rows = torch.ones(x.shape[0], 3, 5).cumsum(1)
        return x + torch.cos(rows[:, None] / 3)

    model, graph = written(formula, SHAPE)

    assert operations(graph) == ["add"]
    (row,) = constants(graph)
    assert row.shape == (1, 1, 3, 5)
    assert_same_function(model, graph, BATCHES)


def number_of_the_image(self, x):
    return x + torch.arange(x.shape[0])[:, None, None, None]


def counted_along_the_batch(self, x):
    return x + torch.ones(x.shape[0], 1, 3, 5).cumsum(0)


def table_times_the_extent(self, x):
    return x + x.shape[0] * self.table


def repeated_table_times_the_extent(self, x):
    return x + repeated(self.table * x.shape[0], x)


def mean_over_the_batch(self, x):
    return x + torch.ones(x.shape[0], 2, 3, 5) / x.shape[0]


DEPENDENT = {
    formula.__name__: formula
    for formula in (
        number_of_the_image,
        counted_along_the_batch,
        table_times_the_extent,
        repeated_table_times_the_extent,
        mean_over_the_batch,
    )
}


@pytest.fixture(scope="module")
def dependent():
    return written_together(DEPENDENT, SHAPE, table=noise(1, 2, 3, 5))


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_value_that_depends_on_the_extent_of_the_batch_is_computed_each_time(
    name, dependent
):
    model, graph = dependent[name]

    assert not constants(graph)
    assert "sym_size" in operations(graph)
    assert_same_function(model, graph, BATCHES)


# Who reads the row


def test_a_reader_that_broadcasts_reads_the_row_and_another_an_expansion():
    def formula(self, x):
        tokens = repeated(2 * self.tokens, x)
        return torch.cat([tokens, x + tokens[:, :1]], dim=1) + torch.cat([tokens, x], dim=1)

    model, graph = written(formula, SHAPE, tokens=noise(1, 1, 3, 5))

    additions, cats = called(graph, "add"), called(graph, "cat")
    row = additions[0].args[1]
    assert row.op == "get_attr"
    assert info(row).shape == (1, 1, 3, 5)
    for cat in cats:
        (expanded,) = [node for node in cat.all_input_nodes if node in called(graph, "expand")]
        assert expanded.args[0].op == "get_attr"
        assert info(expanded).shape == ("B", 1, 3, 5)
    assert_same_function(model, graph, BATCHES)
    assert_shapes_are_recorded(graph)


def flat(x):
    return x.flatten(1, 2)


def table(self, x):
    return repeated(self.table + 3, x)


READERS = {
    "sub": lambda self, x: table(self, x) - flat(x),
    "div": lambda self, x: flat(x) / table(self, x),
    "matmul": lambda self, x: table(self, x).mT @ flat(x),
    "masked_fill": lambda self, x: table(self, x).masked_fill(flat(x) > 0, 0.25),
    "masked_fill of the image": lambda self, x: flat(x).masked_fill(table(self, x) > 3, 0.25),
}


@pytest.fixture(scope="module")
def readers():
    return written_together(READERS, SHAPE, table=noise(1, 6, 5))


@pytest.mark.parametrize("name", READERS)
def test_operations_with_an_image_read_the_row(name, readers):
    model, graph = readers[name]

    (reader,) = called(graph, name.partition(" ")[0])
    rows = [node for node in graph.nodes_of_kind("get_attr") if node.target.count("constant")]
    assert [info(row).shape[0] for row in rows] == [1]
    assert any(producer(node) in rows for node in reader.all_input_nodes)
    assert "expand" not in operations(graph)
    assert_same_function(model, graph, BATCHES)


def test_a_reader_that_does_not_broadcast_the_row_reads_an_expansion():
    model, graph = written(
        lambda self, x: torch.stack([x.mean((1, 2)), repeated(2 * self.table, x)]),
        SHAPE,
        table=noise(1, 5),
    )

    (row,) = constants(graph)
    assert row.shape == (1, 5)
    assert "expand" in operations(graph)
    assert_same_function(model, graph, BATCHES)


@pytest.mark.parametrize("keepdim", [True, False])
def test_a_reader_without_a_batch_of_its_own_reads_an_expansion(keepdim):
    """The row alone would give a result for one image."""
    model, graph = written(
        lambda self, x: x.mean(0, keepdim=keepdim) + repeated(2 * self.table, x),
        SHAPE,
        table=noise(1, 2, 3, 5),
    )

    assert "expand" in operations(graph)
    assert_same_function(model, graph, BATCHES)


def test_a_stored_token_that_is_only_expanded_stays_as_it_is():
    model, graph = written(
        lambda self, x: torch.cat([repeated(self.token, x), x], dim=1),
        SHAPE,
        token=noise(1, 1, 3, 5),
    )

    assert list(graph.tensors()) == ["token"]
    assert_same_function(model, graph, BATCHES)


# Blocks


class TokenBlock(nn.Module):
    """Reads a computed token besides its input, for as many images as there are."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(noise(1, 1, 5))
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, x):
        y = self.second(torch.relu(self.first(x)))
        token = torch.tanh(self.token).expand(y.shape[0], -1, -1)
        return torch.cat([token, y[:, 1:]], dim=1) + x


def test_a_block_reads_its_input_and_no_second_value_that_depends_on_the_images():
    model = Formula(
        lambda self, x: self.blocks(x.flatten(1, 2)),
        blocks=nn.Sequential(TokenBlock(), TokenBlock()),
    ).eval()
    graph = capture(model, inputs(2, SHAPE))

    found = blocks(graph)
    programs = [extract_block(graph, block) for block in found]

    assert [block.path for block in found] == ["blocks.0", "blocks.1"]
    x = inputs(3, SHAPE).flatten(1, 2)
    for block, program in zip(model.blocks, programs, strict=True):
        assert len(program.inputs) == 1
        torch.testing.assert_close(program.module(x)[0], block(x))
    # The number of images is asked for once, in front of everything else.
    (size,) = [n for n in graph.nodes_of_kind("call_function") if "sym_size" in str(n.target)]
    assert size.args == (graph.input_node, 0)
    assert size.prev is graph.input_node
    assert_same_function(model, graph, BATCHES)


def test_the_number_of_images_is_asked_for_in_front_of_all_that_needs_it():
    """Where the first to need it had it from a value of its own."""
    graph = fx.Graph()

    def call(target, arguments, shape=None):
        node = graph.call_function(target, arguments)
        if shape is not None:
            node.meta["info"] = TensorInfo(shape, "float32")
        return node

    token = graph.get_attr("token")
    set_info(token, noise(1, 4))
    images = graph.placeholder("images")
    images.meta["info"] = TensorInfo(("B", 2, 3, 5), "float32")
    active = call(aten.relu.default, (images,), ("B", 2, 3, 5))
    own = call(aten.sym_size.int, (active, 0))
    doubled = call(aten.mul.Tensor, (token, 2.0), (1, 4))
    query = call(aten.expand.default, (doubled, [own, 4]), ("B", 4))
    first = call(aten.cat.default, ([query, query], 1), ("B", 8))
    later = call(aten.sym_size.int, (images, 0))
    rows = call(aten.reshape.default, (active, [later, 30]), ("B", 30))
    total = call(aten.cat.default, ([first, rows], 1), ("B", 38))
    graph.output((total,))
    before = CapturedGraph.build(graph, {"token": noise(1, 4)}, ("",), Provenance("drawn", {}))
    after = before.clone()

    fold_constants(after)
    after.recompile()

    (size,) = called(after, "sym_size")
    assert size.prev is after.input_node
    assert_same_function(before, after, BATCHES)


# Random numbers


def test_random_numbers_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"aten\.rand\.default draws random"):
        written(lambda self, x: x + torch.rand(5), SHAPE)


@pytest.mark.parametrize("target", [aten.rand.default, aten.randn.default])
def test_random_numbers_are_never_computed_ahead(target):
    graph = fx.Graph()
    images = graph.placeholder("images")
    drawn = graph.call_function(target, ([5],))
    total = graph.call_function(aten.add.Tensor, (images, drawn))
    for node, shape in ((images, ("B", 2, 3, 5)), (drawn, (5,)), (total, ("B", 2, 3, 5))):
        node.meta["info"] = TensorInfo(shape, "float32")
    graph.output((total,))
    captured = CapturedGraph.build(graph, {}, ("",), Provenance("drawn", {}))

    fold_constants(captured)

    assert captured.tensors() == {}
    assert is_op(total.args[1], {target})


# Masks


def test_a_mask_that_hides_nothing_is_dropped():
    def formula(self, x):
        hidden = (self.regions[:, None] - self.regions[None]) != 0
        return x.masked_fill(hidden, -100.0)

    model, graph = written(formula, (2, 5, 5), regions=torch.zeros(5, dtype=torch.int64))

    assert operations(graph) == []
    assert graph.tensors() == {}
    assert_same_function(model, graph)


def test_a_mask_that_hides_something_stays():
    def formula(self, x):
        hidden = (self.regions[:, None] - self.regions[None]) != 0
        return x.masked_fill(hidden, -100.0)

    regions = torch.tensor([0, 0, 0, 0, 1])
    model, graph = written(formula, (2, 5, 5), regions=regions)

    assert operations(graph) == ["masked_fill"]
    assert (graph(inputs(2, (2, 5, 5))) == -100.0).sum() == 2 * 2 * 8
    assert_same_function(model, graph)


def test_a_mask_of_the_image_itself_stays():
    model, graph = written(lambda self, x: x.masked_fill(x > 0, 0.5), SHAPE)

    assert "masked_fill" in operations(graph)
    assert_same_function(model, graph)


def test_an_empty_mask_that_widens_the_result_stays():
    model, graph = written(
        lambda self, x: x[:, None].masked_fill(self.mask, 0.5),
        SHAPE,
        mask=torch.zeros(4, 1, 1, 1, dtype=torch.bool),
    )

    assert_same_function(model, graph)
