"""Dead-leaves images: what to calibrate on where there are no images.

Source: Lee, Mumford, Huang, "Occlusion models for natural images", IJCV 41, 2001: discs that
occlude each other, with radius density proportional to r^-3, share the scale invariance of
natural images; their amplitude spectrum falls roughly like 1/f.
Deviation: radii are bounded (an unbounded law has no image), and discs are shaded and
textured, since flat ones leave a network's early features without anything to respond to.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from calib.source import Samples
from calib.transforms import Preprocessing

DEFAULT_COUNT = 32
DEFAULT_SIZE = (256, 256)

# Enough discs to cover about 95 % of the picture; a backdrop shows through the rest.
DISCS = 3000
# Radii as shares of the shorter edge.
MIN_RADIUS = 0.012
MAX_RADIUS = 0.4

# Sky, haze, foliage, moss, earth, sand, stone, dusk: sRGB, neighbours blend into each other.
PALETTE = np.array(
    [
        (135, 170, 205),
        (200, 205, 205),
        (95, 125, 65),
        (55, 75, 45),
        (110, 85, 60),
        (205, 180, 140),
        (140, 138, 132),
        (60, 62, 80),
    ],
    dtype=np.float64,
)
PALETTE_SPREAD = 4.0
BRIGHTNESS = (0.45, 1.3)
SHADING = 0.25
TEXTURE = 0.5
TEXTURE_CELLS = (4, 8, 16, 32, 64)


def radii(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return radii with density proportional to r^-3 between the bounds, by inversion.

    Args:
        uniform: Draws from [0, 1).

    Returns:
        Same shape, shares of the shorter edge.
    """
    ratio = (MIN_RADIUS / MAX_RADIUS) ** 2
    inverse: NDArray[np.float64] = np.sqrt(1.0 - uniform * (1.0 - ratio))
    return MIN_RADIUS / inverse


def render(index: int, seed: int, size: tuple[int, int]) -> Image.Image:
    """Return one dead-leaves image, RGB.

    Args:
        index: Which image; it does not depend on how many are rendered.
        seed: Seed of the whole set, in [0, 2**32).
        size: Height and width in pixels; the same scene at every size.
    """
    height, width = size
    # RandomState is frozen by NumPy's policy: the same images across releases.
    random = np.random.RandomState([seed, index])
    unit = float(min(height, width))
    radius = radii(random.random_sample(DISCS)) * unit
    # Centres may lie outside: the border is covered like the middle.
    row, column = (
        (random.random_sample(DISCS) * (edge / unit + 2 * MAX_RADIUS) - MAX_RADIUS) * unit
        for edge in (height, width)
    )
    # The first disc is the backdrop.
    row[0], column[0], radius[0] = height / 2, width / 2, height + width
    owner = _topmost_disc(row, column, radius, size)

    tilt = random.random_sample((2, DISCS)) * 2.0 - 1.0
    down = (np.arange(height)[:, None] + 0.5 - row[owner]) / radius[owner]
    right = (np.arange(width)[None, :] + 0.5 - column[owner]) / radius[owner]
    shade = 1.0 + SHADING * (tilt[0][owner] * down + tilt[1][owner] * right)
    roughness = TEXTURE * random.random_sample(DISCS)
    shade += roughness[owner] * _smooth_noise(random, size)
    pixels = _colours(random)[owner] * shade[:, :, None]
    return Image.fromarray((pixels.clip(0.0, 255.0) + 0.5).clip(0, 255).astype(np.uint8))


def _topmost_disc(
    row: NDArray[np.float64],
    column: NDArray[np.float64],
    radius: NDArray[np.float64],
    size: tuple[int, int],
) -> NDArray[np.int64]:
    """Return, for every pixel, the last disc that covers it."""
    height, width = size
    owner = np.zeros(size, dtype=np.int64)
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    top = np.clip(row - radius, 0, height).astype(int)
    bottom = np.clip(row + radius + 1, 0, height).astype(int)
    left = np.clip(column - radius, 0, width).astype(int)
    right = np.clip(column + radius + 1, 0, width).astype(int)
    for disc in range(1, len(radius)):
        window = slice(top[disc], bottom[disc]), slice(left[disc], right[disc])
        down = (rows[window[0]] - row[disc]) ** 2
        across = (columns[window[1]] - column[disc]) ** 2
        inside = down[:, None] + across[None, :] <= radius[disc] ** 2
        np.copyto(owner[window], disc, where=inside)
    return owner


def _colours(random: np.random.RandomState) -> NDArray[np.float64]:
    """Return one colour per disc, ``[DISCS, 3]``, from a stretch of the palette."""
    start = random.random_sample() * len(PALETTE)
    place = start + PALETTE_SPREAD * random.random_sample(DISCS)
    lower = place.astype(int)
    blend = (place - lower)[:, None]
    colour: NDArray[np.float64] = (1.0 - blend) * PALETTE[lower % len(PALETTE)]
    colour += blend * PALETTE[(lower + 1) % len(PALETTE)]
    low, high = BRIGHTNESS
    colour *= low + (high - low) * random.random_sample((DISCS, 1))
    return colour


def _smooth_noise(random: np.random.RandomState, size: tuple[int, int]) -> NDArray[np.float64]:
    """Return value noise in [-1, 1], ``[H, W]``: each octave half as strong as the last."""
    total = np.zeros(size)
    strength = 0.5
    for cells in TEXTURE_CELLS:
        grid = random.random_sample((cells + 1, cells + 1)) * 2.0 - 1.0
        total += strength * _stretch(_stretch(grid, size[0]).T, size[1]).T
        strength /= 2.0
    return total


def _stretch(grid: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Return the rows of a grid interpolated linearly to ``length`` rows."""
    place = np.arange(length) * ((grid.shape[0] - 1) / length)
    lower = place.astype(int)
    blend = (place - lower)[:, None]
    stretched: NDArray[np.float64] = (1.0 - blend) * grid[lower] + blend * grid[lower + 1]
    return stretched


class SyntheticImages(Samples):
    """Dead-leaves images, rendered at the size the preprocessing asks for when read.

    Args:
        count: How many.
        seed: Seed of the set.
    """

    kind = "synthetic"
    noun = "dead leaves"
    location = "synthetic"
    permuted = False

    def __init__(self, count: int, seed: int) -> None:
        self._seed = seed
        self.ids = [f"synthetic[{index}]" for index in range(count)]

    def tensor(self, number: int, preprocessing: Preprocessing | None) -> Tensor:
        assert preprocessing is not None  # Source.__iter__ has checked it
        return preprocessing.normalise(render(number, self._seed, preprocessing.size))

    def verify(self, number: int) -> None:
        """Nothing can be wrong with an image that is made on demand."""

    def content(self, number: int, preprocessing: Preprocessing | None) -> bytes:
        size = DEFAULT_SIZE if preprocessing is None else preprocessing.size
        return render(number, self._seed, size).tobytes()
