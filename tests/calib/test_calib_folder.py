"""Folders: plain and with classes, broken files, and what is not an image."""

import os
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image, PngImagePlugin

from calib import Preprocessing, Skipped, SourceError, open_source

SMALL = Preprocessing(size=(8, 8))


def save(path, shade=128, size=(12, 10), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 255 - shade, 7)).save(path, **options)


@pytest.fixture
def plain(tmp_path):
    for number in range(6):
        save(tmp_path / f"{number}.png", 40 * number)
    return tmp_path


@pytest.fixture
def classes(tmp_path):
    for name, count in {"bee": 5, "ant": 3, "cat": 2}.items():
        for number in range(count):
            save(tmp_path / name / "deep" / f"{number}.jpg", 20 * number)
    return tmp_path


def test_plain_folder_in_sorted_order_without_labels(plain):
    source = open_source(plain, preprocessing=SMALL, batch_size=4)

    batches = list(source)

    assert source.kind == "folder"
    assert not source.has_labels
    assert [batch.images.shape for batch in batches] == [(4, 3, 8, 8), (2, 3, 8, 8)]
    assert batches[0].images.dtype == torch.float32
    assert batches[0].labels is None
    assert batches[0].ids + batches[1].ids == tuple(f"{number}.png" for number in range(6))


def test_images_are_preprocessed(plain):
    source = open_source(plain, preprocessing=SMALL)

    with Image.open(plain / "3.png") as image:
        assert torch.equal(next(iter(source)).images[3], SMALL(image))


def test_other_files_are_ignored_silently(plain):
    (plain / "labels.csv").write_text("path,label\n0.png,1\n")
    (plain / "notes.txt").write_text("hello")
    (plain / ".hidden.png").write_bytes(b"")
    (plain / ".cache").mkdir()
    save(plain / ".cache" / "thumb.png")

    source = open_source(plain, preprocessing=SMALL)

    assert len(source) == 6
    assert source.skipped == ()
    assert not source.has_labels


def test_suffix_in_capitals_counts(tmp_path):
    save(tmp_path / "A.JPEG", format="JPEG")

    assert open_source(tmp_path).sample_ids == ("A.JPEG",)


def test_class_folder_labels_follow_sorted_folders(classes):
    (classes / "bat").mkdir()  # empty, still has its index
    (classes / ".git").mkdir()

    batch = next(iter(open_source(classes, preprocessing=SMALL)))

    assert batch.labels.dtype == torch.int64
    expected = {"ant": 0, "bat": 1, "bee": 2, "cat": 3}
    assert batch.labels.tolist() == [expected[name.split("/")[0]] for name in batch.ids]
    assert Counter(batch.labels.tolist()) == {0: 3, 2: 5, 3: 2}


def test_class_folder_choice_is_balanced(classes):
    source = open_source(classes, samples=6, preprocessing=SMALL)

    labels = torch.cat([batch.labels for batch in source]).tolist()

    assert source.kind == "class-folder"
    assert Counter(labels) == {0: 2, 1: 2, 2: 2}
    assert source.describe() == "6 of 10 images, class-folder tree, seed 0, class-balanced"


def test_linked_class_folder_is_followed_and_a_loop_ends(tmp_path):
    save(tmp_path / "elsewhere" / "x.png")
    tree = tmp_path / "tree"
    save(tree / "a" / "y.png")
    (tree / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tree / "a" / "up").symlink_to(tree, target_is_directory=True)

    source = open_source(tree)

    assert source.sample_ids == ("a/y.png", "b/x.png")


def test_mixed_folder_is_refused(classes):
    save(classes / "stray.png")

    with pytest.raises(SourceError, match=r"1 directly and 10 in sub-folders"):
        open_source(classes)


def break_files(folder):
    whole = (folder / "0.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) - 30])
    (folder / "2.png").write_bytes(b"")
    (folder / "3.jpg").write_text("I am text")


def test_broken_files_are_skipped_with_a_reason(plain):
    break_files(plain)

    source = open_source(plain, preprocessing=SMALL)

    assert source.sample_ids == ("0.png", "3.png", "4.png", "5.png")
    reasons = {item.id: item.reason for item in source.skipped}
    assert set(reasons) == {"1.png", "2.png", "3.jpg"}
    assert reasons["2.png"] == "the file is empty"
    assert reasons["3.jpg"] == "not an image of a known format"
    assert "cannot be decoded" in reasons["1.png"]
    assert source.describe() == "4 of 7 images, plain folder, 3 skipped"


def test_choice_continues_past_broken_files(plain):
    order = open_source(plain, samples=6).sample_ids
    (plain / order[1]).write_bytes(b"")

    source = open_source(plain, samples=3)

    assert source.sample_ids == (order[0], order[2], order[3])
    assert source.skipped == (Skipped(order[1], "the file is empty"),)


def test_only_examined_candidates_are_reported(plain):
    order = open_source(plain, samples=6).sample_ids
    (plain / order[5]).write_bytes(b"")

    assert open_source(plain, samples=3).skipped == ()


def test_iterating_first_finds_the_same_as_asking_first(plain):
    break_files(plain)
    asked, iterated = (open_source(plain, preprocessing=SMALL) for _ in range(2))

    ids = tuple(name for batch in iterated for name in batch.ids)

    assert ids == iterated.sample_ids == asked.sample_ids
    assert iterated.skipped == asked.skipped


def test_no_readable_image_is_an_error_with_reasons(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.jpg").write_bytes(b"text")

    with pytest.raises(
        SourceError, match=r"none among 2; 2 skipped, first a.jpg: the file is e"
    ):
        len(open_source(tmp_path))
    with pytest.raises(SourceError, match="none among 2"):
        list(open_source(tmp_path, preprocessing=SMALL))


@pytest.mark.parametrize(
    "limit", [60, 100]
)  # 120 pixels: an error for one, a warning for other
def test_pixel_limit(plain, monkeypatch, limit):
    save(plain / "small.png", size=(5, 5))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit - 1)

    source = open_source(plain, preprocessing=SMALL)

    assert source.sample_ids == ("small.png",)
    assert {item.reason for item in source.skipped} == {"refused: over Pillow's pixel limit"}


def test_strip_that_would_grow_on_resizing_is_refused(plain):
    save(plain / "strip.png", size=(101, 1))

    (skipped,) = open_source(plain).skipped

    assert skipped.id == "strip.png"
    assert "101x1" in skipped.reason


def test_postscript_named_png_is_not_run(plain):
    (plain / "evil.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")

    (skipped,) = open_source(plain).skipped

    assert skipped == Skipped("evil.png", "not an image of a known format")


def test_pipe_is_not_opened(plain):
    os.mkfifo(plain / "pipe.png")

    assert open_source(plain).skipped == (Skipped("pipe.png", "not a regular file"),)


def test_text_chunk_bomb_is_skipped(plain):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("key", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    save(plain / "bomb.png", pnginfo=chunks)

    (skipped,) = open_source(plain).skipped

    assert skipped.id == "bomb.png"


def test_empty_folder_says_what_was_looked_for(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "sub").mkdir()

    with pytest.raises(SourceError, match=r"expected images.*found 1 files \(1 .csv\), 1 sub"):
        open_source(tmp_path)


def test_file_that_vanishes_after_the_choice_is_an_error(plain):
    source = open_source(plain, preprocessing=SMALL)
    assert len(source) == 6
    (plain / "2.png").unlink()

    with pytest.raises(SourceError, match=r"2.png was readable when it was chosen"):
        list(source)
    with pytest.raises(SourceError, match="open the source again"):
        source.digest()


def test_digest_ignores_the_place_but_not_labels(classes, tmp_path):
    copied = tmp_path.parent / f"{tmp_path.name}-copy"
    shutil.copytree(classes, copied)
    before = open_source(classes).digest()

    assert open_source(copied).digest() == before
    (copied / "aardvark").mkdir()  # shifts every label
    assert open_source(copied).digest() != before
