"""What all sources promise: the same batches every time, laziness, digests, copies."""

import dataclasses

import pytest
import torch
from PIL import Image

from calib import Preprocessing, SourceError, TensorSource, open_source
from calib import decoding as decoding_module

SMALL = Preprocessing(size=(8, 8))


@pytest.fixture
def folder(tmp_path):
    for number in range(8):
        Image.new("RGB", (12, 10), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def decoded(monkeypatch):
    """Return a list that grows by one entry per decoded image."""
    calls = []
    original = decoding_module.decode_image

    def counting(content):
        calls.append(len(content))
        return original(content)

    monkeypatch.setattr(decoding_module, "decode_image", counting)
    return calls


@pytest.mark.parametrize("samples", [None, 5])
def test_iterating_twice_gives_the_same_bits(folder, samples):
    source = open_source(folder, samples=samples, batch_size=3, preprocessing=SMALL)

    first, second = list(source), list(source)

    assert [batch.ids for batch in first] == [batch.ids for batch in second]
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left.images, right.images)


def test_seed_decides_the_choice(folder):
    first, again, other = (open_source(folder, samples=4, seed=seed) for seed in (1, 1, 2))

    assert first.sample_ids == again.sample_ids
    assert first.sample_ids != other.sample_ids


def test_smaller_choice_is_a_prefix_of_a_larger_one(folder):
    few, more = (open_source(folder, samples=count).sample_ids for count in (3, 6))

    assert more[:3] == few


def test_opening_decodes_nothing_and_batches_come_one_by_one(folder, decoded):
    source = open_source(folder, batch_size=2, preprocessing=SMALL)
    assert decoded == []

    iterator = iter(source)
    next(iterator)

    assert len(decoded) == 2


def test_iterating_everything_decodes_once(folder, decoded):
    source = open_source(folder, preprocessing=SMALL)

    for _ in source:
        pass

    assert len(source) == 8
    assert len(source.sample_ids) == 8
    assert len(decoded) == 8


def test_truth_value_decodes_nothing(folder, decoded):
    assert open_source(folder)
    assert decoded == []


def test_description_of_everything_decodes_nothing(folder, decoded):
    assert open_source(folder).describe() == "8 of 8 images, plain folder"
    assert decoded == []


def test_interleaved_iterators_agree(folder):
    (folder / "3.png").write_bytes(b"")
    source = open_source(folder, batch_size=1, preprocessing=SMALL)
    twin = source.with_batch_size(2)

    ids = ([], [])
    for single, double in zip(source, twin, strict=False):
        ids[0].extend(single.ids)
        ids[1].extend(double.ids)

    assert ids[1] == [f"{number}.png" for number in (0, 1, 2, 4, 5, 6, 7)]
    assert ids[0] == ids[1][:4]
    assert len(source) == 7
    assert len(source.skipped) == 1


def test_preprocessing_may_come_later(folder):
    source = open_source(folder, samples=3)
    assert source.preprocessing is None
    assert len(source) == 3

    with pytest.raises(SourceError, match="with_preprocessing"):
        next(iter(source))

    bound = source.with_preprocessing(SMALL)
    assert bound.sample_ids == source.sample_ids
    assert next(iter(bound)).images.shape == (3, 3, 8, 8)
    assert source.preprocessing is None


def test_copies_share_the_choice(folder, decoded):
    source = open_source(folder, samples=3)
    assert len(source) == 3

    assert source.with_batch_size(1).sample_ids == source.sample_ids
    assert len(decoded) == 3


def test_batch_size_of_a_copy(folder):
    source = open_source(folder, batch_size=8, preprocessing=SMALL)

    assert [len(batch.ids) for batch in source.with_batch_size(5)] == [5, 3]
    assert source.batch_size == 8
    with pytest.raises(SourceError, match="batch_size"):
        source.with_batch_size(0)


def test_copy_of_a_tensor_source_is_one():
    assert isinstance(TensorSource(torch.zeros(1, 3, 8, 8)).with_batch_size(1), TensorSource)


def test_more_samples_than_there_are(folder):
    source = open_source(folder, samples=50)

    assert len(source) == 8
    assert source.describe() == "8 of 8 images (50 asked), plain folder, seed 0"


@pytest.mark.parametrize(
    "settings", [{"samples": 0}, {"samples": -1}, {"seed": -1}, {"batch_size": 0}]
)
@pytest.mark.parametrize("spec", ["synthetic", "folder"])
def test_settings_out_of_bounds(folder, spec, settings):
    with pytest.raises(SourceError, match=next(iter(settings))):
        open_source(folder if spec == "folder" else spec, **settings)


def test_digest_is_stable_and_ignores_the_batch_size(folder):
    source = open_source(folder, samples=4, preprocessing=SMALL)

    digest = source.digest()

    assert len(digest) == 64
    assert digest == source.digest() == source.with_batch_size(3).digest()
    assert digest == open_source(folder, samples=4, preprocessing=SMALL).digest()


def test_digest_covers_choice_preprocessing_and_content(folder):
    source = open_source(folder, samples=4, preprocessing=SMALL)
    digests = {
        source.digest(),
        source.with_preprocessing(None).digest(),
        source.with_preprocessing(dataclasses.replace(SMALL, crop_fraction=1.0)).digest(),
        open_source(folder, samples=5, preprocessing=SMALL).digest(),
        open_source(folder, samples=4, seed=1, preprocessing=SMALL).digest(),
    }
    name = source.sample_ids[0]
    Image.new("RGB", (12, 10), (1, 2, 3)).save(folder / name)
    digests.add(open_source(folder, samples=4, preprocessing=SMALL).digest())

    assert len(digests) == 6


def test_digest_ignores_samples_that_were_not_chosen(folder):
    before = open_source(folder, samples=2).digest()
    chosen = open_source(folder, samples=2).sample_ids
    spare = next(name for name in open_source(folder).sample_ids if name not in chosen)

    Image.new("RGB", (12, 10), (1, 2, 3)).save(folder / spare)

    assert open_source(folder, samples=2).digest() == before


def test_digest_of_labels():
    images = torch.zeros(2, 3, 8, 8)
    digests = {
        TensorSource(images).digest(),
        TensorSource(images, torch.tensor([0, 1])).digest(),
        TensorSource(images, torch.tensor([1, 0])).digest(),
    }

    assert len(digests) == 3
