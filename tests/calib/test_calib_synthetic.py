"""Dead leaves: reproducible per image, with the statistics of natural images."""

import numpy as np
import pytest
import torch

from calib import Preprocessing, SourceError, open_source
from calib.synthetic import MAX_RADIUS, MIN_RADIUS, radii, render

SMALL = Preprocessing(size=(32, 48))


def spectrum_slope(image):
    """Return the log-log slope of the radially averaged amplitude spectrum."""
    pixels = np.asarray(image.convert("L"), dtype=np.float64)
    edge = pixels.shape[0]
    # A window, or the jump from one border to the other adds a cross to the spectrum.
    window = np.outer(np.hanning(edge), np.hanning(edge))
    amplitude = np.abs(np.fft.fft2((pixels - pixels.mean()) * window))
    frequency = np.fft.fftfreq(edge) * edge
    ring = np.hypot(frequency[:, None], frequency[None, :]).round().astype(int)
    mean = np.bincount(ring.ravel(), amplitude.ravel()) / np.bincount(ring.ravel())
    used = np.arange(3, edge // 2)
    return np.polyfit(np.log(used), np.log(mean[used]), 1)[0]


def test_default_is_32_images_at_the_size_of_the_preprocessing():
    source = open_source("synthetic", preprocessing=SMALL)

    (batch,) = source

    assert source.kind == "synthetic"
    assert batch.images.shape == (32, 3, 32, 48)
    assert batch.labels is None
    assert len(set(batch.ids)) == 32
    assert source.describe() == "32 of 32 images, dead leaves, seed 0"


@pytest.mark.parametrize("index", range(4))
def test_amplitude_spectrum_falls_like_one_over_f(index):
    assert -1.6 < spectrum_slope(render(index, 0, (224, 224))) < -0.7


def test_image_depends_on_neither_count_nor_batch_size():
    (few,) = open_source("synthetic", samples=3, preprocessing=SMALL)
    many = next(iter(open_source("synthetic", samples=8, batch_size=3, preprocessing=SMALL)))

    assert torch.equal(few.images, many.images)
    assert few.ids == many.ids


def test_seeds_and_images_differ():
    first = render(0, 0, (32, 32)).tobytes()

    assert first == render(0, 0, (32, 32)).tobytes()
    assert first != render(1, 0, (32, 32)).tobytes()
    assert first != render(0, 1, (32, 32)).tobytes()


def test_images_are_normalised_without_resizing():
    (batch,) = open_source("synthetic", samples=1, preprocessing=SMALL)

    assert torch.equal(batch.images[0], SMALL.normalise(render(0, 0, (32, 48))))


def test_images_have_contrast_and_colour():
    pixels = np.asarray(render(0, 0, (128, 128)), dtype=float)

    assert pixels.std() > 20
    assert np.abs(pixels[..., 0] - pixels[..., 2]).mean() > 5


def test_radii_follow_the_inverse_cube():
    drawn = radii(np.random.RandomState(0).random_sample(200_000))

    assert drawn.min() >= MIN_RADIUS
    assert drawn.max() <= MAX_RADIUS
    # The density r^-3 puts 3/4 of the discs below twice the smallest radius.
    assert (drawn < 2 * MIN_RADIUS).mean() == pytest.approx(0.75, abs=0.01)


def test_grey_images():
    preprocessing = Preprocessing(size=(32, 32), mean=(0.5,), std=(0.5,))

    (batch,) = open_source("synthetic", samples=2, preprocessing=preprocessing)

    assert batch.images.shape == (2, 1, 32, 32)


def test_names_and_digest_need_no_preprocessing():
    source = open_source("synthetic", samples=2)

    assert source.sample_ids == ("synthetic[0]", "synthetic[1]")
    assert source.digest() != open_source("synthetic", samples=2, seed=1).digest()
    with pytest.raises(SourceError, match="with_preprocessing"):
        iter(source)
