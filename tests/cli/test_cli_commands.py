"""Commands that succeed: what they write and what they say."""

import json

import pytest
import torch
import yaml
from finished import TINY
from onnx_files import SEPARATE
from safetensors.torch import load_file
from tiny import images

import vitcompress as library
from vitcompress import api
from vitcompress.evaluate import onnx_predictor


def test_checkpoint_is_quantized_on_a_folder_and_evaluated(
    vitcompress, checkpoint, pictures, tmp_path
):
    found = vitcompress(
        *("quantize", checkpoint, "--arch", "timm/test_vit", "--scheme", "W4A4"),
        *("--recipe", "repq_vit", "--calib", pictures / "images", "--samples", 4),
        *("--eval", pictures / "labels.csv", "--eval-samples", 6, "-o", tmp_path / "out"),
    )

    assert (found.code, found.err) == (0, "")
    model = library.load(tmp_path / "out")
    assert model.report.model == "timm/test_vit"
    assert model.report.recipe == "repq_vit-w4a4"
    assert model.preprocessing.size == (160, 160)
    assert model(images(1, 160)).shape == (1, 7)
    assert len(model.report.protocol.sample_ids) == 4
    assert model.report.protocol.command.startswith(
        f"vitcompress quantize {checkpoint} --arch"
    )
    calibration, evaluation = model.report.evaluations
    assert (calibration.labelled, evaluation.labelled) == (False, True)
    assert (evaluation.images, evaluation.execution) == (6, "simulated")
    assert evaluation.reference_top1_percent is not None
    for words in (
        "state dict vit.safetensors as timm/test_vit",
        "preprocessing: resize 168 bicubic, centre crop 160x160, mean 0.5 0.5 0.5",
        "scheme: W4A4, recipe repq_vit",
        "calibration: 4 of 8 images, plain folder, seed 0",
        "simulated",
        "top-1",
        "agrees with float on",
        "noisiest activation sites",
        f"saved to {tmp_path / 'out'}",
        "next: vitcompress export",
    ):
        assert words in found.out


def test_factory_is_quantized_with_nothing_but_bits(vitcompress, tmp_path):
    found = vitcompress("quantize", *TINY, "--bits", 4, "--samples", 4)

    assert (found.code, found.err) == (0, "")
    assert library.load(tmp_path / "tiny-w4a8").recipe.label == "fast-w4a8"
    assert "scheme: W4A8, recipe fast" in found.out
    assert "no --calib: calibrating on rendered images (synthetic)" in found.out
    assert "saved to tiny-w4a8" in found.out


@pytest.fixture
def captured(monkeypatch, vit_graph):
    """Spare a test the capture of the tiny model."""
    monkeypatch.setattr(api, "capture", lambda *_, **__: vit_graph)


@pytest.mark.parametrize(
    ("widths", "label"),
    [
        (("--w-bits", 4, "--a-bits", 6), "fast_narrow-w4a6"),
        pytest.param(("--w-bits", 3), "fast-w3a8", marks=pytest.mark.slow),
        (("--a-bits", 4), "fast_narrow-w8a4"),
        ((), "fast-w8a8"),
    ],
)
def test_widths_can_be_given_apart(vitcompress, captured, tmp_path, widths, label):
    found = vitcompress("quantize", *TINY, *widths, "--samples", 4, "-o", "out")

    assert found.code == 0, found.err
    assert library.load(tmp_path / "out").recipe.label == label


def test_settings_and_preprocessing_can_be_overridden(vitcompress, captured, tmp_path):
    found = vitcompress(
        *("quantize", *TINY, "--samples", 4, "-o", "out", "--set", "passes.2.method=minmax"),
        *("--set", "seed=7", "--mean", "0.1,0.2,0.3", "--std", "0.5,0.5,0.5"),
        *("--interpolation", "bilinear", "--crop-fraction", 1.0, "--seed", 3),
    )

    assert found.code == 0, found.err
    model = library.load(tmp_path / "out")
    assert model.preprocessing.mean == (0.1, 0.2, 0.3)
    assert model.preprocessing.interpolation == "bilinear"
    assert model.report.protocol.seed == 7
    assert model.recipe.to_dict()["passes"][2]["method"] == "minmax"
    assert "bilinear" in found.out
    assert "seed 3" in found.out


def test_text_file_named_like_an_image_is_skipped_and_named(
    vitcompress, captured, pictures, tmp_path
):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((pictures / "images").iterdir())[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "notes.jpg").write_text("these are not pixels")

    found = vitcompress(
        "quantize", *TINY, "--recipe", "deploy", "--calib", folder, "-o", "out"
    )

    assert found.code == 0, found.err
    assert "1 calibration files skipped: notes.jpg" in found.out
    assert "notes.jpg" not in library.load(tmp_path / "out").report.protocol.sample_ids


def test_earlier_artefact_is_replaced_on_request(vitcompress, captured, tmp_path):
    first = vitcompress("quantize", *TINY, "--samples", 4, "-o", "out")
    second = vitcompress(
        "quantize", *TINY, "--samples", 4, "-o", "out", "--bits", 2, "--overwrite"
    )

    assert (first.code, second.code) == (0, 0)
    assert library.load(tmp_path / "out").recipe.label == "fast-w2a8"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_moves_when_the_output_is_no_terminal(vitcompress, captured):
    found = vitcompress("quantize", *TINY, "--samples", 4, "-o", "out")

    assert found.err == ""
    assert not any(mark in found.out for mark in ("\r", "\x1b", "it/s", "calibrating:"))


# evaluate


def test_artefact_file_and_float_model_are_evaluated_alike(
    vitcompress, artefact, onnx_file, pictures, tmp_path
):
    labels = pictures / "labels.csv"
    results = {}
    for name, arguments in {
        "simulated": (artefact,),
        "executed": (onnx_file, "--reference", artefact),
        "float": TINY,
    }.items():
        found = vitcompress("evaluate", *arguments, "--eval", labels, "--json", f"{name}.json")
        assert (found.code, found.err) == (0, "")
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert f"{name}: top-1" in found.out
        assert "preprocessing: resize 36 bicubic, centre crop 32x32" in found.out

    for name, result in results.items():
        assert result["execution"] == name
        assert (result["images"], result["labelled"]) == (8, True)
    assert results["executed"]["agreement_percent"] >= 75.0
    assert results["float"]["agreement_percent"] is None


def test_images_without_labels_are_announced(vitcompress, artefact, pictures):
    found = vitcompress(
        *("evaluate", artefact, "--eval", pictures / "images", "--eval-samples", 4),
        *("--reference", artefact),
    )

    assert found.code == 0, found.err
    assert "these images have no labels: no accuracy" in found.out
    assert "agrees with reference on 100.00 %" in found.out


def test_preprocessing_of_an_artefact_can_be_overridden(vitcompress, artefact, pictures):
    found = vitcompress(
        *("evaluate", artefact, "--eval", pictures / "labels.csv"),
        *("--crop-fraction", 1.0, "--interpolation", "nearest"),
    )

    assert found.code == 0, found.err
    assert "resize 32 nearest" in found.out


# inspect


def test_sites_of_a_model_are_listed(vitcompress):
    found = vitcompress("inspect", *TINY)

    assert found.code == 0, found.err
    for words in (
        "sites of tiny:tiny_vit",
        "blocks.0.attn:probs",
        "norm_output",
        "28 sites: 1 patch_input, 10 weight",
        "2 attention cores, 2 blocks",
        "5 of 5 norms fold into linears",
        "every site has a recognised role",
    ):
        assert words in found.out


def test_ranges_are_shown_on_images(vitcompress, artefact, pictures):
    found = vitcompress("inspect", artefact, "--calib", pictures / "images", "--samples", 2)

    assert found.code == 0, found.err
    for words in ("sites of tiny", "u8 per_channel", "peak / rms", "SQNR dB", "passes"):
        assert words in found.out


def test_unrecognised_sites_are_named(vitcompress, tmp_path):
    (tmp_path / "odd_nets.py").write_text(ODD)

    found = vitcompress("inspect", "odd_nets:Odd", "--image-size", "8")

    assert found.code == 0, found.err
    assert "sites have no recognised role" in found.out
    assert "second:input" in found.out


ODD = """
import torch

class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(192, 16)
        self.second = torch.nn.Linear(16, 16)
        self.third = torch.nn.Linear(16, 4)

    def forward(self, images):
        x = self.first(images.flatten(1))
        return self.third(self.second(x.sin()).cos())
"""


# export


def test_export_prints_what_the_runtime_did(export):
    entry = export.entry

    assert export.code == 0
    assert (entry["execution"], entry["integer_linears"], entry["linears"]) == (
        "executed",
        len(SEPARATE),
        len(SEPARATE),
    )
    # In the last block q, proj, fc1 and fc2 are of the class token alone.
    assert entry["rewrites"] == {
        "linear_patches": 1,
        "simplify_moves": 3,
        "separate_projections": 2,
        "keep_needed_rows": 4,
    }
    assert entry["images"] == 8
    assert export.path.stat().st_size == entry["size_bytes"]
    printed = " ".join(export.out.split())
    for words in (
        "executed in onnxruntime",
        "integer linears 14 of 14",
        "attention: 2 of 2 cores fused",
        "rewritten: linear_patches 1, separate_projections 2, keep_needed_rows 4",
        f"wrote {export.path}",
    ):
        assert words in printed


def test_export_of_one_batch_takes_that_alone(vitcompress, artefact, tmp_path):
    found = vitcompress("export", artefact, "-o", tmp_path / "m.onnx", "--batch", 2)

    assert found.code == 0
    predict = onnx_predictor(tmp_path / "m.onnx")
    assert predict(images(2)).shape == (2, 10)
    with pytest.raises(library.InputError, match="expected images of"):
        predict(images(3))


# recipes


def test_recipes_are_listed(vitcompress):
    found = vitcompress("recipes", "list")

    assert found.code == 0
    for words in ("deploy", "repq_vit", "repq_vit_paper", "attach > calibrate >", "W4A4"):
        assert words in found.out


def test_shown_recipe_is_complete_and_valid(vitcompress, tmp_path):
    found = vitcompress("recipes", "show", "repq_vit", "--scheme", "W3A3")
    (tmp_path / "mine.yaml").write_text(found.out)
    again = vitcompress("recipes", "validate", "mine.yaml")

    content = yaml.safe_load(found.out)
    assert found.code == 0
    assert content["scheme"] == "W3A3"
    assert content["passes"][0]["rules"][0]["bits"] == 3
    assert (again.code, again.err) == (0, "")
    assert "mine.yaml: valid; repq_vit-w3a3, 5 passes" in again.out


def test_recipe_file_is_used(vitcompress, captured, tmp_path):
    shown = vitcompress("recipes", "show", "deploy")
    (tmp_path / "mine.yaml").write_text(shown.out.replace("name: deploy", "name: mine"))

    found = vitcompress(
        "quantize", *TINY, "--recipe", "mine.yaml", "--samples", 4, "-o", "out"
    )

    assert found.code == 0, found.err
    assert "recipe mine" in found.out
    assert library.load(tmp_path / "out").recipe.name == "mine"


def test_help_lists_the_commands(vitcompress):
    found = vitcompress("--help")

    assert found.code == 0
    for command in (
        "quantize",
        "inspect",
        "evaluate",
        "export",
        "benchmark",
        "demo",
        "recipes",
    ):
        assert command in found.out


def test_torch_files_with_an_architecture_need_no_flag(
    vitcompress, captured, tmp_path, checkpoint
):
    torch.save({"arch": "test_vit", "state_dict": load_file(checkpoint)}, tmp_path / "m.pt")

    found = vitcompress("inspect", "m.pt")

    assert found.code == 0, found.err
    assert "named in the checkpoint" in found.out
