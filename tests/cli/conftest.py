"""The command line as users call it, in this process, and what it works on."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finished import quantized
from PIL import Image
from safetensors.torch import save_file

import calib
from vitcompress import cli, terminal


@pytest.fixture
def vitcompress(monkeypatch, capsys, tmp_path):
    """Run the command line; return its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["vitcompress", *map(str, arguments)])
        code = cli._run()
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run


@pytest.fixture
def refused(vitcompress, tmp_path):
    """Run a command that must fail: one readable line, no traceback, no file left behind."""

    def run(code, *arguments):
        before = sorted(tmp_path.rglob("*"))
        found = vitcompress(*arguments)
        assert found.code == code, found.err
        assert "Traceback" not in found.err
        assert found.err.strip()
        made = [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in p.parts]
        assert made == [p for p in before if "__pycache__" not in p.parts]
        # Boxed usage errors are wrapped; words are what tests look for.
        return " ".join(found.err.replace("│", " ").split())

    return run


def write_images(folder, count, size=48, seed=0):
    """Write PNG files of noise, ``000.png`` and so on."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of eight PNG files, and a labelled manifest of them beside it."""
    root = tmp_path_factory.mktemp("pictures")
    folder = write_images(root / "images", 8)
    lines = [f"images/{path.name},{n % 3}" for n, path in enumerate(sorted(folder.iterdir()))]
    (root / "labels.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A safetensors state dict of timm's ``test_vit`` with random weights and 7 classes."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=7).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def artefact(tmp_path_factory, vit_graph):
    """An artefact of the tiny model, made once; copy it to change it."""
    prepared = calib.Preprocessing(size=(32, 32))
    source = calib.open_source("synthetic", samples=8, preprocessing=prepared)
    path = tmp_path_factory.mktemp("made") / "artefact"
    quantized(vit_graph, source, bits=8, recipe="deploy").save(path)
    return path


@pytest.fixture(scope="session")
def export(artefact, pictures, tmp_path_factory):
    """The export command, run once: exit code, printed text, file and JSON entry."""
    folder = tmp_path_factory.mktemp("exported")
    path, entry = folder / "sub" / "model.onnx", folder / "export.json"
    arguments = ["export", artefact, "--target", "ort-cpu", "-o", path, "--json", entry]
    with pytest.MonkeyPatch.context() as patch, terminal.out.capture() as printed:
        patch.setattr(
            sys,
            "argv",
            ["vitcompress", *map(str, arguments), "--calib", str(pictures / "images")],
        )
        code = cli._run()
    return SimpleNamespace(
        code=code, out=printed.get(), path=path, entry=json.loads(entry.read_text())
    )


@pytest.fixture(scope="session")
def onnx_file(export):
    return export.path
