"""Trained, rotated and shifted-logarithm networks as files."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx_files import load_file
from tiny import images

import vitcompress
from vitcompress.evaluate import onnx_predictor
from vitcompress.quantizers import Sulq

CASES = [("is_vit", "W4A4"), ("glf_q", "W3A3")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exported(request, export):
    return export(*request.param, "ort-cpu")


def test_file_passes_its_verification_with_every_linear_on_integers(exported):
    found = exported.result.verification

    assert found.code_mismatch < 1e-3
    assert found.in_step_cosine > 0.9999
    assert (found.integer_linears, found.float_linears) == (found.linears, {})


def test_only_integer_products_are_no_standard_operators(exported):
    model, _ = load_file(exported.path)

    onnx.checker.check_model(model, full_check=True)
    others = {node.op_type for node in model.graph.node if node.domain}
    assert others == {"MatMulIntegerToFloat"}


def test_it_answers_as_in_torch(exported):
    x = images(32, seed=21)

    found, expected = onnx_predictor(exported.path)(x), exported.model(x)

    # One code on a boundary may move others: most answers are equal to the last digits.
    close = ((found - expected).abs().amax(dim=1) < 1e-3 * expected.abs().max()).float().mean()
    assert close >= 0.6


def test_the_table_of_a_shifted_logarithm_is_the_quantizers_bit_for_bit(export):
    exported = export("is_vit", "W4A4", "ort-cpu")
    _, graph = load_file(exported.path)
    quantizers = exported.model.graph.quantizers().values()
    tables = [quantizer for quantizer in quantizers if isinstance(quantizer, Sulq)]

    assert len(tables) == 2
    for quantizer in tables:
        codes = graph.named(quantizer.site)
        (gather,) = [n for n in graph.of_type("Gather") if codes.output[0] in n.input]
        table = numpy_helper.to_array(graph.initializers[gather.input[0]])
        assert table.shape == (16,)
        assert np.array_equal(table, quantizer.table().numpy())


def test_a_norm_without_mean_is_one_operator(export):
    model, _ = load_file(export("glf_q", "W3A3", "ort-cpu").path)

    found = Counter(node.op_type for node in model.graph.node)

    assert (found["LayerNormalization"], found["RMSNormalization"]) == (0, 5)
    assert found["ReduceMean"] == found["Reciprocal"] == 0
    assert found["Relu"] >= 2
    assert found["Gelu"] == found["Erf"] == 0


def test_a_rotated_artefact_is_loaded_bit_for_bit(export, tmp_path):
    model = export("glf_q", "W3A3", "ort-cpu").model
    model.save(tmp_path / "artefact")

    loaded = vitcompress.load(tmp_path / "artefact")

    assert torch.equal(loaded(images(4)), model(images(4)))
    warnings = [w for entry in loaded.report.passes for w in entry.warnings]
    assert "the float function changed: ReLU for GELU in 2 MLPs" in warnings
