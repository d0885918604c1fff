"""Manifests: paths, labels, and every way to get them wrong."""

import pytest
import torch
from PIL import Image

from calib import Preprocessing, Skipped, SourceError, open_source

SMALL = Preprocessing(size=(8, 8))


@pytest.fixture
def manifest(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (12, 10), (50 * number, 0, 0)).save(tmp_path / f"images/{number}.png")

    def write(text, encoding="utf-8"):
        path = tmp_path / "list.csv"
        path.write_text(text, encoding=encoding)
        return path

    return write


def test_paths_and_labels(manifest):
    path = manifest("path,label\nimages/2.png,7\n./images/0.png,0\n\nimages/1.png, 3\n")
    source = open_source(path, preprocessing=SMALL)

    (batch,) = source

    assert source.kind == "manifest"
    assert batch.ids == ("images/0.png", "images/1.png", "images/2.png")
    assert batch.labels.tolist() == [0, 3, 7]
    assert batch.labels.dtype == torch.int64


def test_label_column_is_optional_and_others_are_left_alone(manifest):
    source = open_source(manifest("split,path\nval,images/0.png\n"), preprocessing=SMALL)

    assert not source.has_labels
    assert next(iter(source)).labels is None


def test_byte_order_mark_of_a_spreadsheet(manifest):
    path = manifest("path,label\r\nimages/0.png,1\r\n", encoding="utf-8-sig")

    assert open_source(path).sample_ids == ("images/0.png",)


def test_missing_file_is_skipped(manifest):
    source = open_source(manifest("path,label\nimages/0.png,1\nimages/9.png,1\n"))

    assert len(source) == 1
    assert source.skipped == (Skipped("images/9.png", "file not found"),)


def test_choice_is_balanced(manifest):
    text = "path,label\nimages/0.png,0\nimages/1.png,0\nimages/2.png,0\nimages/3.png,5\n"
    source = open_source(manifest(text), samples=2, preprocessing=SMALL)

    (batch,) = source

    assert sorted(batch.labels.tolist()) == [0, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("path,label\n", "at least one row"),
        ("images/0.png,1\n", "expected the header 'path,label'"),
        ("file,label\nimages/0.png,1\n", "found 'file,label'"),
        ("path,path\na,b\n", "path more than once"),
        ("path,label\nimages/0.png,cat\n", r"line 2: label must be .* found 'cat'"),
        ("path,label\nimages/0.png,-1\n", "found '-1'"),
        ("path,label\nimages/0.png,1.0\n", "found '1.0'"),
        ("path,label\nimages/0.png,1_0\n", "found '1_0'"),
        ("path,label\nimages/0.png,\n", "found ''"),
        ("path,label\nimages/0.png\n", "line 2: expected 2 fields, found 1"),
        ("path,label\nimages/0.png,1\nimages/0.png,2\n", "line 3: .* again"),
        ("path,label\n/etc/x.png,1\n", "must be relative"),
        ("path,label\n,1\n", "must be relative"),
        ('path,label\n"images/0.png,1\n', "expected a UTF-8 CSV file"),
    ],
)
def test_malformed_manifest(manifest, text, message):
    with pytest.raises(SourceError, match=message):
        open_source(manifest(text))


def test_other_encoding_is_named(manifest):
    with pytest.raises(SourceError, match="UTF-8"):
        open_source(manifest("path\nbär.png\n", encoding="latin-1"))
