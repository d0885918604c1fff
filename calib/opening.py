"""Find out what kind of source a path names, and open it."""

import difflib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from calib.decoding import IMAGE_SUFFIXES
from calib.errors import SourceError
from calib.folder import files_found, image_folder
from calib.manifest import open_manifest
from calib.sampling import check_settings
from calib.source import Samples, Source
from calib.synthetic import DEFAULT_COUNT, SyntheticImages
from calib.tar import TarImages
from calib.tensors import TensorSource, open_arrays
from calib.transforms import Preprocessing

SYNTHETIC = "synthetic"
ARRAY_SUFFIXES = (".npy", ".npz", ".safetensors")
LOOKED_FOR = (
    "a folder of images, a folder of class folders, a .csv manifest, .npy, .npz or "
    ".safetensors tensors, uncompressed .tar shards, or the word 'synthetic'"
)
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBER_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_EXPANSION = 100_000


def open_source(
    spec: str | Path,
    *,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    preprocessing: Preprocessing | None = None,
) -> Source:
    """Return the images that a path, a pattern or the word ``"synthetic"`` names.

    Args:
        spec: A folder, a ``.csv``, ``.npy``, ``.npz``, ``.safetensors`` or ``.tar`` file, a
            pattern of shards (``shards/*.tar``, ``shard-{000..003}.tar``), or ``"synthetic"``
            (write ``./synthetic`` for a folder of that name).
        samples: How many images to choose, at least 1; None takes all in sorted order. Where
            there are labels the choice is class-balanced. Unreadable images are passed over.
        seed: Seed of the choice, in [0, 2**32).
        batch_size: Images per batch, at least 1.
        preprocessing: How images become model input; None leaves it to be bound later.

    Raises:
        SourceError: Nothing usable is found there, or a setting is out of bounds.
    """
    check_settings(samples, seed, batch_size)
    location = str(spec)
    if not location:
        raise SourceError(f"expected {LOOKED_FOR}, found an empty path")
    try:
        if Path(spec).suffix.lower() in ARRAY_SUFFIXES and Path(spec).is_file():
            images, labels = open_arrays(Path(spec), location)
            return TensorSource(
                images,
                labels,
                samples=samples,
                seed=seed,
                batch_size=batch_size,
                preprocessing=preprocessing,
                location=location,
            )
        if spec == SYNTHETIC:
            storage: Samples = SyntheticImages(samples or DEFAULT_COUNT, seed)
        else:
            storage = _open_images(Path(spec), location)
    except OSError as error:
        raise SourceError(f"{location}: cannot be read: {error}") from error
    return Source(
        storage, samples=samples, seed=seed, batch_size=batch_size, preprocessing=preprocessing
    )


def _open_images(path: Path, location: str) -> Samples:
    if path.is_dir():
        return _open_folder(path, location)
    if path.is_file():
        if path.suffix.lower() == ".csv":
            return open_manifest(path, location)
        if path.suffix.lower() == ".tar":
            return TarImages(location, [path])
        raise SourceError(
            f"{location}: expected {LOOKED_FOR}, found a file ending in {path.suffix!r}"
        )
    if re.search(r"[*?\[{]", location):
        return TarImages(location, _matching_shards(location))
    if not path.exists():
        raise SourceError(f"{location}: expected {LOOKED_FOR}, found nothing{_hint(path)}")
    raise SourceError(f"{location}: expected {LOOKED_FOR}, found a special file")


def _open_folder(folder: Path, location: str) -> Samples:
    images = image_folder(folder, location)
    if images is not None:
        return images
    shards = sorted(path for path in folder.iterdir() if _is_shard(path))
    if shards:
        return TarImages(location, shards)
    raise SourceError(
        f"{location}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in the folder or "
        f"in class folders, or .tar shards, found {files_found(folder)}"
    )


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() == ".tar" and not path.name.startswith(".") and path.is_file()


def _matching_shards(pattern: str) -> list[Path]:
    """Return the tar files that a pattern with braces and wildcards names, sorted.

    Raises:
        SourceError: A name is missing, nothing matches, or a match is no tar file.
    """
    found: set[Path] = set()
    names = list(itertools.islice(expand_braces(pattern), MAX_EXPANSION + 1))
    if len(names) > MAX_EXPANSION:
        raise SourceError(f"{pattern}: expected at most {MAX_EXPANSION} names, found more")
    for name in names:
        path = Path(name)
        try:
            matches = [match for match in _glob(path) if match.exists()]
        except ValueError as error:
            raise SourceError(f"{pattern}: expected a valid pattern: {error}") from error
        wrong = [match for match in matches if not _is_shard(match)]
        if wrong or not matches:
            problem = f"{wrong[0]}, which is none" if wrong else f"no file for {name}"
            raise SourceError(f"{pattern}: expected .tar files, found {problem}")
        found.update(matches)
    if not found:
        raise SourceError(f"{pattern}: expected .tar files, found a pattern without names")
    return sorted(found)


def expand_braces(pattern: str) -> Iterator[str]:
    """Yield the names a pattern stands for: ``{a,b}`` lists, ``{000..003}`` counts up.

    Counting keeps the width of the first number.
    """
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    before, after = pattern[: match.start()], pattern[match.end() :]
    counted = NUMBER_RANGE.fullmatch(match[1])
    if counted is None:
        choices: Iterator[str] = iter(match[1].split(","))
    else:
        first, last = counted.groups()
        numbers = range(int(first), int(last) + 1)
        choices = (str(number).zfill(len(first)) for number in numbers)
    for choice in choices:
        yield from expand_braces(before + choice + after)


def _glob(path: Path) -> Iterator[Path]:
    if re.search(r"[*?\[]", str(path)) is None:
        return iter([path])
    root = Path(path.anchor)
    return root.glob(str(path.relative_to(root) if path.anchor else path))


def _hint(path: Path) -> str:
    """Return a suggestion for a path that does not exist, or nothing."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    names = [entry.name for entry in missing.parent.iterdir()]
    close = difflib.get_close_matches(missing.name, names, n=1)
    if close:
        return f"; did you mean {missing.parent / close[0]}?"
    return f"; {missing.parent} has no entry of a similar name"
