"""WebDataset shards: keys, labels, patterns, damage; nothing is unpacked."""

import io
import tarfile

import pytest
from PIL import Image

from calib import Preprocessing, SourceError, open_source

SMALL = Preprocessing(size=(8, 8))


def image_bytes(shade, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def labelled(first, count):
    members = {}
    for number in range(first, first + count):
        members[f"{number:04d}.jpg"] = image_bytes(10 * number, "JPEG")
        members[f"{number:04d}.cls"] = str(number % 3).encode() + b"\n"
        members[f"{number:04d}.json"] = b"{}"
    return members


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        write_shard(tmp_path / f"shard-{shard:03d}.tar", labelled(4 * shard, 4))
    return tmp_path


def test_one_shard(shards):
    source = open_source(shards / "shard-001.tar", preprocessing=SMALL)

    (batch,) = source

    assert source.kind == "tar"
    assert batch.ids == tuple(f"shard-001.tar!{number:04d}" for number in range(4, 8))
    assert batch.labels.tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("", 12),
        ("*.tar", 12),
        ("shard-00[12].tar", 8),
        ("shard-{000..002}.tar", 12),
        ("shard-00{0,2}.tar", 8),
        ("{shard,shard}-{001..002}.tar", 8),
    ],
)
def test_patterns(shards, pattern, count):
    assert len(open_source(str(shards / pattern))) == count


def test_relative_pattern(shards, monkeypatch):
    monkeypatch.chdir(shards.parent)

    source = open_source(f"{shards.name}/shard-*.tar")
    monkeypatch.chdir("/")

    assert len(source) == 12
    assert source.sample_ids[0] == "shard-000.tar!0000"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("shard-{000..003}.tar", r"no file for .*shard-003.tar"),
        ("other-*.tar", "no file for"),
        ("*", "which is none"),
        ("shard-{3..1}.tar", "without names"),
        ("shard-{0..999999999}.tar", "at most 100000"),
    ],
)
def test_pattern_without_shards(shards, pattern, message):
    (shards / "notes.txt").write_text("x")

    with pytest.raises(SourceError, match=message):
        open_source(str(shards / pattern))


def test_pixels_come_from_the_right_member(shards):
    source = open_source(shards, samples=5, seed=4, preprocessing=SMALL, batch_size=1)

    for batch in source:
        shard, key = batch.ids[0].split("!")
        with tarfile.open(shards / shard) as archive:
            content = archive.extractfile(f"{key}.jpg").read()
        with Image.open(io.BytesIO(content)) as image:
            assert (batch.images[0] == SMALL(image)).all()


def test_choice_is_balanced_across_shards(shards):
    source = open_source(shards, samples=6, preprocessing=SMALL)

    (batch,) = source

    assert sorted(batch.labels.tolist()) == [0, 0, 1, 1, 2, 2]


def test_key_ends_at_the_first_dot_and_keeps_its_folder(tmp_path):
    write_shard(
        tmp_path / "a.tar",
        {
            "./v1.0/x.png": image_bytes(1),
            "v1.0/x.seg.png": image_bytes(2),
            "y.WEBP": image_bytes(3, "WEBP"),
        },
    )

    source = open_source(tmp_path / "a.tar")

    assert source.sample_ids == ("a.tar!v1.0/x", "a.tar!y")
    assert not source.has_labels


def test_escaping_names_write_nothing(tmp_path):
    write_shard(tmp_path / "a.tar", {"../evil.png": image_bytes(1)})

    batches = list(open_source(tmp_path / "a.tar", preprocessing=SMALL))

    assert batches[0].ids == ("a.tar!../evil",)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_links_and_second_images_are_skipped(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("x.png", "x.jpg"):
            content = image_bytes(1)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("y.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)

    source = open_source(tmp_path / "a.tar")

    assert source.sample_ids == ("a.tar!x",)
    assert [item.reason for item in source.skipped] == [
        "second image of the key: x.jpg",
        "refused: a link or special member",
    ]


def test_broken_members_are_skipped(tmp_path):
    write_shard(tmp_path / "a.tar", {"a.png": b"", "b.jpg": b"text", "c.png": image_bytes(1)})

    source = open_source(tmp_path / "a.tar")

    assert source.sample_ids == ("a.tar!c",)
    assert [item.id for item in source.skipped] == ["a.tar!a", "a.tar!b"]


@pytest.mark.parametrize("label", [b"cat", b"-1", b"", b"\xff", b"9" * 100])
def test_malformed_label(tmp_path, label):
    write_shard(tmp_path / "a.tar", {"a.png": image_bytes(1), "a.cls": label})

    with pytest.raises(SourceError, match=r"a\.tar!a\.cls: label must be"):
        open_source(tmp_path / "a.tar")


def test_labels_for_some_only(tmp_path):
    write_shard(
        tmp_path / "a.tar", {"a.png": image_bytes(1), "a.cls": b"1", "b.png": image_bytes(2)}
    )

    with pytest.raises(SourceError, match=r"found 1 for 2 samples; a\.tar!b has none"):
        open_source(tmp_path / "a.tar")


def test_shard_without_images(tmp_path):
    write_shard(tmp_path / "a.tar", {"a.txt": b"x"})

    with pytest.raises(SourceError, match="found none in 1"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("size_bytes", "message"),
    [(700, "complete tar file"), (2000, "damaged or cut-off header")],
)
def test_cut_off_shard(shards, size_bytes, message):
    path = shards / "shard-000.tar"
    path.write_bytes(path.read_bytes()[:size_bytes])

    with pytest.raises(SourceError, match=message):
        open_source(path)


def test_damaged_header_is_not_taken_for_the_end(shards):
    path = shards / "shard-000.tar"
    with tarfile.open(path) as archive:
        start = archive.getmember("0002.jpg").offset
    content = bytearray(path.read_bytes())
    content[start : start + 100] = b"\x07" * 100
    path.write_bytes(content)

    with pytest.raises(SourceError, match=f"header at byte {start}"):
        open_source(path)


@pytest.mark.parametrize("content", [b"", b"not a tar file" * 100, b"\x1f\x8b" + b"\0" * 600])
def test_file_that_is_no_tar(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)

    with pytest.raises(SourceError, match="expected an uncompressed, complete tar file"):
        open_source(tmp_path / "a.tar")
