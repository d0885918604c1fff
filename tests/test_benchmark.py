import importlib
import json
import logging
import shutil
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from finished import quantized
from onnx import helper
from test_layering import imported_modules
from tiny import images

import vitcompress
from vitcompress.calibration.interpreter import run
from vitcompress.errors import ConfigError, ExportError, InputError
from vitcompress.export.onnx import float_model, stopwatch, timing
from vitcompress.export.onnx.contents import read_contents
from vitcompress.export.onnx.coverage import (
    FLOAT_OPS,
    INTEGER_OPS,
    float_products,
    integer_ops,
)
from vitcompress.export.onnx.float_model import (
    quantize_dynamically,
    without_quantizers,
)
from vitcompress.export.onnx.stopwatch import Timing, time_files
from vitcompress.graph.edit import is_quantizer
from vitcompress.speed import (
    BenchmarkReport,
    Samples,
    figures,
    interquartile_range,
    speedup,
)

# The function of this name hides the module.
benchmarking = importlib.import_module("vitcompress.benchmark")

#: The head, and four in each of two blocks.
LINEARS = 9
#: Those of a file for onnxruntime: patches are one, query, key and value of each block three.
SEPARATE = 14


@pytest.fixture(scope="module")
def model(vit_graph, source):
    return quantized(vit_graph, source, recipe="deploy")


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """A benchmark of the tiny model's artefact in two cases, and the references it made."""
    folder = tmp_path_factory.mktemp("made")
    artefact, float32, dynamic = (folder / name for name in ("artefact", "f.onnx", "d.onnx"))
    model.save(artefact)

    def kept(source, path):
        quantize_dynamically(source, path)
        shutil.copy(source, float32)
        shutil.copy(path, dynamic)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarking, "quantize_dynamically", kept)
        report = vitcompress.benchmark([artefact], batches=(1, 3), rounds=3)
    return SimpleNamespace(artefact=artefact, float32=float32, dynamic=dynamic, report=report)


@pytest.fixture(scope="module")
def report(made):
    return made.report


# Statistics


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3, 1, 2, 5, 4], 2.0), ([1, 2, 3, 4], 1.5), ([7, 7, 7], 0.0), ([4], 0.0)],
)
def test_interquartile_range_by_hand(values, expected):
    assert interquartile_range(values) == expected


def test_speedup_is_the_median_of_the_ratios_of_each_round():
    reference, own = [10.0, 100.0, 30.0], [10.0, 50.0, 5.0]

    # Ratios 1, 2 and 6; the ratio of the medians would be 30 / 10.
    assert speedup(reference, own) == 2.0


def test_figures_of_an_entry_by_hand():
    samples = {
        "ours": Samples(wall_ms=(4.0, 2.0, 3.0, 5.0), cpu_ms=(8.0, 4.0, 6.0, 7.0)),
        "float": Samples(wall_ms=(8.0, 6.0, 12.0, 5.0), cpu_ms=(1.0, 1.0, 1.0, 1.0)),
    }
    references = {"float32": "float", "bfloat16": "ours", "dynamic_int8": None}

    found = figures("ours", samples, 7, references)

    assert found == {
        "rounds": 4,
        "median_wall_ms": 3.5,
        "iqr_wall_ms": 1.5,
        "median_cpu_ms": 6.5,
        "images_per_second": 2000.0,
        "wall_ms": (4.0, 2.0, 3.0, 5.0),
        "cpu_ms": (8.0, 4.0, 6.0, 7.0),
        "speedup_over_float32": 2.5,  # of 2, 3, 4 and 1
        "speedup_over_bfloat16": 1.0,
        "speedup_over_dynamic_int8": None,
    }


def test_samples_follow_the_rounds_and_not_the_order_within_them():
    rounds = [[("a", 1.0, 2.0), ("b", 3.0, 4.0)], [("b", 5.0, 6.0), ("a", 7.0, 8.0)]]

    samples = Timing("ort", {}, {"a": {}, "b": {}}, rounds).samples()

    assert samples["a"] == Samples(wall_ms=(1.0, 7.0), cpu_ms=(2.0, 8.0))
    assert samples["b"] == Samples(wall_ms=(3.0, 5.0), cpu_ms=(4.0, 6.0))


def test_products_are_told_apart_in_both_runtimes():
    fused = {"QGemm": 9, "MatMul": 4, "Conv": 1, "Add": 7}
    compiled = {"FullyConnected i8": 9, "Convolution bf16": 1, "Subgraph f32": 2, "Add i8": 3}

    assert (integer_ops(fused), float_products(fused)) == ({"QGemm": 9}, 5)
    assert (integer_ops(compiled), float_products(compiled)) == ({"FullyConnected i8": 9}, 1)
    assert not set(FLOAT_OPS) & set(INTEGER_OPS)


# References


def activations_bypassed(model, x):
    """Return the logits with stored weights and no activation quantizer."""
    frozen = {target for target, q in model.graph.quantizers().items() if q.frozen}
    replaced = {
        node: lambda value: value
        for node in model.graph.graph.nodes
        if is_quantizer(node) and node.target not in frozen
    }
    return run(model.graph, x, replaced=replaced)[0]


@pytest.mark.parametrize("settings", [{"bits": 4}, {"recipe": "repq_vit"}])
def test_float_graph_has_the_values_of_the_stored_weights(vit_graph, source, settings):
    model = quantized(vit_graph, source, **settings)
    x = images(3)
    before = model(x)

    bare = without_quantizers(model.graph)

    assert bare.quantizers() == {}
    assert all(tensor.is_floating_point() for tensor in bare.tensors().values())
    assert torch.equal(bare.logits(x), activations_bypassed(model, x))
    assert len(model.graph.quantizers()) > 0
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("batch", [1, 3])
def test_float_file_computes_what_the_graph_does_with_quantizers_bypassed(model, made, batch):
    x = images(batch, seed=5)
    session = onnxruntime.InferenceSession(made.float32, providers=["CPUExecutionProvider"])

    (logits,) = session.run(None, {"images": x.numpy()})

    torch.testing.assert_close(
        torch.from_numpy(logits), activations_bypassed(model, x), rtol=1e-4, atol=1e-4
    )
    assert read_contents(made.float32).is_float32
    assert read_contents(made.float32).image_shape == (3, 32, 32)
    assert read_contents(made.float32).batch is None


def test_dynamic_file_has_signed_weights_per_channel_and_unsigned_activations(made):
    graph = onnx.load(made.dynamic).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    ops = Counter(node.op_type for node in graph.node)

    assert ops["MatMulInteger"] == ops["DynamicQuantizeLinear"] == LINEARS
    assert ops["Conv"] == 1
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            weight, points = stored[node.input[1]], stored[node.input[3]]
            assert weight.dtype == points.dtype == np.int8
            assert points.shape == weight.shape[1:]
    assert not read_contents(made.dynamic).is_float32


def test_dynamic_quantizer_keeps_its_advice_to_itself(made, tmp_path, caplog, capfd):
    quantize_dynamically(made.float32, tmp_path / "dynamic.onnx")

    assert caplog.records == []
    assert capfd.readouterr() == ("", "")
    assert not logging.getLogger().disabled


def test_failure_of_the_dynamic_quantizer_says_how_to_do_without(made, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such luck\nand more")

    monkeypatch.setattr(float_model, "quantize_dynamic", fail)

    with pytest.raises(ExportError, match="no such luck; --no-references leaves it out"):
        quantize_dynamically(made.float32, tmp_path / "dynamic.onnx")


# Measuring


def test_every_file_has_a_turn_in_every_round_in_a_new_order(made):
    files = {"a": made.float32, "b": made.dynamic, "c": made.float32}

    def orders(seed):
        found = time_files(files, (2, 3, 32, 32), threads=1, rounds=5, seed=seed)
        return [[name for name, _, _ in turns] for turns in found.rounds]

    first, again, other = orders(0), orders(0), orders(1)

    assert all(sorted(order) == ["a", "b", "c"] for order in first)
    assert len({tuple(order) for order in first}) > 1
    assert first == again
    assert first != other


def test_measuring_program_needs_neither_torch_nor_this_package():
    with open(timing.__file__, encoding="utf-8") as file:  # noqa: PTH123
        modules = imported_modules(file.read())

    assert not {name.split(".")[0] for name in modules} & {"torch", "vitcompress", "calib"}


def test_crash_of_the_measuring_program_fails_the_benchmark_alone(made, monkeypatch, tmp_path):
    (tmp_path / "crash.py").write_text("import os\nos.abort()\n")
    monkeypatch.setattr(stopwatch.timing, "__file__", str(tmp_path / "crash.py"))

    with pytest.raises(ExportError, match="a: ort ended early: exit code -6"):
        time_files({"a": made.float32}, (1, 3, 32, 32), threads=1, rounds=1, seed=0)


@pytest.mark.parametrize("runtime", timing.RUNTIMES)
def test_a_file_runs_in_bfloat16_or_is_left_out_with_the_reason(made, runtime):
    files = {"plain": made.float32, "half": made.float32}
    settings = {"threads": 1, "rounds": 2, "seed": 0, "bfloat16": ["half"]}
    native = runtime == "openvino" and has_bfloat16()

    found = time_files(files, (1, 3, 32, 32), runtime=runtime, **settings)

    assert found.left_out.keys() == (set() if native else {"half"})
    assert all("bfloat16" in reason for reason in found.left_out.values())
    assert set(found.samples()) == set(found.ops) == files.keys() - found.left_out.keys()
    if native:
        kinds = {name: {op.split()[-1] for op in ops} for name, ops in found.ops.items()}
        assert found.ops["half"]["FullyConnected bf16"] == LINEARS
        assert "bf16" not in kinds["plain"]


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [(["FP32", "BF16"], ""), (["FP32"], "OpenVINO finds no bfloat16 units here")],
)
def test_openvino_asks_the_processor_for_bfloat16(monkeypatch, capabilities, reason):
    core = SimpleNamespace(get_property=lambda *_: capabilities)
    fake = SimpleNamespace(Core=lambda: core, __version__="2026.4-1")
    monkeypatch.setitem(sys.modules, "openvino", fake)

    assert timing.RUNTIMES["openvino"]().without_bfloat16 == reason


def has_bfloat16():
    openvino = pytest.importorskip("openvino")
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


# Reports


def test_artefact_is_measured_beside_references_made_from_it(report, made):
    path = str(made.artefact)

    assert [(threads, batch) for threads, batch, _ in report.cases()] == [(1, 1), (1, 3)]
    assert report.float32 == f"float32 of {path}"
    assert report.dynamic_int8 == f"dynamic INT8 of {path}"
    assert report.bfloat16 is None
    assert report.no_bfloat16.startswith("onnxruntime's CPU provider has no faster run")
    for _, _, entries in report.cases():
        assert [(e.name, e.file, e.role) for e in entries] == [
            (f"{path} (ort-cpu)", path, "candidate"),
            (report.float32, path, "float32"),
            (report.dynamic_int8, path, "dynamic_int8"),
        ]
        ours, float32, dynamic = entries
        assert ours.integer_ops == {"MatMulIntegerToFloat": SEPARATE}
        assert (ours.integer_products, float32.integer_products) == (SEPARATE, 0)
        assert dynamic.integer_ops == {"DynamicQuantizeMatMul": LINEARS}
        # The patch embedding, and two products in each of two attentions.
        # Of ours, two cores of attention.
        assert (ours.float_products, dynamic.float_products) == (2, 5)
        assert float32.float_products == LINEARS + 5
        assert float32.speedup_over_float32 == dynamic.speedup_over_dynamic_int8 == 1.0
        assert float32.size_bytes > max(ours.size_bytes, dynamic.size_bytes)
        for entry in entries:
            assert entry.rounds == len(entry.wall_ms) == len(entry.cpu_ms) == 3
            assert entry.speedup_over_float32 == speedup(float32.wall_ms, entry.wall_ms)
            assert entry.speedup_over_dynamic_int8 == speedup(dynamic.wall_ms, entry.wall_ms)
            assert entry.execution == "executed"
            assert entry.runtime == f"onnxruntime {onnxruntime.__version__} CPU"
            assert entry.versions["onnxruntime"] == onnxruntime.__version__


def test_report_survives_json(report):
    text = report.to_json()

    assert BenchmarkReport.from_json(text) == report
    assert json.loads(text)["schema_version"] == 1


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"schema_version": 2}, "b.json: schema_version 2; this version reads 1"),
        ({"entries": [{}]}, r"b.json: entries\.0\.name: Field required"),
        ({"colour": "red"}, "b.json: colour: Extra inputs are not permitted"),
    ],
)
def test_json_of_another_layout_is_refused(report, edit, words):
    text = json.dumps({**json.loads(report.to_json()), **edit})

    with pytest.raises(InputError, match=words):
        BenchmarkReport.from_json(text, "b.json")


def test_plain_float_file_among_the_paths_is_the_reference(made):
    report = vitcompress.benchmark([made.dynamic, str(made.float32)], rounds=1)

    assert report.float32 == str(made.float32)
    assert [(e.file, e.role) for e in report.entries] == [
        (str(made.dynamic), "candidate"),
        (str(made.float32), "float32"),
        (str(made.float32), "dynamic_int8"),
    ]
    assert report.entries[0].sha256 == report.entries[2].sha256  # onnxruntime repeats itself


def test_without_references_there_are_no_ratios(made):
    report = vitcompress.benchmark([made.float32], rounds=1, references=False, batches=[2, 2])

    (entry,) = report.entries
    assert (report.float32, report.dynamic_int8, entry.role) == (None, None, "candidate")
    assert entry.speedup_over_float32 is entry.speedup_over_dynamic_int8 is None
    assert (report.bfloat16, report.no_bfloat16) == (None, "")  # none was wanted


@pytest.mark.skipif(benchmarking.available_processors() < 2, reason="needs two processors")
def test_each_number_of_threads_is_a_case_with_each_batch(made):
    report = vitcompress.benchmark(
        [made.dynamic], threads=(1, 2), batches=(2, 1), rounds=1, references=False
    )

    cases = [(entry.threads, entry.batch) for entry in report.entries]
    assert cases == [(1, 2), (1, 1), (2, 2), (2, 1)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threads": ()}, "threads: expected at least one whole number"),
        ({"threads": (1, 0)}, "threads: expected whole numbers of at least 1, got 0"),
        ({"threads": (100_000,)}, "threads: expected at most .* processors .* got 100000"),
        ({"batches": (-1,)}, "batch: expected whole numbers of at least 1, got -1"),
        ({"rounds": 0}, "repeats: expected whole numbers of at least 1, got 0"),
        ({"runtime": "tvm"}, r"runtime: expected one of \['ort', 'openvino'\], got 'tvm'"),
        ({"paths": ()}, "paths: name at least one"),
    ],
)
def test_settings_out_of_bounds_are_refused_before_any_work(made, settings, words):
    with pytest.raises(ConfigError, match=words):
        vitcompress.benchmark(**{"paths": [made.artefact], **settings})


def test_openvino_runs_the_same_files_and_tells_integer_kernels(made, tmp_path):
    openvino = pytest.importorskip("openvino")
    save_integer_linear(tmp_path / "symmetric.onnx", zero_point=0)
    save_integer_linear(tmp_path / "shifted.onnx", zero_point=3)

    report = vitcompress.benchmark(
        [made.float32, tmp_path / "symmetric.onnx", tmp_path / "shifted.onnx"],
        runtime="openvino",
        rounds=2,
        references=False,
        batches=(1, 2),
    )

    for _, batch, (float32, symmetric, shifted) in report.cases():
        assert batch == float32.batch
        assert float32.versions["openvino"] in openvino.__version__
        assert (float32.integer_products, float32.float_products) == (0, LINEARS + 1)
        assert symmetric.integer_ops == {"FullyConnected i8": 1}
        # Weights with zero points are stored in 8 bits and multiplied as floats.
        assert (shifted.integer_products, shifted.float_products) == (0, 1)


@pytest.mark.parametrize("native", [True, False])
def test_the_float32_network_is_a_reference_in_bfloat16_too(made, monkeypatch, native):
    """Where the runtime and the processor have it, and where one of them does not."""
    original = benchmarking.time_files
    asked = []

    def timed(files, shape, *, bfloat16, **settings):
        asked.append(list(bfloat16))
        left_out = {} if native else dict.fromkeys(bfloat16, "no bfloat16 here")
        run = {name: path for name, path in files.items() if name not in left_out}
        return replace(original(run, shape, **settings), left_out=left_out)

    monkeypatch.setattr(benchmarking, "time_files", timed)

    report = vitcompress.benchmark([made.float32], rounds=2, batches=(1, 2))

    name = f"bfloat16 of {made.float32}"
    roles = ["float32", "bfloat16", "dynamic_int8"] if native else ["float32", "dynamic_int8"]
    for _, _, entries in report.cases():
        assert [entry.role for entry in entries] == roles
        assert all((e.speedup_over_bfloat16 is not None) == native for e in entries)
    assert (report.bfloat16, report.no_bfloat16) == (
        (name, "") if native else (None, "no bfloat16 here")
    )
    assert asked == ([[name]] * 2 if native else [[name], []])
    if native:
        float32, half = report.entries[:2]
        assert (half.name, half.file, half.sha256) == (name, float32.file, float32.sha256)
        assert float32.speedup_over_bfloat16 == speedup(half.wall_ms, float32.wall_ms)


def save_integer_linear(path, zero_point):
    """Write one quantized linear on a flattened image, weights around a zero point."""
    stored = {
        "s": np.float32(0.02),
        "z": np.uint8(128),
        "w": np.random.default_rng(0).integers(-90, 90, (64, 3 * 32 * 32), np.int8),
        "ws": np.full(64, 0.01, np.float32),
        "wz": np.full(64, zero_point, np.int8),
    }
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("QuantizeLinear", ["flat", "s", "z"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["weight"], axis=0),
        helper.make_node("Gemm", ["x", "weight"], ["logits"], transB=1),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("images", kind, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", kind, ["batch", 64])],
        [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in stored.items()],
    )
    opset = helper.make_opsetid("", 21)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
