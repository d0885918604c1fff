"""What goes wrong while a command works: one readable line, nothing half written."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from finished import TINY

from vitcompress import api
from vitcompress.errors import ExportError


@pytest.fixture
def captured(monkeypatch, vit_graph):
    monkeypatch.setattr(api, "capture", lambda *_, **__: vit_graph)


@pytest.fixture
def earlier(artefact, captured, tmp_path):
    """An artefact that is there before the command fails."""
    shutil.copytree(artefact, tmp_path / "out")
    return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


SETTINGS = ("--samples", 4, "--bits", 2, "--recipe", "deploy", "-o", "out", "--overwrite")
QUANTIZE = ("quantize", *TINY, *SETTINGS)


def test_full_disk_keeps_the_earlier_artefact(refused, earlier, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)

    message = refused(2, *QUANTIZE)

    assert "out: cannot be written: No space left on device; nothing was changed" in message
    monkeypatch.undo()
    assert earlier == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("place", ["measure_activations", "run_recipe", "write_artifact"])
def test_interrupt_leaves_nothing_and_keeps_the_earlier_artefact(
    refused, earlier, monkeypatch, tmp_path, place
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, place, interrupt)

    assert refused(130, *QUANTIZE) == "error: interrupted; nothing was written"
    assert earlier == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_defect_of_ours_says_so_and_shows_where(vitcompress, captured, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(api, "measure_activations", broken)

    found = vitcompress(*QUANTIZE)

    assert found.code == 1
    assert "internal error (ZeroDivisionError); please report it" in found.err
    assert "Traceback" in found.err
    assert list(tmp_path.iterdir()) == []


def test_failed_verification_exits_with_4(refused, artefact, monkeypatch):
    def wrong(graph, path, images, **settings):
        path.write_text("half")
        raise ExportError("m.onnx: outputs differ from the model's")

    monkeypatch.setattr(api, "write_onnx", wrong)

    assert "outputs differ" in refused(4, "export", artefact, "-o", "m.onnx")


def test_sites_that_cannot_be_exported_are_listed(refused, captured, vitcompress):
    quantized = vitcompress(
        *("quantize", *TINY, "--samples", 4, "--recipe", "repq_vit_paper", "-o", "paper")
    )
    assert quantized.code == 0, quantized.err

    message = refused(4, "export", "paper", "-o", "m.onnx")

    assert "blocks.0.attn:probs: not strictly 4 bits" in message


BRANCHING = """
import torch

class Branching(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(192, 4)

    def forward(self, images):
        if images.sum() > 0:
            images = -images
        return self.fc(images.flatten(1))
"""


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_branch_on_values_is_an_unsupported_model(refused, monkeypatch, tmp_path, command):
    (tmp_path / f"branching_{command}.py").write_text(BRANCHING)

    message = refused(4, command, f"branching_{command}:Branching", "--image-size", "8")

    # The exporter's own dump of the graph stays off the terminal.
    assert message.startswith(f"error: branching_{command}:Branching: torch.export cannot")
    assert f"branching_{command}.py:10" in message
    assert "replace branches on tensor values" in message


SPECTRAL = """
import torch

class Spectral(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(192, 4)

    def forward(self, images):
        waves = torch.fft.rfft2(images)
        return self.fc(torch.fft.irfft2(0.5 * waves, s=(8, 8)).flatten(1))
"""
EXTENDED = """
import torch

@torch.library.custom_op("{name}::halved", mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5

halved.register_fake(torch.empty_like)

class Extended(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(192, 4)

    def forward(self, images):
        return self.fc(halved(images).flatten(1))
"""


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_complex_numbers_are_an_unsupported_model(refused, monkeypatch, tmp_path, command):
    name = f"spectral_{command}"
    (tmp_path / f"{name}.py").write_text(SPECTRAL)

    message = refused(4, command, f"{name}:Spectral", "--image-size", "8")

    assert f"error: {name}:Spectral: cannot be compressed: the model: aten.fft" in message
    assert f"{name}.py:10: it yields complex numbers" in message
    assert "write the spectral filter as a convolution" in message


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_an_extension_is_an_unsupported_model(refused, monkeypatch, tmp_path, command):
    name = f"extended_{command}"
    (tmp_path / f"{name}.py").write_text(EXTENDED.format(name=name))

    message = refused(4, command, f"{name}:Extended", "--image-size", "8")

    assert f"error: {name}:Extended: cannot be compressed: the model: {name}.halved" in message
    assert f"{name}.py:16: an operator of the extension '{name}'" in message
    assert "switch the model to its implementation in plain PyTorch operators" in message


@pytest.mark.parametrize("command", ["quantize", "inspect"])
def test_a_library_that_lacks_an_extension_is_an_unsupported_model(
    refused, monkeypatch, command
):
    timm = pytest.importorskip("timm")

    def create_model(*_, **__):
        raise ImportError("Failed to import NATTEN's CPP backend.")

    monkeypatch.setattr(timm, "create_model", create_model)

    message = refused(4, command, "timm/test_vit")

    assert "timm/test_vit: cannot be built here: Failed to import NATTEN's CPP" in message
    assert "Choose a model written in plain PyTorch operators" in message
