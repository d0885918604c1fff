"""Which path opens as what, and what the message says when it does not."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

import calib
from calib import SourceError, open_source
from calib.opening import expand_braces


def test_public_names():
    assert calib.__all__ == [
        "Batch",
        "Preprocessing",
        "Skipped",
        "Source",
        "SourceError",
        "TensorSource",
        "open_source",
    ]


def test_package_stands_alone():
    code = "import sys, calib; print([n for n in sys.modules if n.startswith('vitcompress')])"

    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert run.stdout.strip() == "[]"


def test_missing_path_suggests_a_sibling(tmp_path):
    (tmp_path / "images").mkdir()

    with pytest.raises(SourceError, match=r"found nothing; did you mean .*images\?"):
        open_source(tmp_path / "imagse")
    with pytest.raises(SourceError, match=r"did you mean .*images\?"):
        open_source(tmp_path / "imges" / "val")


def test_missing_path_without_a_similar_sibling(tmp_path):
    with pytest.raises(SourceError, match="no entry of a similar name"):
        open_source(tmp_path / "zzz")


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.jpg", "plain"])
def test_other_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")

    with pytest.raises(SourceError, match=r"expected a folder of images.*found a file ending"):
        open_source(tmp_path / name)


def test_empty_path_is_not_the_current_folder():
    with pytest.raises(SourceError, match="empty path"):
        open_source("")


def test_folder_named_synthetic_is_opened_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "synthetic").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "synthetic" / "a.png")

    assert open_source("./synthetic").kind == "folder"
    assert open_source("synthetic").kind == "synthetic"


def test_folder_with_brackets_in_its_name(tmp_path):
    folder = tmp_path / "set [1] {a,b}"
    folder.mkdir()
    Image.new("RGB", (9, 9)).save(folder / "a.png")

    assert open_source(str(folder)).kind == "folder"


def test_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("calib.folder.os.scandir", refuse)

    with pytest.raises(SourceError, match=r"cannot be read.*Permission denied"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a", ["a"]),
        ("{a,b}c", ["ac", "bc"]),
        ("s-{08..11}", ["s-08", "s-09", "s-10", "s-11"]),
        ("{0..1}{x,y}", ["0x", "0y", "1x", "1y"]),
    ],
)
def test_braces(pattern, names):
    assert list(expand_braces(pattern)) == names


def test_batches_hold_no_gradient(tmp_path):
    source = calib.TensorSource(torch.zeros(1, 3, 8, 8, requires_grad=True))

    assert not next(iter(source)).images.requires_grad
