"""Changes to a lowered model: codes instead of floats moved, sums, one size of batch."""

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import load_file
from tiny import images

from vitcompress.errors import ConfigError, ExportError, InputError
from vitcompress.evaluate import onnx_predictor
from vitcompress.export.onnx import TARGETS, exporter
from vitcompress.export.onnx.spelling import fix_batch, quantize_early, sums_in_front_of_norms

STORED = {
    "scale": np.array(0.05, np.float32),
    "point": np.array(128, np.uint8),
    "scales": np.array([0.05, 0.1, 0.15, 0.2], np.float32),
    "points": np.array([128, 100, 50, 0], np.uint8),
    "flat": np.array([-1, 24], np.int64),
    "cube": np.array([-1, 2, 3, 4], np.int64),
    "one": np.array([1], np.int64),
    "ones": np.ones(4, np.float32),
    "low": np.array(-1.0, np.float32),
}


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def model(*nodes, outputs=("codes",), kind=TensorProto.UINT8, shape=(2, 3, 4)):
    """Return a model that reads ``x``, ``[batch, 2, 3, 4]``."""
    kinds = dict.fromkeys(outputs, kind) if not isinstance(outputs, dict) else outputs
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
        [numpy_helper.from_array(value, name) for name, value in STORED.items()],
    )
    opsets = [helper.make_opsetid("", 23)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=11))


def results(changed):
    proto = ir.to_proto(changed)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).normal(size=(3, 2, 3, 4)).astype(np.float32)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"x": x}), strict=True))


def quantized_early(*nodes, **settings):
    """Return the operators in order afterwards, and how many move codes."""
    before, after = model(*nodes, **settings), model(*nodes, **settings)

    count = quantize_early(after)

    expected, found = results(before), results(after)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    return [n.op_type for n in after.graph], count


QUANTIZE = node("QuantizeLinear", "last scale point", "codes", name="site")


# Quantizing early


def test_reshapes_and_transposes_move_codes():
    found = quantized_early(
        node("Transpose", "x", "moved", perm=[0, 2, 1, 3]),
        node("Reshape", "moved flat", "last"),
        QUANTIZE,
    )

    assert found == (["QuantizeLinear", "Transpose", "Reshape"], 2)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("Flatten", "x", {"axis": 1}),
        ("Unsqueeze", "x one", {}),
        ("Transpose", "x", {"perm": [3, 0, 1, 2]}),
    ],
)
def test_every_move_of_all_values_is_passed(op, inputs, attributes):
    found = quantized_early(node(op, inputs, "last", **attributes), QUANTIZE)

    assert found == (["QuantizeLinear", op], 1)


def test_codes_keep_their_name_and_those_in_front_get_another():
    changed = model(
        node("Reshape", "x flat", "last"),
        QUANTIZE,
        node("DequantizeLinear", "codes scale point", "y"),
        outputs=("y",),
        kind=TensorProto.FLOAT,
    )

    quantize_early(changed)

    quantize, reshape, dequantize = changed.graph
    assert (quantize.name, quantize.outputs[0].name) == ("site", "codes_early")
    assert reshape.outputs[0].name == dequantize.inputs[0].name == "codes"
    assert reshape.outputs[0].dtype == ir.DataType.UINT8


def test_signed_codes_are_moved_as_such():
    signed = ir.tensor(np.array(0, np.int8), name="point")
    changed = model(node("Reshape", "x flat", "last"), QUANTIZE, kind=TensorProto.INT8)
    changed.graph.initializers["point"].const_value = signed
    changed.graph.initializers["point"].type = ir.TensorType(ir.DataType.INT8)

    assert quantize_early(changed) == 1
    assert results(changed)["codes"].dtype == np.int8


def test_a_move_that_has_another_reader_moves_floats():
    """Only what is behind it moves codes."""
    found = quantized_early(
        node("Transpose", "x", "shared", perm=[0, 2, 1, 3]),
        node("Reshape", "shared flat", "last"),
        QUANTIZE,
        node("Relu", "shared", "y"),
        outputs={"codes": TensorProto.UINT8, "y": TensorProto.FLOAT},
    )

    assert found == (["Transpose", "QuantizeLinear", "Reshape", "Relu"], 1)


def test_a_move_that_is_an_output_moves_floats():
    found = quantized_early(
        node("Transpose", "x", "features", perm=[0, 2, 1, 3]),
        node("Reshape", "features flat", "last"),
        QUANTIZE,
        outputs={"codes": TensorProto.UINT8, "features": TensorProto.FLOAT},
    )

    assert found == (["Transpose", "QuantizeLinear", "Reshape"], 1)


def test_several_scales_are_not_moved():
    found = quantized_early(
        node("Transpose", "x", "last", perm=[0, 2, 1, 3]),
        node("QuantizeLinear", "last scales points", "codes", axis=3),
    )

    assert found == (["Transpose", "QuantizeLinear"], 0)


def test_what_changes_values_is_not_passed():
    found = quantized_early(
        node("Transpose", "x", "moved", perm=[0, 2, 1, 3]),
        node("Max", "moved low", "last"),
        QUANTIZE,
    )

    assert found == (["Transpose", "Max", "QuantizeLinear"], 0)


def test_two_quantizers_of_one_move_stay_behind_it():
    found = quantized_early(
        node("Reshape", "x flat", "last"),
        QUANTIZE,
        node("QuantizeLinear", "last scale point", "others"),
        outputs=("codes", "others"),
    )

    assert found == (["Reshape", "QuantizeLinear", "QuantizeLinear"], 0)


# Sums


def summed(*nodes):
    before, after = (model(*nodes, outputs=("y",), kind=TensorProto.FLOAT) for _ in range(2))
    count = sums_in_front_of_norms(after)
    np.testing.assert_array_equal(results(before)["y"], results(after)["y"])
    return [n.op_type for n in after.graph], count


NORM = node("LayerNormalization", "sum ones ones", "y", axis=-1)


def test_an_addition_in_front_of_a_norm_is_a_sum():
    assert summed(node("Add", "x x", "sum"), NORM) == (["Sum", "LayerNormalization"], 1)


def test_a_sum_broadcasts_as_the_addition_did():
    assert summed(node("Add", "x ones", "sum"), NORM)[1] == 1


def test_other_operators_in_front_of_norms_and_other_additions_stay():
    found = summed(node("Add", "x x", "twice"), node("Mul", "twice twice", "sum"), NORM)

    assert found == (["Add", "Mul", "LayerNormalization"], 0)


# In files


@pytest.fixture
def exported(model_of, tmp_path):
    """Return the path and the result of a file of the tiny network."""

    def export(count=3, **settings):
        path = tmp_path / "m.onnx"
        return path, model_of.export_onnx(path, images=images(count, seed=3), **settings)

    return export


@pytest.fixture
def model_of(models, traced):
    return models("deploy", "W8A8")


def optimised(path):
    """Return the operators that onnxruntime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(path.with_suffix(".optimised.onnx")).graph
    return [node.op_type for node in graph.node]


@pytest.mark.parametrize("batch", [None, 2])
def test_no_addition_is_fused_into_a_norm(exported, batch):
    path, _ = exported(batch=batch)

    found = optimised(path)

    assert "SkipLayerNormalization" not in found
    assert (found.count("Sum"), found.count("LayerNormalization")) == (5, 5)


def test_an_addition_would_be(exported, monkeypatch):
    plain = dataclasses.replace(TARGETS["ort-cpu"], residual="add")
    monkeypatch.setitem(TARGETS, "ort-cpu", plain)

    path, _ = exported(batch=2)

    assert "SkipLayerNormalization" in optimised(path)


# One size of batch


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_file_of_one_batch_takes_that_and_no_other(exported, model_of, batch):
    """Five images in one inference are more than there are to compare."""
    path, result = exported(batch=batch)

    proto, _ = load_file(path)
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_value == batch
    assert (result.batch, result.verification.images) == (batch, 3)
    assert result.verification.cosine > 0.999
    assert result.verification.integer_linears == result.verification.linears
    predict, x = onnx_predictor(path), images(batch + 1, seed=5)
    torch.testing.assert_close(predict(x[:batch]), model_of(x[:batch]), atol=2e-2, rtol=1e-2)
    for other in {batch - 1, batch + 1} - {0}:
        with pytest.raises(InputError, match=rf"expected images of \[{batch}, 3, 32, 32\]"):
            predict(x[:other])


def test_a_file_of_any_batch_says_so(exported):
    _, result = exported()

    assert result.batch is None


def test_a_file_that_is_wrong_at_its_batch_alone_is_refused(exported, monkeypatch):
    """The comparison is made at the batch of the file."""
    original = exporter.verify

    def tampered(path, *arguments, **settings):
        proto = onnx.load(path)
        for tensor in proto.graph.initializer:
            if tensor.name == "head.bias":
                values = numpy_helper.to_array(tensor) + np.arange(10, dtype=np.float32)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(proto, path)
        return original(path, *arguments, **settings)

    monkeypatch.setattr(exporter, "verify", tampered)

    with pytest.raises(ExportError, match="outputs differ from the model's at batch 4"):
        exported(batch=4)


@pytest.mark.parametrize("batch", [0, -1])
def test_a_batch_of_no_images_is_refused_before_any_work(exported, batch, monkeypatch):
    monkeypatch.setattr(exporter, "rewritten", lambda *_: pytest.fail("work was done"))

    with pytest.raises(ConfigError, match=f"batch: expected .* at least 1, got {batch}"):
        exported(batch=batch)


def test_inferred_shapes_are_dropped_where_the_batch_is_fixed():
    changed = model(
        node("Reshape", "x flat", "last"),
        node("Relu", "last", "y"),
        outputs=("y",),
        kind=TensorProto.FLOAT,
    )
    changed.graph[0].outputs[0].shape = ir.Shape(["batch", 24])

    fix_batch(changed, 3)

    assert changed.graph[0].outputs[0].shape is None
    assert list(changed.graph.inputs[0].shape) == [3, 2, 3, 4]
    assert results(changed)["y"].shape == (3, 24)
