"""Products of activations as integers: which, and with which codes, scales and zero points."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from drawn import Drawing
from finished import quantized
from frozen import bytes_of, frozen, stored_weight
from onnx import TensorProto
from onnx_files import assert_codes_agree, load_file, written_graph
from small import noise
from tiny import images, make_source, ranged
from zoo import zoo_graph, zoo_images

from vitcompress.export.onnx import export_onnx
from vitcompress.numerics.metrics import cosine
from vitcompress.quantizers import PerHead

aten = torch.ops.aten
PRODUCT = "MatMulIntegerToFloat"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Return a model with quantized attention, its file and the result."""
    name = "timm_vit"
    source = make_source(zoo_images(name, 8))
    model = quantized(zoo_graph(name), source, scheme="W8A8", recipe="integer_attention")
    path = tmp_path_factory.mktemp("products") / "m.onnx"
    return model, path, model.export_onnx(path, images=zoo_images(name, 16))


def products_of_activations(graph):
    return [n for n in graph.of_type(PRODUCT) if n.input[1] not in graph.initializers]


def test_every_product_multiplies_integers(file):
    _, path, result = file

    _, graph = load_file(path)
    operators = Counter(node.op_type for node in graph.nodes)

    # Patches, head, and in two blocks query, key, value, proj, fc1, fc2, scores, output.
    assert result.verification.integer_ops == {PRODUCT: 2 + 2 * 8}
    assert operators[PRODUCT] == 2 + 2 * 8
    for op in ("MatMul", "Gemm", "Conv", "Attention", "DequantizeLinear"):
        assert operators[op] == 0
    # The factor of the scores is in their scale.
    assert operators["Mul"] == operators["Div"] == 0
    assert result.verification.code_mismatch < 1e-4
    assert result.verification.cosine > 0.999


def test_right_operands_are_signed_and_left_ones_unsigned(file):
    _, path, _ = file
    _, graph = load_file(path)

    found = products_of_activations(graph)

    assert len(found) == 4
    for node in found:
        left, right = (graph.initializers[node.input[index]] for index in (4, 5))
        assert (left.data_type, right.data_type) == (TensorProto.UINT8, TensorProto.INT8)
        quantizers = [graph.behind_moves(node.input[index]) for index in (0, 1)]
        for quantize, zero in zip(quantizers, (left, right), strict=True):
            assert graph.initializers[quantize.input[2]].data_type == zero.data_type


def test_zero_points_are_the_models_less_by_half_the_range(file):
    """Their values are not symmetric: a zero point that is left out would show."""
    model, path, _ = file
    _, graph = load_file(path)
    quantizers = {q.site: q for q in written_graph(model, "ort-cpu").quantizers().values()}

    points = []
    for node in products_of_activations(graph):
        for operand, scale, point in ((0, 2, 4), (1, 3, 5)):
            own = quantizers[graph.behind_moves(node.input[operand]).name]
            less = 128 if operand else 0
            assert int(graph.constant(node.input[point])) == int(own.zero_point) - less
            points.append(int(own.zero_point) - less)
            factor = graph.constant(node.input[scale]) / own.scale.numpy()
            head_dim = 16
            assert factor == pytest.approx(1.0) or factor == pytest.approx(head_dim**-0.5)

    assert sum(point != 0 for point in points) > len(points) // 2


def test_codes_are_those_of_torch(file):
    model, path, _ = file
    name = model.report.model

    assert_codes_agree(path, written_graph(model, "ort-cpu"), zoo_images(name, 16))


# What stays a product of floats


def test_an_operand_without_one_scale_keeps_a_product_in_float(vit_graph, source, tmp_path):
    rules = (
        {"sites": ["blocks.0.attn:key"], "granularity": "per_head"},
        {"sites": ["blocks.1.attn:probs"], "format": "log2", "bits": 4},
    )
    graph = frozen(vit_graph, *rules)

    result = export_onnx(graph, tmp_path / "m.onnx", images(4, seed=3))

    _, file = load_file(tmp_path / "m.onnx")
    integer = {file.behind_moves(node.input[1]).name for node in products_of_activations(file)}
    assert integer == {"blocks.0.attn:value", "blocks.1.attn:key"}
    assert len(file.of_type("MatMul")) == 2
    assert result.verification.code_mismatch < 1e-4
    assert result.verification.in_step_cosine > 0.9999


# Drawn products, all in one file: each would be traced and run for a second or two


class Products:
    """Products of a left and a right operand, each with a name of its own.

    Attributes:
        outputs: What the file yields.
        graph: The file, once it is written; also ``path``, ``captured`` and ``result``.
    """

    def __init__(self):
        self.draw = Drawing(1, 5, 6)
        self.tokens = self.draw(aten.select.int, self.draw.images, 1, 0)
        self.flipped = self.draw(
            aten.transpose.int, self.draw(aten.sigmoid.default, self.tokens), 1, 2
        )
        self.outputs = []

    def scores(self, name, **spec):
        """Return a product of operands of one format."""
        low, high, format_ = torch.tensor(-1.0), torch.tensor(3.0), {"bits": 8, **spec}
        operands = ((self.tokens, f"{name}_l"), (self.flipped, f"{name}_r"))
        codes = [
            self.draw.quantized(value, ranged(low, high, **format_), site)
            for value, site in operands
        ]
        return self.draw(aten.matmul.default, *codes)

    def write(self, path):
        self.path, self.captured = path, self.draw.captured(*self.outputs)
        self.result = export_onnx(self.captured, path, noise(4, 1, 5, 6, seed=9))
        onnx.checker.check_model(str(path), full_check=True)
        self.graph = load_file(path)[1]

    def reading(self, site):
        """Return the operators that read a value of a quantizer, whatever its sign."""
        codes = {node.output[0] for node in self.graph.nodes if node.name.startswith(site)}
        return [node for node in self.graph.nodes if codes & set(node.input)]

    def behind(self, site):
        """Return the operators that read the product of an operand."""
        (product,) = [n for n in self.reading(site) if n.op_type == PRODUCT]
        return [n for n in self.graph.nodes if product.output[0] in n.input]


WIDTHS = [
    (f"{'s' if symmetric else 'u'}{bits}", bits, symmetric)
    for bits in (4, 8)
    for symmetric in (False, True)
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    found = Products()
    draw, keep = found.draw, found.outputs.append
    for name, bits, symmetric in WIDTHS:
        keep(found.scores(name, bits=bits, symmetric=symmetric))
    keep(draw(aten.mul.Tensor, found.scores("quarter"), 0.25))
    keep(draw(aten.mul.Tensor, found.scores("minus"), -3.0))
    keep(draw(aten.mul.Tensor, found.scores("table"), draw.stored(5, 5)))
    twice = found.scores("twice")
    keep(draw(aten.mul.Tensor, twice, 0.25))
    keep(draw(aten.sigmoid.default, twice))
    keep(out := found.scores("out"))
    keep(draw(aten.mul.Tensor, out, 0.25))
    # One value as both operands, and as operand, as input of a linear and in float.
    probs = bytes_of(draw, draw(aten.softmax.int, found.scores("probs"), -1), "both")
    keep(draw(aten.matmul.default, probs, probs))
    value = bytes_of(draw, found.tokens, "value")
    left = bytes_of(draw, draw(aten.sigmoid.default, found.flipped), "left")
    keep(draw(aten.matmul.default, left, value))
    keep(draw(aten.linear.default, value, stored_weight(draw, 6, 6)))
    keep(draw(aten.gelu.default, value))
    # Scales by heads.
    heads = draw(aten.reshape.default, found.tokens, [-1, 5, 2, 3])
    heads = draw(aten.permute.default, heads, [0, 2, 1, 3])
    by_heads = ranged(
        torch.tensor([-2.0, -3.0]), torch.tensor([2.0, 3.0]), bits=8, granularity=PerHead(1)
    )
    keys = bytes_of(draw, draw(aten.transpose.int, heads, 2, 3), "heads_r")
    keep(draw(aten.matmul.default, draw.quantized(heads, by_heads, "heads_l"), keys))
    found.write(tmp_path_factory.mktemp("drawn") / "m.onnx")
    return found


def test_drawn_products_compute_what_the_graph_does(drawn):
    assert drawn.result.verification.code_mismatch < 1e-3
    assert drawn.result.verification.in_step_cosine > 0.9999
    names = [node.name for node in drawn.graph.nodes]
    assert len(names) == len(set(names))


@torch.no_grad()
def test_every_output_of_drawn_products_is_the_graphs(drawn):
    """On its own; the verification compares them in step."""
    x, providers = noise(3, 1, 5, 6, seed=4), ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(drawn.path), providers=providers)

    found = session.run(None, {"images": x.numpy()})

    for value, expected in zip(found, drawn.captured.module(x), strict=True):
        assert cosine(torch.from_numpy(value), expected) > 0.999


@pytest.mark.parametrize(("name", "bits", "symmetric"), WIDTHS)
def test_narrow_and_symmetric_codes_keep_their_zero(drawn, name, bits, symmetric):
    (product,) = drawn.reading(f"{name}_l")

    zero = 2 ** (bits - 1) if symmetric else round((2**bits - 1) / 4)
    assert int(drawn.graph.constant(product.input[4])) == zero
    assert int(drawn.graph.constant(product.input[5])) == zero - 128


@pytest.mark.parametrize(("name", "factor"), [("quarter", 0.25), ("minus", -3.0)])
def test_a_number_behind_a_product_is_part_of_its_scale(drawn, name, factor):
    (product,) = drawn.reading(f"{name}_l")

    own = drawn.graph.named(f"{name}_l").input[1]
    expected = np.float32(factor) * drawn.graph.constant(own)
    assert drawn.graph.constant(product.input[2]) == expected
    assert drawn.behind(f"{name}_l") == []


@pytest.mark.parametrize(
    ("name", "readers"),
    [("table", ["Mul"]), ("twice", ["Mul", "Sigmoid"]), ("out", ["Mul"])],
)
def test_what_else_is_behind_a_product_stays(drawn, name, readers):
    """A table; a number for one of two readers, and for a product that is an output."""
    assert sorted(node.op_type for node in drawn.behind(f"{name}_l")) == readers


def test_a_value_may_be_both_operands_of_one_product(drawn):
    """Its codes are needed with and without a sign, under two names."""
    (product,) = drawn.reading("both")

    left, right = (drawn.graph.made_by[name] for name in product.input[:2])
    assert {left.name, right.name} == {"both", "both:right"}


def test_a_right_operand_may_be_read_by_a_linear_and_in_float_too(drawn):
    found = sorted(node.op_type for node in drawn.reading("value"))

    assert found == ["DequantizeLinear", PRODUCT, PRODUCT]


def test_scales_by_heads_are_no_one_scale(drawn):
    assert len(drawn.graph.of_type("MatMul")) == 1
    point = drawn.graph.named("heads_r").input[2]
    assert drawn.graph.initializers[point].data_type == TensorProto.UINT8
