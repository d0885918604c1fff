"""The benchmark command: its table, its JSON, and what users get wrong."""

import importlib.util
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vitcompress import api
from vitcompress.speed import BenchmarkReport

IMAGES = ("batch", 3, 8, 8)


@pytest.fixture
def save(tmp_path):
    """Write an ONNX file of one linear on flattened images, with one thing changed."""

    def save(name, *, shape=IMAGES, kind=TensorProto.FLOAT, op="MatMul", inputs=1):
        weight = np.zeros((192, 4), np.float32)
        nodes = [
            helper.make_node("Flatten", ["x0"], ["flat"]),
            helper.make_node(op, ["flat", "weight"], ["logits"]),
        ]
        taken = [helper.make_tensor_value_info(f"x{i}", kind, shape) for i in range(inputs)]
        given = helper.make_tensor_value_info("logits", kind, None)
        initializers = [numpy_helper.from_array(weight, "weight")]
        graph = helper.make_graph(nodes, "linear", taken, [given], initializers)
        opset = helper.make_opsetid("", 21)
        onnx.save(
            helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / name
        )
        return name

    return save


def test_table_and_json_tell_the_same(vitcompress, save, tmp_path):
    arguments = ("--repeats", 2, "--batch", "1,2", "--json", "sub/speed.json")

    found = vitcompress("benchmark", save("a.onnx"), *arguments)

    assert (found.code, found.err) == (0, "")
    report = BenchmarkReport.from_json((tmp_path / "sub" / "speed.json").read_text())
    assert len(report.entries) == 4
    for words in (
        "1 thread, batch 1, onnxruntime",
        "1 thread, batch 2, onnxruntime",
        "x float32",
        "x dyn. INT8",
        "no bfloat16 row: onnxruntime's CPU provider has no faster run in bfloat16 or float16",
        "dynamic INT8 of a.onnx",
        "0 of 1",
        "1 of 1",
        "medians of 2 rounds in turns",
        "Ratios hold for this machine:",
        report.processor,
        f"onnxruntime {report.entries[0].versions['onnxruntime']}",
    ):
        assert words in found.out
    for entry in report.entries:
        assert f"{entry.images_per_second:.1f}" in found.out


def test_without_references_there_is_a_line_in_place_of_ratios(vitcompress, save):
    found = vitcompress("benchmark", save("a.onnx"), "--repeats", 1, "--no-references")

    assert found.code == 0
    assert "x float32" not in found.out
    assert "no ratios: no float32 reference was measured" in found.out
    assert "bfloat16" not in found.out


def test_openvino_has_a_row_in_bfloat16_or_the_reason(vitcompress, save, tmp_path):
    pytest.importorskip("openvino")
    arguments = ("--runtime", "openvino", "--repeats", 2, "--json", "speed.json")

    found = vitcompress("benchmark", save("a.onnx"), *arguments)

    assert (found.code, found.err) == (0, "")
    report = BenchmarkReport.from_json((tmp_path / "speed.json").read_text())
    shown = ("bfloat16 of", "x bf16") if report.bfloat16 else ("no bfloat16 row: ",)
    assert bool(report.bfloat16) == (not report.no_bfloat16)
    assert all(words in found.out for words in shown)
    assert ("bfloat16" in {entry.role for entry in report.entries}) == bool(report.bfloat16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--threads", "0"), "threads: expected whole numbers of at least 1, got 0"),
        (("--threads", "1,two"), "--threads: expected whole numbers like 1,2, got '1,two'"),
        (("--threads", ""), "--threads: expected whole numbers like 1,2, got ''"),
        (("--batch", "1,-8"), "batch: expected whole numbers of at least 1, got -8"),
        (("--batch", "1.5"), "--batch: expected whole numbers like 1,2, got '1.5'"),
        (("--repeats", 0), "repeats: expected whole numbers of at least 1, got 0"),
        (("--repeats", "many"), "Invalid value for '--repeats'"),
        (("--runtime", "tvm"), "runtime: expected one of ['ort', 'openvino'], got 'tvm'"),
        (("--json", "."), "is a directory; name a file in it"),
        (("--json", "a.onnx/b.json"), "cannot be written"),
        (("./a.onnx",), "a.onnx: is named twice"),
    ],
)
def test_wrong_setting_is_told_before_any_work(refused, save, monkeypatch, arguments, words):
    monkeypatch.setattr(api, "load", lambda *_: pytest.fail("work was done"))

    assert words in refused(2, "benchmark", save("a.onnx"), *arguments)


def test_runtime_that_is_not_installed_is_told_with_the_cure(refused, save, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "openvino" else find_spec(name, *rest),
    )

    words = refused(2, "benchmark", save("a.onnx"), "--runtime", "openvino")

    assert "openvino is not installed; pip install 'vitcompress[openvino]'" in words


def test_files_of_different_networks_are_not_compared(refused, save):
    save("a.onnx")
    save("b.onnx", shape=("batch", 3, 4, 16))
    save("c.onnx", shape=(1, 3, 8, 8))

    sizes = refused(2, "benchmark", "a.onnx", "b.onnx")
    batches = refused(2, "benchmark", "a.onnx", "c.onnx", "--batch", "1,8", "--no-references")

    assert "b.onnx: takes images of 3x4x16, a.onnx of 3x8x8" in sizes
    assert "c.onnx: takes batches of 1 only; batch 8 was asked for" in batches


def test_missing_and_damaged_paths_are_input_errors(refused, artefact, save, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.onnx").write_text("these are no operators")
    (tmp_path / "nothing.onnx").write_bytes(b"")
    shutil.copytree(artefact, tmp_path / "damaged")
    (tmp_path / "damaged" / "manifest.json").write_text("{")

    for path, words in (
        ("absent.onnx", "absent.onnx: file is missing"),
        ("empty", "empty: is a directory but no artefact"),
        ("text.onnx", "text.onnx: is not an ONNX file, or is damaged"),
        ("nothing.onnx", "nothing.onnx: is not an ONNX file, or is damaged"),
        ("damaged", "manifest.json"),
    ):
        assert words in refused(5, "benchmark", path)


def test_external_data_are_part_of_a_file(vitcompress, refused, save, tmp_path):
    model = onnx.load(tmp_path / save("inner.onnx"))
    onnx.save(
        model,
        tmp_path / "outer.onnx",
        save_as_external_data=True,
        location="outer.bin",
        size_threshold=0,
    )
    arguments = ("--repeats", 1, "--no-references", "--json", "speed.json")

    assert vitcompress("benchmark", "outer.onnx", *arguments).code == 0
    report = BenchmarkReport.from_json((tmp_path / "speed.json").read_text())
    assert report.entries[0].size_bytes > 4 * 192 * 4
    (tmp_path / "outer.bin").unlink()
    assert "external data 'outer.bin' are missing" in refused(5, "benchmark", "outer.onnx")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"inputs": 2}, "a.onnx: expected one image input, found x0, x1"),
        ({"shape": ("batch", 192)}, "expected float32 images [B, C, H, W]"),
        ({"shape": ("batch", 3, "height", 8)}, "'x0' of FLOAT [batch, 3, height, 8]"),
        ({"kind": TensorProto.INT64}, "'x0' of INT64 [batch, 3, 8, 8]"),
        ({"op": "Unheard"}, "a.onnx: ort cannot run it: "),
        ({"shape": ("batch", 3, 8, 9)}, "a.onnx: ort cannot run it: "),
    ],
)
def test_file_that_does_not_run_is_refused(refused, save, changed, words):
    assert words in refused(
        4, "benchmark", save("a.onnx", **changed), "--no-references", "--repeats", 1
    )
