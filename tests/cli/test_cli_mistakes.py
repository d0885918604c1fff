"""What users get wrong: one line with the cure, the right exit code, nothing written."""

import os
import pickle  # noqa: TID251  (makes what must be refused)
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from finished import TINY
from safetensors.torch import load_file, save_file

from vitcompress import api

ARCH = ("--arch", "timm/test_vit")


@pytest.fixture(autouse=True)
def _no_capture(monkeypatch):
    """Mistakes in arguments, files and destinations are found before any work is done."""
    monkeypatch.setattr(api, "capture", lambda *_, **__: pytest.fail("work was done"))


# Widths, recipes and options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bits", 0), "weight bits must be between 2 and 8, got 0"),
        (("--bits", 1), "weight bits must be between 2 and 8, got 1"),
        (("--bits", 9), "weight bits must be between 2 and 8, got 9"),
        (("--bits", -4), "weight bits must be between 2 and 8, got -4"),
        (("--bits", "four"), "Invalid value for '--bits'"),
        (("--bits", "4.5"), "Invalid value for '--bits'"),
        (("--scheme", "W4"), "expected a form like W4A8, got 'W4'"),
        (("--scheme", "W4A99"), "activation bits must be between 2 and 8, got 99"),
        (("--bits", 4, "--scheme", "W4A4"), "give bits or scheme, not both"),
        (("--bits", 4, "--a-bits", 4), "give one of --bits, --scheme, or --w-bits"),
        (("--recipe", "repqvit"), "no recipe 'repqvit'; did you mean 'repq_vit'?"),
        (("--recipe", "nowhere.yaml"), "cannot read the recipe: No such file"),
        (("--set", "passes.2.methd=mse"), "unknown key 'methd'; did you mean 'method'?"),
        (("--set", "sede=1"), "unknown key 'sede'; did you mean 'seed'?"),
        (("--set", "nonsense"), "expected a form like passes.1.method=minmax"),
        (("--mean", "a,b,c"), "--mean: expected numbers like 0.5,0.5,0.5, got 'a,b,c'"),
        (("--crop-fraction", "7"), "crop_fraction"),
        (("--interpolation", "cubist"), "interpolation"),
        (("--image-size", "0"), "image_size: expected a whole number of at least 1"),
        (("--bitz", 4), "No such option"),
    ],
)
def test_wrong_option_is_a_usage_error(refused, arguments, words):
    model = TINY if "--image-size" not in arguments else TINY[:1]

    assert words in refused(2, "quantize", *model, *arguments)


def test_unknown_key_in_a_recipe_file_is_answered_with_the_nearest(vitcompress, tmp_path):
    shown = vitcompress("recipes", "show", "deploy").out
    (tmp_path / "mine.yaml").write_text(shown.replace("granularity:", "granulrity:", 1))

    for arguments in (
        ("recipes", "validate", "mine.yaml"),
        ("quantize", *TINY, "--recipe", "mine.yaml"),
    ):
        found = vitcompress(*arguments)
        assert found.code == 2
        assert "unknown key 'granulrity'; did you mean 'granularity'?" in found.err
        assert "mine.yaml: passes[0]" in found.err


@pytest.mark.parametrize("arguments", [("quantize",), ("frobnicate",), ("export", "out"), ()])
def test_incomplete_command_is_a_usage_error(vitcompress, arguments):
    found = vitcompress(*arguments)

    assert found.code == 2
    assert "Traceback" not in found.err
    assert "Usage" in found.err + found.out


# Model files


def test_missing_model_file_is_answered_with_the_nearest(refused, checkpoint, tmp_path):
    (tmp_path / "vit.pt").touch()

    assert "did you mean vit.pt?" in refused(5, "quantize", "vitt.pt")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.pt", b"", "an empty file (0 bytes)"),
        ("empty.safetensors", b"", "an empty file (0 bytes)"),
        (
            "random.pt",
            bytes(np.random.default_rng(0).integers(1, 256, 4096, np.uint8)),
            "binary",
        ),
        ("notes.pt", b"weights: see attachment", "text starting with"),
        ("cut.pt", b"PK\x03\x04" + bytes(100), "damaged"),
    ],
)
def test_file_of_something_else_is_described(refused, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)

    message = refused(5, "quantize", name, *ARCH)

    assert name in message
    assert words in message


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_truncated_safetensors_are_refused(refused, checkpoint, tmp_path, command):
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:-100])

    assert "cut.safetensors" in refused(5, command, "cut.safetensors", *ARCH)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("command", ["quantize", "inspect", "evaluate"])
@pytest.mark.parametrize("save", [torch.save, lambda bomb, path: _pickle(bomb, path)])
def test_pickle_bomb_does_not_go_off(refused, tmp_path, command, save):
    save({"state_dict": Bomb(tmp_path / "marker")}, tmp_path / "bomb.pt")
    extra = ("--eval", "synthetic") if command == "evaluate" else ()

    message = refused(5, command, "bomb.pt", *extra)

    assert not (tmp_path / "marker").exists()
    assert "bomb.pt" in message


def _pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def changed(checkpoint, path, edit):
    state = load_file(checkpoint)
    edit(state)
    save_file(state, path)
    return path


def test_weights_that_are_not_numbers_are_refused(refused, checkpoint, tmp_path):
    path = changed(
        checkpoint,
        tmp_path / "nan.safetensors",
        lambda state: state["blocks.1.mlp.fc1.weight"].fill_(float("nan")),
    )

    message = refused(5, "quantize", path, *ARCH)

    assert "NaN or infinity in 1 of" in message
    assert "blocks.1.mlp.fc1.weight" in message


def test_wrong_architecture_is_answered_with_the_nearest(refused, checkpoint):
    message = refused(2, "quantize", checkpoint, "--arch", "timm/test_vitt")

    assert "test_vit" in message.replace("test_vitt", "")


def test_factory_that_does_not_exist_is_a_usage_error(refused):
    assert "no such name" in refused(2, "quantize", "tiny:tiny_vot")
    assert "there is no module 'tinny'" in refused(2, "quantize", "tinny:tiny_vit")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda s: s.pop("blocks.0.norm1.weight"), ["missing", "blocks.0.norm1.weight"]),
        (lambda s: s.update(colour=torch.zeros(3)), ["unexpected", "colour"]),
        (lambda s: s.update(cls_token=torch.zeros(1, 1, 3)), ["cls_token", "found [1, 1, 3]"]),
    ],
)
def test_state_dict_that_does_not_fit_is_refused_key_by_key(
    refused, checkpoint, tmp_path, edit, words
):
    path = changed(checkpoint, tmp_path / "odd.safetensors", edit)

    message = refused(5, "quantize", path, *ARCH)

    assert "does not fit timm/test_vit" in message
    for word in words:
        assert word in message


def test_artefact_is_no_float_model(refused, artefact):
    assert "is compressed already" in refused(5, "quantize", artefact)


# Images


def test_folder_without_images_is_refused(refused, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")

    for name in ("none", "text"):
        assert f"{name}: expected images" in refused(5, "quantize", *TINY, "--calib", name)
    assert "found nothing" in refused(5, "quantize", *TINY, "--calib", "nowhere")


def test_folder_of_broken_images_alone_is_refused(refused, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "notes.jpg").write_text("these are not pixels")

    assert "notes.jpg" in refused(5, "quantize", *TINY, "--calib", "broken")


def test_missing_evaluation_images_are_noticed_before_the_work(refused):
    assert "found nothing" in refused(5, "quantize", *TINY, "--eval", "nowhere.csv")


def test_label_outside_the_classes_is_refused(refused, artefact, pictures):
    (pictures / "wrong.csv").write_text("path,label\nimages/000.png,10\n")

    message = refused(5, "evaluate", artefact, "--eval", pictures / "wrong.csv")

    assert "label 10 is no class of this model, which has 10" in message


@pytest.mark.parametrize("kind", ["artefact", "onnx", "inspect"])
def test_images_of_another_size_are_refused(refused, artefact, onnx_file, tmp_path, kind):
    np.save(tmp_path / "wide.npy", np.zeros((2, 3, 32, 64), np.float32))
    command = {
        "artefact": ("evaluate", artefact, "--eval"),
        "onnx": ("evaluate", onnx_file, "--eval"),
        "inspect": ("inspect", artefact, "--calib"),
    }[kind]

    message = refused(5, *command, "wide.npy")

    assert "expected images of" in message
    assert "64" in message


# Destinations


def test_taken_destinations_are_refused_before_the_work(refused, artefact, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("work")
    (tmp_path / "file").write_text("work")

    def quantize(destination, *more):
        return refused(2, "quantize", *TINY, "-o", destination, *more)

    assert "holds an artefact already; pass --overwrite" in quantize(artefact)
    assert "holds files that are no artefact" in quantize("thesis")
    assert "holds files that are no artefact" in quantize("thesis", "--overwrite")
    assert "is a file; name a directory" in quantize("file")
    assert "is not a writable directory" in quantize(Path("file") / "below")
    assert "File name too long" in quantize("x" * 300)


def test_folder_that_may_not_be_written_is_refused(refused, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    assert "is not a writable directory" in refused(2, "quantize", *TINY, "-o", "a/b")


@pytest.mark.parametrize("batch", ["0", "-2", "two"])
def test_export_of_no_batch_is_a_usage_error(refused, artefact, batch):
    message = refused(2, "export", artefact, "-o", "m.onnx", "--batch", batch)

    assert "Invalid value for '--batch'" in message


def test_export_destinations_are_refused(refused, artefact, onnx_file, tmp_path):
    def export(destination):
        return refused(2, "export", artefact, "-o", destination)

    assert "exists already" in export(onnx_file)
    assert "is a directory" in export(tmp_path)
    assert "target: expected one of" in refused(
        2, "export", artefact, "-o", "m.onnx", "--target", "npu"
    )


def test_folder_that_is_no_artefact_is_refused(refused, tmp_path):
    assert "is this an artefact directory?" in refused(5, "export", tmp_path, "-o", "m.onnx")


def test_damaged_artefact_is_refused_by_every_command(refused, artefact, tmp_path):
    shutil.copytree(artefact, tmp_path / "bad")
    (tmp_path / "bad" / "graph.json").write_text("{}")

    for command in (
        ("inspect", "bad"),
        ("evaluate", "bad", "--eval", "synthetic"),
        ("export", "bad", "-o", "m.onnx"),
    ):
        assert "does not match the manifest" in refused(5, *command)


def test_onnx_file_that_is_none_is_refused(refused, tmp_path):
    (tmp_path / "m.onnx").write_text("no protobuf")

    assert "cannot load it" in refused(5, "evaluate", "m.onnx", "--eval", "synthetic")
    assert "file is missing" in refused(5, "evaluate", "n.onnx", "--eval", "synthetic")
