"""Products of activations as integers: which, and with which codes, scales and zero points."""

from collections import Counter

import numpy as np
import onnx
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
from vitcompress.quantizers import PerHead

aten = torch.ops.aten
PRODUCT = "MatMulIntegerToFloat"


@pytest.fixture(scope="module", params=["timm_vit", "hf_vit"])
def file(request, tmp_path_factory):
    """Return a model with quantized attention, its file and the result."""
    name = request.param
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


# Drawn products


@pytest.fixture
def draw():
    return Drawing(1, 5, 6)


def written(draw, path, *outputs):
    captured = draw.captured(*outputs)
    result = export_onnx(captured, path, noise(4, 1, 5, 6, seed=9))
    onnx.checker.check_model(str(path), full_check=True)
    assert result.verification.code_mismatch < 1e-3
    assert result.verification.in_step_cosine > 0.9999
    return load_file(path)[1]


def tokens(draw):
    return draw(aten.select.int, draw.images, 1, 0)


def transposed(draw, x):
    return draw(aten.transpose.int, x, 1, 2)


def test_a_value_may_be_both_operands_of_one_product(draw, tmp_path):
    """Its codes are needed with and without a sign, under two names."""
    x = tokens(draw)
    probs = draw(aten.softmax.int, draw(aten.matmul.default, x, transposed(draw, x)), -1)
    codes = bytes_of(draw, probs, "probs")

    graph = written(draw, tmp_path / "m.onnx", draw(aten.matmul.default, codes, codes))

    (product,) = graph.of_type(PRODUCT)
    left, right = (graph.made_by[name] for name in product.input[:2])
    assert {left.name, right.name} == {"probs", "probs:right"}


def test_a_right_operand_may_be_read_by_a_linear_and_in_float_too(draw, tmp_path):
    codes = bytes_of(draw, tokens(draw), "value")
    scores = bytes_of(draw, draw(aten.sigmoid.default, transposed(draw, codes)), "scores")
    product = draw(aten.matmul.default, scores, codes)
    linear = draw(aten.linear.default, codes, stored_weight(draw, 6, 6))

    graph = written(draw, tmp_path / "m.onnx", product, linear, draw(aten.gelu.default, codes))

    assert len(graph.of_type(PRODUCT)) == 2
    assert len(graph.of_type("DequantizeLinear")) == 1
    names = [node.name for node in graph.nodes]
    assert len(names) == len(set(names))


def scaled(draw, by, others=()):
    q, k = (bytes_of(draw, value, site) for value, site in operands(draw))
    scores = draw(aten.matmul.default, q, k)
    return draw(aten.mul.Tensor, scores, by), *(draw(target, scores) for target in others)


def operands(draw):
    x = tokens(draw)
    return (x, "left"), (transposed(draw, draw(aten.sigmoid.default, x)), "right")


@pytest.mark.parametrize("factor", [0.25, -3.0])
def test_a_number_behind_a_product_is_part_of_its_scale(draw, tmp_path, factor):
    (outcome,) = scaled(draw, factor)

    graph = written(draw, tmp_path / "m.onnx", outcome)

    (product,) = graph.of_type(PRODUCT)
    left = graph.made_by[product.input[0]].input[1]
    assert graph.of_type("Mul") == []
    assert graph.constant(product.input[2]) == np.float32(factor) * graph.constant(left)


def test_a_number_behind_one_of_two_readers_stays(draw, tmp_path):
    graph = written(draw, tmp_path / "m.onnx", *scaled(draw, 0.25, [aten.sigmoid.default]))

    assert len(graph.of_type("Mul")) == 1


def test_a_product_that_is_an_output_stays_as_it_is(draw, tmp_path):
    q, k = (bytes_of(draw, value, site) for value, site in operands(draw))
    scores = draw(aten.matmul.default, q, k)

    graph = written(draw, tmp_path / "m.onnx", scores, draw(aten.mul.Tensor, scores, 0.25))

    assert len(graph.of_type(PRODUCT)) == 1
    assert len(graph.of_type("Mul")) == 1


def test_a_table_behind_a_product_stays(draw, tmp_path):
    (outcome,) = scaled(draw, draw.stored(5, 5))

    graph = written(draw, tmp_path / "m.onnx", outcome)

    assert len(graph.of_type("Mul")) == 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_narrow_and_symmetric_codes_keep_their_zero(draw, tmp_path, bits, symmetric):
    q, k = (
        draw.quantized(
            value,
            ranged(torch.tensor(-1.0), torch.tensor(3.0), bits=bits, symmetric=symmetric),
            site,
        )
        for value, site in operands(draw)
    )

    graph = written(draw, tmp_path / "m.onnx", draw(aten.matmul.default, q, k))

    (product,) = graph.of_type(PRODUCT)
    zero = 2 ** (bits - 1) if symmetric else round((2**bits - 1) / 4)
    assert int(graph.constant(product.input[4])) == zero
    assert int(graph.constant(product.input[5])) == zero - 128


def test_scales_by_heads_are_no_one_scale(draw, tmp_path):
    heads = draw(aten.reshape.default, tokens(draw), [-1, 5, 2, 3])
    heads = draw(aten.permute.default, heads, [0, 2, 1, 3])
    quantizer = ranged(
        torch.tensor([-2.0, -3.0]), torch.tensor([2.0, 3.0]), bits=8, granularity=PerHead(1)
    )
    left = draw.quantized(heads, quantizer, "left")
    right = bytes_of(draw, draw(aten.transpose.int, heads, 2, 3), "right")

    graph = written(draw, tmp_path / "m.onnx", draw(aten.matmul.default, left, right))

    assert (len(graph.of_type(PRODUCT)), len(graph.of_type("MatMul"))) == (0, 1)
