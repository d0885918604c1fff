"""What is refused, and the proof that verification can fail."""

import ast
import json
import os
import stat
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from drawn import Drawing
from finished import quantized
from onnx import TensorProto, helper, numpy_helper
from tiny import images

from vitcompress import Recipe
from vitcompress.calibration.interpreter import run
from vitcompress.errors import ConfigError, ExportError
from vitcompress.export.onnx import TARGETS, exporter, verify
from vitcompress.export.onnx.activations import StoredCodes
from vitcompress.export.onnx.float_model import export_float_onnx
from vitcompress.export.onnx.verify import verify as verify_file


def refusal(model, path, **settings):
    before = set(path.parent.iterdir())
    with pytest.raises(ExportError) as caught:
        model.export_onnx(path, **settings)
    assert caught.value.exit_code == 4
    assert set(path.parent.iterdir()) == before
    return str(caught.value)


def test_published_repq_vit_is_refused_before_tracing(models, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "marked_model", lambda *_, **__: pytest.fail("traced"))
    model = models("repq_vit_paper", "W4A4")

    message = refusal(model, tmp_path / "m.onnx")

    assert "sites cannot be written to ONNX" in message
    assert "not strictly 4 bits" in message
    assert "blocks.0.attn:probs: not strictly 4 bits: 17 levels, 4 bits hold 16" in message
    assert "more" in message


def test_unknown_target_is_refused_with_the_known_ones(model, tmp_path):
    with pytest.raises(ConfigError, match=r"expected one of \['generic', 'openvino', "):
        model.export_onnx(tmp_path / "m.onnx", target="npu")

    assert set(TARGETS) == {"generic", "openvino", "ort-cpu", "tensorrt"}


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"roles": ["weight"], "format": "log2"}, "format log2 is not offered on weights"),
        (
            {"roles": ["probs"], "format": "log2", "granularity": "per_head"},
            "tables are offered per tensor only",
        ),
    ],
)
def test_formats_without_a_spelling_are_listed(vit_graph, source, tmp_path, rule, reason):
    recipe = {
        "schema": 1,
        "name": "odd",
        "scheme": "W8A8",
        "passes": [
            {"pass": "attach", "rules": [rule]},
            {"pass": "calibrate", "method": "minmax"},
            {"pass": "freeze"},
        ],
    }
    model = quantized(vit_graph, source, recipe=Recipe.from_dict(recipe))

    assert reason in refusal(model, tmp_path / "m.onnx")


def corrupt(monkeypatch, edit):
    """Let ``edit`` change the ONNX model between writing and verification."""
    original = exporter.verify

    def tampered(path, *arguments, **settings):
        proto = onnx.load(path)
        edit(proto.graph)
        onnx.save(proto, path)
        return original(path, *arguments, **settings)

    monkeypatch.setattr(exporter, "verify", tampered)


def scale_of(graph, name, factor):
    (node,) = [n for n in graph.node if n.name == name]
    for tensor in graph.initializer:
        if tensor.name == node.input[3]:  # of the weight
            values = (factor * numpy_helper.to_array(tensor)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def test_one_wrong_scale_is_found_and_leaves_no_file(model, traced, tmp_path, monkeypatch):
    corrupt(monkeypatch, lambda graph: scale_of(graph, "blocks.1.fc2", 3.0))

    message = refusal(model, tmp_path / "m.onnx")

    assert "of the codes differ from the model's" in message


def test_failed_verification_keeps_the_earlier_file(model, traced, tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_text("earlier")
    corrupt(monkeypatch, lambda graph: scale_of(graph, "head", -1.0))

    refusal(model, path)

    assert path.read_text() == "earlier"


def test_file_that_yields_nan_is_refused(model, traced, tmp_path, monkeypatch):
    corrupt(monkeypatch, lambda graph: scale_of(graph, "blocks.0.fc1", float("nan")))

    refusal(model, tmp_path / "m.onnx")


def test_invalid_file_is_refused(model, traced, tmp_path, monkeypatch):
    corrupt(monkeypatch, lambda graph: graph.node.reverse())

    assert "not valid ONNX" in refusal(model, tmp_path / "m.onnx")


def test_linear_that_falls_out_of_the_integer_kernels_is_counted(
    model, traced, tmp_path, monkeypatch
):
    def in_float(graph):
        (node,) = [n for n in graph.node if n.name == "blocks.0.fc1"]
        stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        codes, weight, x_scale, scale, x_point, point, bias = node.input
        values = (stored[weight].astype(np.float32) - stored[point]) * stored[scale]
        for name, value in (("plain", values), ("zero", np.float32(stored[x_point]))):
            graph.initializer.append(numpy_helper.from_array(value, name))
        chain = [
            helper.make_node("Cast", [codes], ["fc1_cast"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["fc1_cast", "zero"], ["fc1_moved"]),
            helper.make_node("Mul", ["fc1_moved", x_scale], ["fc1_input"]),
            helper.make_node("MatMul", ["fc1_input", "plain"], ["fc1_bare"], name=node.name),
            helper.make_node("Add", ["fc1_bare", bias], list(node.output)),
        ]
        place = list(graph.node).index(node)
        graph.node.remove(node)
        for offset, part in enumerate(chain):
            graph.node.insert(place + offset, part)

    corrupt(monkeypatch, in_float)

    result = model.export_onnx(tmp_path / "m.onnx")

    found = result.verification
    assert found.linears - found.integer_linears == 1
    assert list(found.float_linears) == ["blocks.0.fc1"]
    assert model.report.exports[-1].execution == "simulated"


def test_result_that_is_right_for_one_image_alone_is_refused(
    model, traced, tmp_path, monkeypatch
):
    def accumulate(graph):
        (output,) = graph.output
        (last,) = [node for node in graph.node if output.name in node.output]
        last.output[0] = "alone"
        graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "batch_axis"))
        graph.node.append(helper.make_node("CumSum", ["alone", "batch_axis"], [output.name]))

    corrupt(monkeypatch, accumulate)

    message = refusal(model, tmp_path / "m.onnx")

    assert message.startswith("m.onnx: outputs differ from the model's at batch 2: cosine 0.")


# In step


@pytest.fixture(scope="module")
def stepped(models):
    """Return a graph, images, and a way to compute its codes, one site's shifted."""
    graph, x = models("deploy", "W8A8").graph, images(4, seed=7)
    quantizers = graph.quantizers()
    nodes = {
        str(node.target): node
        for node in graph.nodes_of_kind("call_module")
        if not quantizers[str(node.target)].frozen
    }

    def codes(shifted):
        """Quantize ``shifted(target, x)`` at each quantizer; return logits and codes."""
        found = {}

        def step(target, value):
            quantizer = quantizers[target]
            found[target] = quantizer.quantize(shifted(target, value)).int()
            return quantizer.dequantize(found[target])

        replaced = {node: partial(step, target) for target, node in nodes.items()}
        (logits,) = run(graph, x, replaced=replaced)
        # A file stores codes from 0.
        return logits, {t: c - quantizers[t].bounds[0] for t, c in found.items()}

    return SimpleNamespace(graph=graph, images=x, nodes=nodes, codes=codes)


def compare(stepped, logits, codes):
    path = Path("m.onnx")
    return verify._compare_in_step(path, stepped.graph, stepped.images, [logits], codes)


def test_the_same_codes_agree(stepped):
    mismatch, likeness = compare(stepped, *stepped.codes(lambda target, x: x))

    assert mismatch == 0.0
    assert likeness == pytest.approx(1.0)


def test_codes_of_a_file_are_led_back_to_the_quantizers():
    own = torch.arange(-128, 128, dtype=torch.int32).reshape(2, 8, 16)
    stored = (own - 5).permute(2, 0, 1).clamp(-128, 127).to(torch.int8)

    found = StoredCodes("codes", offset=5, order=(1, 2, 0)).of(stored)

    assert found.dtype == torch.int32
    assert torch.equal(found, own.clamp(-123, 132))


@pytest.mark.parametrize("sign", [-1, 1])
def test_codes_that_differ_at_ties_alone_pass(stepped, sign):
    width = 0.9 * sign * verify.TIE_WIDTH

    found = stepped.codes(lambda target, x: x + width * x.abs().max())

    mismatch, likeness = compare(stepped, *found)
    # 255 steps over the values: one in about a hundred lies that close to a boundary.
    assert mismatch > verify.MOST_UNEXPLAINED
    assert likeness > verify.LEAST_COSINE


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shifted_zero_point_fails_at_its_site(stepped, shift):
    shifted = "quantizers.blocks_1_fc2_input"
    logits, codes = stepped.codes(lambda target, x: x)
    codes[shifted] = (codes[shifted] + shift).clamp(0, 255)

    with pytest.raises(ExportError, match=r"m\.onnx: blocks\.1\.fc2:input: .* are no ties"):
        compare(stepped, logits, codes)


def test_right_codes_with_wrong_outputs_fail(stepped):
    logits, codes = stepped.codes(lambda target, x: x)

    with pytest.raises(ExportError, match="outputs differ from the model's at batch 4"):
        compare(stepped, logits.roll(1, dims=1), codes)


@pytest.fixture(scope="module")
def two_outputs(tmp_path_factory):
    """Return a graph of two outputs, and its file."""
    draw = Drawing(3, 8, 8)
    first = draw(torch.ops.aten.gelu.default, draw.images)
    captured = draw.captured(first, draw(torch.ops.aten.sigmoid.default, first))
    path = tmp_path_factory.mktemp("outputs") / "m.onnx"
    export_float_onnx(captured, path)
    return captured, path


@pytest.mark.parametrize("runtime", verify.PROGRAMS)
def test_each_output_is_compared(two_outputs, tmp_path, runtime):
    if runtime == "OpenVINO":
        pytest.importorskip("openvino")
    captured, path = two_outputs
    settings = {"codes": {}, "linears": [], "reasons": {}, "runtime": runtime}
    x = images(3, 8)
    proto = onnx.load(path)
    (sigmoid,) = [node for node in proto.graph.node if node.op_type == "Sigmoid"]
    sigmoid.op_type = "Softplus"
    onnx.save(proto, tmp_path / "m.onnx")

    assert verify_file(path, captured, x, **settings).in_step_cosine > 1.0 - 1e-9
    with pytest.raises(ExportError, match=r"m\.onnx: output 'y1' differs from the model's"):
        verify_file(tmp_path / "m.onnx", captured, x, **settings)


def onnx_file(path, *nodes, shape=("batch", 10)):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(np.ones((3072, 10), np.float32), "weight"),
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    onnx.save(model, path)
    return path


def test_file_that_does_not_run_is_refused(vit_graph, tmp_path):
    path = onnx_file(
        tmp_path / "m.onnx",
        helper.make_node("Concat", ["images", "weight"], ["x"], axis=0),
        helper.make_node("Identity", ["x"], ["output"]),
    )

    with pytest.raises(ExportError, match=r"m\.onnx: (not valid ONNX|onnxruntime cannot run)"):
        verify_file(path, vit_graph, images(4), codes={}, linears=[], reasons={})


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """Put a shell script in the place of Python for the runtime's process."""
    script = tmp_path / "python"

    def install(line):
        script.write_text(f"#!/bin/sh\n{line}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(verify.sys, "executable", os.fspath(script))

    return install


def test_crash_of_the_runtime_is_reported(model, traced, tmp_path, interpreter):
    interpreter("kill -SEGV $$")

    message = refusal(model, tmp_path / "m.onnx")

    assert "onnxruntime cannot run it: exit code -11" in message


def test_last_line_of_the_runtime_is_the_reason(model, traced, tmp_path, interpreter):
    interpreter("echo first >&2; echo 'no kernel for Frobnicate' >&2; exit 1")

    assert refusal(model, tmp_path / "m.onnx").endswith("no kernel for Frobnicate")


def test_runtime_starts_without_this_package_and_torch(model, traced, tmp_path, interpreter):
    """As a module of the package, the process would import all of it first."""
    interpreter('echo "$1 $2" >&2; exit 1')

    flag, script = refusal(model, tmp_path / "m.onnx").split()[-2:]

    assert flag == "-P"
    imports = {
        name.name.partition(".")[0]
        for node in ast.walk(ast.parse(Path(script).read_text()))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert imports == {"json", "sys", "tempfile", "numpy", "onnx", "onnxruntime"}


def test_runtime_that_hangs_is_stopped(model, traced, tmp_path, interpreter, monkeypatch):
    monkeypatch.setattr(verify, "TIMEOUT_SECONDS", 0.2)
    interpreter("exec sleep 30")

    assert "did not finish in 0.2 s" in refusal(model, tmp_path / "m.onnx")


def test_model_that_the_exporter_cannot_translate_is_reported(model, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("\n\nno translation for aten.frobnicate\nmore lines")

    monkeypatch.setattr("torch.onnx.export", broken)

    message = refusal(model, tmp_path / "m.onnx")

    assert message == "tiny: torch.onnx cannot translate the graph: no translation for " + (
        "aten.frobnicate"
    )


def test_existing_file_is_replaced_only_when_allowed(model, traced, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_text("earlier")

    with pytest.raises(ConfigError, match="exists already"):
        model.export_onnx(path, overwrite=False)
    assert path.read_text() == "earlier"

    model.export_onnx(path)

    onnx.checker.check_model(str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_export_leaves_the_model_as_it_was(model, traced, tmp_path):
    x = images(2)
    before, nodes = model(x), len(model.graph.graph.nodes)
    exports = len(model.report.exports)

    model.export_onnx(tmp_path / "m.onnx", target="generic")

    assert (model(x) == before).all()
    assert len(model.graph.graph.nodes) == nodes
    assert len(model.report.exports) == exports + 1
    assert json.loads(model.report.to_json())["exports"][-1]["target"] == "generic"
