"""Arrays in memory and in files: layouts, labels, and what is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from calib import Preprocessing, Skipped, SourceError, TensorSource, open_source

SMALL = Preprocessing(size=(8, 8), crop_fraction=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)


def floats(count=6):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def pixels(count=6):
    return np.random.RandomState(0).randint(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def write(folder, kind, arrays):
    path = folder / f"set.{kind}"
    if kind == "npy":
        np.save(path, arrays["images"])
    elif kind == "npz":
        np.savez_compressed(path, **arrays)
    else:
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        save_file(tensors, path)
    return path


def test_tensors_in_memory():
    images, labels = floats(), torch.arange(6, dtype=torch.int32)
    source = TensorSource(images, labels, batch_size=4)

    first, second = source

    assert source.kind == "tensors"
    assert torch.equal(torch.cat([first.images, second.images]), images)
    assert second.labels.tolist() == [4, 5]
    assert second.labels.dtype == torch.int64
    assert first.ids == ("array[0]", "array[1]", "array[2]", "array[3]")


def test_order_is_numeric_beyond_ten():
    assert TensorSource(floats(12)).sample_ids[9:] == ("array[9]", "array[10]", "array[11]")


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_float_files_are_model_input(tmp_path, kind):
    images = floats()
    path = write(tmp_path, kind, {"images": images.numpy()})
    source = open_source(path, preprocessing=SMALL)

    (batch,) = source

    assert source.kind == "tensors"
    assert source.preprocessing is None
    assert torch.equal(batch.images, images)
    assert source.digest() == TensorSource(images).digest()


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_byte_files_are_images(tmp_path, kind, layout):
    images = pixels()
    stored = images if layout == "NHWC" else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    source = open_source(write(tmp_path, kind, {"images": stored}), preprocessing=SMALL)

    (batch,) = source

    expected = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(batch.images, expected)


def test_grey_bytes_of_rank_three():
    grey = torch.from_numpy(pixels()[..., 0].copy())
    source = TensorSource(grey, preprocessing=SMALL)

    (batch,) = source

    assert torch.equal(batch.images[:, 1], grey.float() / 255)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_labels_and_balanced_choice(tmp_path, kind):
    arrays = {"images": floats().numpy(), "labels": np.array([0, 0, 0, 0, 0, 1])}
    source = open_source(write(tmp_path, kind, arrays), samples=2)

    (batch,) = source

    assert sorted(batch.labels.tolist()) == [0, 1]


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_only_array_may_have_any_name(tmp_path, kind):
    arrays = {"pixel_values": floats(2).numpy(), "labels": np.array([4, 5])}

    source = open_source(write(tmp_path, kind, arrays))

    assert source.has_labels
    assert len(source) == 2


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_ambiguous_keys(tmp_path, kind):
    arrays = {"a": floats(2).numpy(), "b": floats(2).numpy()}

    with pytest.raises(SourceError, match=r"expected an array 'images'.*found a, b"):
        open_source(write(tmp_path, kind, arrays))


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4"])
def test_other_floats_become_float32(tmp_path, dtype):
    images = floats().numpy().astype(dtype)
    np.save(tmp_path / "a.npy", images)

    (batch,) = open_source(tmp_path / "a.npy")

    assert batch.images.dtype == torch.float32
    np.testing.assert_array_equal(batch.images.numpy(), images.astype(np.float32))


def test_bfloat16_in_safetensors(tmp_path):
    images = floats().to(torch.bfloat16)
    save_file({"images": images}, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")

    (batch,) = source

    assert torch.equal(batch.images, images.float())
    assert source.digest() == TensorSource(images).digest() != TensorSource(floats()).digest()


def test_samples_that_are_not_finite_are_skipped():
    images = floats()
    images[1, 0, 0, 0] = float("nan")
    images[4, 0, 0, :2] = float("inf")

    source = TensorSource(images)

    assert source.skipped == (
        Skipped("array[1]", "1 of 192 values are NaN or infinite"),
        Skipped("array[4]", "2 of 192 values are NaN or infinite"),
    )
    assert sum(len(batch.ids) for batch in source) == len(source) == 4


def test_values_beyond_float32_are_skipped():
    images = floats().double()
    images[0, 0, 0, 0] = 1e300

    assert len(TensorSource(images)) == 5


class Payload:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_object_arrays_are_refused_without_unpickling(tmp_path, kind):
    array = np.array([Payload()], dtype=object)
    path = write(tmp_path, kind, {"images": array})

    with pytest.raises(SourceError, match="unpickled"):
        open_source(path)


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 20, b"\x80\x04K\x01."])
def test_damaged_files(tmp_path, kind, content):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content)

    with pytest.raises(SourceError, match="expected plain numeric arrays"):
        open_source(path)


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_cut_off_files(tmp_path, kind):
    path = write(tmp_path, kind, {"images": floats().numpy()})
    path.write_bytes(path.read_bytes()[:-500])

    with pytest.raises(SourceError, match="expected plain numeric arrays"):
        open_source(path)


def test_single_array_named_npz(tmp_path):
    write(tmp_path, "npy", {"images": floats().numpy()}).rename(tmp_path / "set.npz")

    with pytest.raises(SourceError, match="found a single array"):
        open_source(tmp_path / "set.npz")


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(2, 1, 3, 8, 8),
        torch.zeros(0, 3, 8, 8),
        torch.zeros(8, dtype=torch.uint8),
        torch.zeros(2, 8, 8, 5, dtype=torch.uint8),
        torch.zeros(2, 3, 8, 8, dtype=torch.int64),
        torch.zeros(2, 3, 8, 8, dtype=torch.bool),
    ],
)
def test_wrong_shape_or_type(images):
    with pytest.raises(SourceError, match="images must be"):
        TensorSource(images)


@pytest.mark.parametrize("dtype", ["complex64", "U3", "uint16"])
def test_wrong_array_type_in_a_file(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 8, 8)).astype(dtype))

    with pytest.raises(SourceError, match="uint8 or floating"):
        open_source(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"shape \[6\], found \[5\]"),
        (torch.zeros(6, 1, dtype=torch.int64), r"found \[6, 1\]"),
        (torch.zeros(6), "must be integers"),
        (torch.zeros(6, dtype=torch.bool), "must be integers"),
        (torch.tensor([0, 1, 2, 3, 4, -1]), "found -1"),
    ],
)
def test_wrong_labels(labels, message):
    with pytest.raises(SourceError, match=message):
        TensorSource(floats(), labels)


def test_float_labels_in_npz(tmp_path):
    path = write(tmp_path, "npz", {"images": floats().numpy(), "labels": np.zeros(6)})

    with pytest.raises(SourceError, match="must be integers"):
        open_source(path)


def test_npy_is_read_through_a_map(tmp_path):
    path = tmp_path / "large.npy"
    # 1.2 GB on paper, sparse on disk.
    array = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float32, shape=(2_000, 3, 224, 224)
    )
    array[0] = 1.0
    del array

    batch = next(iter(open_source(path, batch_size=2)))

    assert batch.images.sum() == 3 * 224 * 224
