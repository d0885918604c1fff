"""The demo as users call it: one width of the three, and what it leaves in its folder."""

import sys
from types import SimpleNamespace

import onnx
import pytest
from onnx_files import assert_codes_agree, written_graph

import vitcompress
from calib.tensors import TensorSource
from vitcompress import cli, terminal
from vitcompress.demo import load_digits, load_model, run
from vitcompress.errors import ExportError
from vitcompress.evaluate import evaluate, onnx_predictor
from vitcompress.export.onnx import ExportResult, Verification
from vitcompress.export.onnx.leftovers import FileSize
from vitcompress.recipe import Scheme, load_recipe


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Return the folder and the printed text; W4A4 is the hardest of the three widths."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ROWS", ("W4A4",))
        patch.setattr(sys, "argv", ["vitcompress", "demo", "-o", str(folder)])
        patch.setenv("COLUMNS", "160")
        with terminal.out.capture() as printed:
            code = cli._run()
    return code, folder, printed.get()


@pytest.fixture(scope="module")
def model(demo):
    _, folder, _ = demo
    return vitcompress.load(folder / "w4a4")


@pytest.fixture(scope="module")
def held_out():
    return TensorSource(*load_digits("test"), batch_size=200)


def test_all_three_widths_are_shown():
    assert run.ROWS == ("W8A8", "W4A8", "W4A4")


def test_demo_ends_well_and_prints_its_table(demo):
    code, folder, text = demo

    assert code == 0
    for words in (
        "embedded digits model",
        "float",
        "fast_narrow",
        # Patches, head, and six in each of six blocks; what leaves GELU has a logarithm.
        "32 of 38",
        f"files in {folder}",
    ):
        assert words in text


def test_artefact_and_file_are_kept(demo):
    _, folder, _ = demo

    assert sorted(path.name for path in folder.iterdir()) == ["w4a4", "w4a4.onnx"]
    onnx.checker.check_model(str(folder / "w4a4.onnx"))
    weights = (folder / "w4a4" / "weights.safetensors").stat().st_size
    assert weights < 0.25 * 4 * sum(p.numel() for p in load_model().parameters())


def test_quantized_digits_are_still_read(model, held_out):
    entry = evaluate(model, held_out, reference=load_model())

    assert entry.images == 600
    assert entry.top1_percent >= 97.0
    assert entry.agreement_percent >= 97.0


def test_runtime_reads_the_digits_that_torch_reads(demo, model, held_out):
    _, folder, _ = demo
    predict = onnx_predictor(folder / "w4a4.onnx")

    entry = evaluate(predict, held_out, reference=model, execution="executed")

    assert entry.agreement_percent >= 99.0
    assert entry.mean_kl < 1e-2


def test_codes_of_real_images_are_those_of_torch(demo, model):
    _, folder, _ = demo

    graph = written_graph(model, "ort-cpu")
    assert_codes_agree(folder / "w4a4.onnx", graph, load_digits("test")[0][:64])


@pytest.fixture
def float_head(model, monkeypatch):
    """A demo of one row whose export says that the head runs as a float product."""

    def run_row(scheme, output):
        monkeypatch.setattr(run, "ROWS", (scheme,))
        recipe = load_recipe("deploy", scheme=Scheme.parse(scheme))
        monkeypatch.setattr(model, "recipe", recipe)
        run.run_demo(terminal.out, output)

    result = fake_result()
    figures = SimpleNamespace(top1_percent=100.0, agreement_percent=100.0)
    monkeypatch.setattr(run, "quantize", lambda *_, **__: model)
    monkeypatch.setattr(type(model), "export_onnx", lambda *_, **__: result)
    monkeypatch.setattr(run, "onnx_predictor", lambda path: model)
    monkeypatch.setattr(run, "evaluate", lambda *_, **__: figures)
    return run_row


@pytest.mark.parametrize("scheme", ["W8A8", pytest.param("W4A8", marks=pytest.mark.slow)])
def test_float_linear_of_eight_bits_makes_the_demo_fail(float_head, tmp_path, scheme):
    """What the table says of integer products is checked, not decoration."""
    with pytest.raises(ExportError, match=r"float linears: \{'head': 'runs as Gemm'\}"):
        float_head(scheme, tmp_path)


def test_float_linear_of_narrow_activations_is_shown_alone(float_head, tmp_path, capsys):
    float_head("W4A4", tmp_path)

    assert "24 of 25" in capsys.readouterr().out


def fake_result():
    verification = Verification(
        code_mismatch=0.0,
        in_step_cosine=1.0,
        runtime="none",
        images=1,
        cosine=1.0,
        top1_agreement_percent=100.0,
        max_difference=0.0,
        integer_linears=24,
        linears=25,
        float_linears={"head": "runs as Gemm"},
        integer_ops={},
    )
    size = FileSize(packed_bytes=1, parameter_bytes=0, leftover_bytes=0, largest_leftovers={})
    return ExportResult(
        target="ort-cpu",
        opset=23,
        size_bytes=1,
        verification=verification,
        not_executed="",
        size=size,
        leftovers="float32",
        leftover_cosine=1.0,
    )


def test_folder_with_something_else_in_it_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "w8a8").mkdir()
    (tmp_path / "w8a8" / "thesis.txt").write_text("work")
    monkeypatch.setattr(run, "quantize", lambda *_, **__: pytest.fail("work was done"))
    monkeypatch.setattr(sys, "argv", ["vitcompress", "demo", "-o", str(tmp_path)])

    code = cli._run()

    assert code == 2
    assert "holds files that are no artefact" in capsys.readouterr().err
