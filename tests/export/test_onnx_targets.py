"""Targets without contrib operators: what they store, what runs them, what is refused."""

import importlib.util
import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from frozen import frozen
from onnx import TensorProto
from onnx_files import load_file
from tiny import images, tiny_vit

from vitcompress.errors import ConfigError, ExportError
from vitcompress.export.onnx import export_onnx
from vitcompress.export.onnx.structure import violations
from vitcompress.export.onnx.targets import TARGETS
from vitcompress.graph import capture
from vitcompress.report import ExportEntry

openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,
    reason="OpenVINO is not installed; pip install 'vitcompress[openvino]'",
)
WITHOUT_OPENVINO = "OpenVINO is not installed; pip install 'vitcompress[openvino]'"


@pytest.fixture(autouse=True)
def _traced_once(traced_once):
    with traced_once():
        yield


@pytest.fixture(
    scope="module",
    params=[
        *("W8A8", "W2A8"),
        pytest.param("W4A8", marks=pytest.mark.slow),
        pytest.param("W3A8", marks=pytest.mark.slow),  # stored as W4A8 is
    ],
)
def symmetric(request, models):
    return models("deploy_symmetric", request.param)


@pytest.fixture(scope="module")
def written(symmetric, tmp_path_factory):
    """Return the file for a target, written once, and what its export reported."""
    known = {}

    def written(target):
        if target not in known:
            path = tmp_path_factory.mktemp(target) / "m.onnx"
            result = symmetric.export_onnx(path, target=target, images=images(4, seed=3))
            known[target] = path, result
        return known[target]

    return written


@pytest.mark.parametrize("target", ["openvino", "tensorrt", "generic"])
def test_files_hold_standard_operators_alone(written, target):
    path, _ = written(target)

    model, _ = load_file(path)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert violations(ir.load(path), TARGETS[target]) == []


def test_tensorrt_file_is_int8_throughout_and_said_to_be_unexecuted(written):
    path, result = written("tensorrt")

    model, graph = load_file(path)
    kinds = {t.data_type for t in model.graph.initializer}
    assert not kinds & {TensorProto.UINT8, TensorProto.INT4, TensorProto.INT2}
    assert not graph.of_type("Cast")
    for node in graph.of_type("QuantizeLinear"):
        assert graph.constant(node.input[2]).dtype == np.int8
        assert not graph.constant(node.input[2]).any()
    for product in (*graph.of_type("MatMul"), *graph.of_type("Conv")):
        made = [graph.behind_moves(name).op_type for name in product.input[:2]]
        assert made.count("DequantizeLinear") in (0, 2), product.name
    assert result.not_executed.startswith("TensorRT is not here")
    entry = ExportEntry.of(result)
    assert (entry.execution, entry.not_executed) == ("simulated", result.not_executed)
    assert result.verification.cosine > 0.999


def test_zero_points_of_activations_are_kept_where_those_of_weights_are_not_taken(
    models, tmp_path
):
    model = models("deploy_symmetric_weights", "W8A8")

    result = model.export_onnx(
        tmp_path / "m.onnx", target="openvino", images=images(16, seed=3)
    )

    _, graph = load_file(tmp_path / "m.onnx")
    points = [graph.constant(node.input[2]) for node in graph.of_type("QuantizeLinear")]
    assert {point.dtype for point in points} == {np.dtype(np.uint8)}
    # Around 0 they would be 128.
    assert sum(int(point) != 128 for point in points) > len(points) // 2
    for node in graph.of_type("DequantizeLinear"):
        if node.input[0] in graph.initializers:
            assert len(node.input) == 2
    assert result.verification.in_step_cosine > 1.0 - 1e-9


def test_generic_file_is_said_to_be_unexecuted(written):
    _, result = written("generic")

    assert "is not here; structure and values were checked" in result.not_executed
    assert ExportEntry.of(result).execution == "simulated"


def test_without_openvino_its_file_is_checked_in_onnxruntime(symmetric, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name)
    )

    result = symmetric.export_onnx(
        tmp_path / "m.onnx", target="openvino", images=images(4, seed=3)
    )

    assert result.not_executed == WITHOUT_OPENVINO
    assert result.verification.runtime.startswith("onnxruntime")
    with pytest.raises(ConfigError, match="OpenVINO writes it and is not installed"):
        symmetric.export_onnx(tmp_path / "n.onnx", target="openvino", ir=True)


@openvino
@pytest.mark.parametrize(
    ("recipe", "scheme"),
    [
        ("deploy_symmetric", "W8A8"),
        *(("deploy_symmetric_weights", scheme) for scheme in ("W8A8", "W4A8", "W2A8")),
    ],
)
def test_openvino_runs_every_linear_as_integers(models, tmp_path, recipe, scheme):
    result = models(recipe, scheme).export_onnx(
        tmp_path / "m.onnx", target="openvino", ir=True, images=images(4, seed=3)
    )

    found = result.verification
    assert found.runtime.startswith("OpenVINO")
    assert (found.integer_linears, found.float_linears) == (found.linears, {})
    assert result.not_executed == ""
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.xml", "m.bin"}


@pytest.mark.parametrize(
    ("target", "site", "cure"),
    [
        ("openvino", r"blocks\.0\.attn\.qkv:weight", "deploy_symmetric_weights"),
        ("tensorrt", r"patch_embed:input", "deploy_symmetric"),
    ],
)
def test_zero_points_that_int8_cannot_take_are_refused_with_the_cure(
    models, tmp_path, target, site, cure
):
    model = models("deploy", "W8A8")

    with pytest.raises(ExportError, match=f"{site}: codes less their zero point") as refused:
        model.export_onnx(tmp_path / "m.onnx", target=target)

    assert str(refused.value).endswith(f"; quantize again with --recipe {cure}")
    assert not list(tmp_path.iterdir())


def test_narrow_weights_keep_their_zero_points_in_an_exact_form(models, tmp_path):
    """Codes of 4 bits less their zero point fit INT8: the difference is stored as a node."""
    model = models("deploy", "W4A8")

    result = model.export_onnx(
        tmp_path / "m.onnx", target="openvino", images=images(16, seed=3)
    )

    _, graph = load_file(tmp_path / "m.onnx")
    assert graph.of_type("Sub")
    assert result.verification.in_step_cosine > 1.0 - 1e-9


# Sizes and leftovers


@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
def test_a_file_is_its_packed_weights_and_the_leftovers(symmetric, written, target):
    path, result = written(target)

    bits = symmetric.recipe.scheme.weight_bits
    codes = [t for n, t in symmetric.graph.tensors().items() if not t.is_floating_point()]
    width = 8 if bits > 4 else 4 if bits > 2 or target == "openvino" else 2
    assert result.size.packed_bytes == sum(t.numel() for t in codes) * width // 8
    model = onnx.load(path)
    stored = sum(t.ByteSize() for t in model.graph.initializer)
    parts = result.size.packed_bytes + result.size.parameter_bytes + result.size.leftover_bytes
    assert parts <= stored
    assert "pos_embed" in result.size.largest_leftovers


@pytest.fixture(scope="module")
def wide():
    """Return a graph whose weights outweigh the structure of its file, as in real networks."""
    return capture(tiny_vit(dim=384, depth=1, heads=4), images(2), model_id="wide")


@pytest.mark.parametrize(
    ("bits", "container"),
    # ONNX has no type of 3 bits: the bar is that of its container.
    [pytest.param(4, 4, marks=pytest.mark.slow), (3, 4), (2, 2)],
)
def test_a_file_is_within_three_percent_of_its_packed_weights(wide, tmp_path, bits, container):
    attention = {"roles": ["query", "key", "value", "probs"], "skip": True}
    weights = {"roles": ["weight"], "granularity": "per_channel", "bits": bits}
    graph = frozen(wide, attention, weights)

    result = export_onnx(graph, tmp_path / "m.onnx", images(4))

    stored = [q for q in graph.quantizers().values() if q.frozen]
    codes = [t for t in graph.tensors().values() if not t.is_floating_point()]
    packed = sum(t.numel() for t in codes) * container / 8
    scales = sum(4 * q.scale.numel() + q.zero_point.numel() for q in stored)
    floats = sum(4 * t.numel() for t in graph.tensors().values() if t.is_floating_point())
    assert [q.spec.bits for q in stored] == [bits] * len(codes)
    assert result.size.leftover_bytes <= 1.01 * floats
    bar = 1.03 * (packed + scales + result.size.leftover_bytes)
    assert packed < (tmp_path / "m.onnx").stat().st_size == result.size_bytes <= bar


@pytest.mark.parametrize(("storage", "bytes_each"), [("float16", 2), ("int8", 1)])
def test_tables_are_stored_narrow_and_folded(models, tmp_path, storage, bytes_each):
    model = models("deploy", "W8A8")
    wide = model.export_onnx(tmp_path / "wide.onnx", images=images(16, seed=3))

    result = model.export_onnx(
        tmp_path / "m.onnx", leftovers=storage, images=images(16, seed=3)
    )

    name = f"pos_embed.{storage}"
    numbers = model.graph.parameter("pos_embed").numel()
    assert result.size.largest_leftovers[name] == numbers * bytes_each
    assert result.size.leftover_bytes < wide.size.leftover_bytes
    assert 0.99 < result.leftover_cosine < 1.0
    assert wide.leftover_cosine == 1.0
    assert result.verification.in_step_cosine > 1.0 - 1e-9


def test_unknown_storage_of_leftovers_is_refused(models, tmp_path):
    with pytest.raises(ConfigError, match=re.escape("leftovers: expected one of")):
        models("deploy", "W8A8").export_onnx(tmp_path / "m.onnx", leftovers="float8")
