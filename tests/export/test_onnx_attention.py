"""Attention as one fused operator: what is recognised, and that it computes the same."""

from collections import Counter

import onnx
import pytest
import torch
from families import family_graph, family_model
from fused import fused_graph
from tiny import images, make_source, relative_error
from zoo import zoo_graph, zoo_images, zoo_model

import vitcompress
from vitcompress.evaluate import onnx_predictor
from vitcompress.export.onnx.attention import fusable_attentions


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("timm_vit", 2),
        ("timm_deit_distilled", 2),
        ("timm_swin", 3),
        ("timm_swin_padded", 3),
        ("torchvision_vit", 2),
        ("torchvision_swin", 3),
        ("hf_vit", 2),
        ("hf_swin", 3),
    ],
)
@torch.no_grad()
def test_each_librarys_attention_is_fused_and_computes_the_same(name, count):
    graph, found = fused_graph(zoo_graph(name))

    assert found == count
    for batch in (1, 3):
        x = zoo_images(name, batch)
        assert relative_error(graph.logits(x), logits_of(zoo_model(name), x)) <= 1e-5


def logits_of(model, x):
    found = model(x)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize(("name", "count"), [("timm_beit", 2), ("timm_pvt", 2)])
@torch.no_grad()
def test_added_tables_and_fewer_keys_than_queries_are_fused(name, count):
    graph, found = fused_graph(family_graph(name))

    x = images(3, graph.input_shape[-1])
    assert found == count
    assert relative_error(graph.logits(x), family_model(name)(x)) <= 1e-5


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def quantized(recipe, name="timm_vit"):
    source = make_source(zoo_images(name, 8))
    return vitcompress.quantize(zoo_graph(name), scheme="W8A8", recipe=recipe, source=source)


def test_a_file_for_onnxruntime_has_fused_attention_and_a_generic_one_has_not(tmp_path):
    model = quantized("deploy")

    result = model.export_onnx(tmp_path / "ort.onnx", target="ort-cpu")
    model.export_onnx(tmp_path / "generic.onnx", target="generic")

    fused, plain = operators(tmp_path / "ort.onnx"), operators(tmp_path / "generic.onnx")
    assert (fused["Attention"], fused["Softmax"]) == (2, 0)
    assert (plain["Attention"], plain["Softmax"]) == (0, 2)
    assert (result.fused_attention, dict(result.unfused_attention)) == (2, {})
    assert [export.fused_attention for export in model.report.exports] == [2, 0]
    assert fused["Transpose"] == 1  # patches become tokens
    domains = {entry.domain for entry in onnx.load(tmp_path / "generic.onnx").opset_import}
    assert domains == {""}


def test_quantized_attention_is_not_fused(tmp_path):
    model = quantized("repq_vit")

    model.export_onnx(tmp_path / "m.onnx", target="ort-cpu")

    assert operators(tmp_path / "m.onnx")["Attention"] == 0
    assert set(fusable_attentions(model.graph)[1].values()) == {"its operands are quantized"}


@pytest.mark.parametrize(
    "name", ["timm_swin", pytest.param("hf_swin", marks=pytest.mark.slow)]
)
def test_windows_with_masks_run_as_one_operator_each(name, tmp_path):
    """The runtime's results are compared in step at batches of one and two."""
    model, path = quantized("deploy", name), tmp_path / "m.onnx"

    result = model.export_onnx(path, images=zoo_images(name, 6))

    found = operators(path)
    assert (found["Attention"], found["Softmax"], found["MatMul"]) == (3, 0, 0)
    assert (result.fused_attention, dict(result.unfused_attention)) == (3, {})
    assert result.verification.code_mismatch < 1e-4
    assert result.verification.in_step_cosine > 0.9999
    predict, x = onnx_predictor(path), zoo_images(name, 3)
    assert relative_error(predict(x), model.graph.logits(x)) <= 0.1
