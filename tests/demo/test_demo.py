import numpy as np
import pytest
import torch

from vitcompress.demo import DATA_PATH, WEIGHTS_PATH, load_digits, load_model, split_indices


@pytest.fixture(scope="module")
def model():
    return load_model()


def test_weights_stay_small_enough_to_ship():
    assert WEIGHTS_PATH.stat().st_size <= 3_000_000


def test_model_has_between_half_a_million_and_a_million_parameters(model):
    parameters = list(model.parameters())

    assert 500_000 < sum(p.numel() for p in parameters) < 1_000_000
    assert {p.dtype for p in parameters} == {torch.float32}
    assert not model.training


def test_parameters_are_named_as_in_timm(model):
    timm = pytest.importorskip("timm")
    theirs = timm.models.VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=96,
        depth=6,
        num_heads=3,
    )

    theirs.load_state_dict(model.state_dict())

    images = load_digits("test")[0][:8]
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(images), model(images), atol=1e-4, rtol=1e-4)


def test_data_file_opens_without_pickle_and_holds_the_source_values():
    with np.load(DATA_PATH, allow_pickle=False) as data:
        images, labels = data["images"], data["labels"]

    assert DATA_PATH.stat().st_size < 200_000
    assert (images.shape, images.dtype) == ((1797, 8, 8), np.uint8)
    assert (labels.shape, labels.dtype) == ((1797,), np.uint8)
    assert (images.min(), images.max()) == (0, 16)
    # Class counts of the source file.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_splits_are_disjoint_and_cover_the_data():
    train, test = split_indices("train").tolist(), split_indices("test").tolist()

    assert (len(train), len(test)) == (1197, 600)
    assert sorted(train + test) == list(range(1797))


def test_no_image_is_in_both_splits():
    train, test = ({i.numpy().tobytes() for i in load_digits(s)[0]} for s in ("train", "test"))

    assert not train & test


@pytest.mark.parametrize(("split", "size"), [("train", 1197), ("test", 600)])
def test_images_are_normalised_and_labels_are_classes(split, size):
    images, labels = load_digits(split)

    assert (images.shape, images.dtype) == ((size, 1, 8, 8), torch.float32)
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    assert (labels.shape, labels.dtype) == ((size,), torch.int64)
    assert labels.unique().tolist() == list(range(10))


def test_held_out_accuracy_is_at_least_97_percent(model):
    images, labels = load_digits("test")

    with torch.inference_mode():
        predicted = model(images).argmax(dim=1)

    assert (predicted == labels).float().mean().item() >= 0.97
