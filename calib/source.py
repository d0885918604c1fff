"""A fixed choice of samples, iterated in batches: what every kind of image source becomes."""

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from calib.errors import SourceError, UnreadableError
from calib.sampling import Choice, candidate_order, check_settings
from calib.transforms import Preprocessing

REASONS_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples, ready for the model.

    Attributes:
        images: ``[B, C, H, W]``, float32, preprocessed.
        labels: ``[B]``, int64, or None where the source has no labels.
        ids: One stable name per sample: a relative path, ``array[12]`` or ``shard.tar!key``.
    """

    images: Tensor
    labels: Tensor | None
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out.

    Attributes:
        id: Its name.
        reason: Why it could not be read.
    """

    id: str
    reason: str


class Samples(ABC):
    """Where samples lie: random access by number. One subclass per kind of storage.

    Attributes:
        kind: The name shown as ``Source.kind``.
        noun: The same for a sentence.
        location: What error messages call the source.
        ids: Names, in the source's own order.
        labels: Class of each sample, or None.
        unusable: Samples known to be unusable before any is read.
        preprocessed: Whether samples are model input already and take no preprocessing.
        permuted: Whether a seed decides which samples are chosen.
    """

    kind: ClassVar[str]
    noun: ClassVar[str]
    location: str
    ids: Sequence[str]
    labels: Sequence[int] | None = None
    unusable: Sequence[Skipped] = ()
    preprocessed: bool = False
    permuted: bool = True

    @abstractmethod
    def tensor(self, number: int, preprocessing: Preprocessing | None) -> Tensor:
        """Return one sample as model input, ``[C, H, W]``, float32.

        Args:
            number: Position in ``ids``.
            preprocessing: Never None unless ``preprocessed``.

        Raises:
            UnreadableError: The sample is broken, whatever the preprocessing.
        """

    @abstractmethod
    def verify(self, number: int) -> None:
        """Read one sample and drop it.

        Raises:
            UnreadableError: ``tensor`` would fail.
        """

    @abstractmethod
    def content(self, number: int, preprocessing: Preprocessing | None) -> bytes:
        """Return the bytes that identify the content of one sample.

        Raises:
            UnreadableError: They cannot be read.
        """


class Source:
    """A reproducible choice of images; iterating gives the same batches every time.

    Nothing is decoded before it is needed: iterating finds out which samples are readable as
    it goes; ``len``, ``sample_ids`` and ``skipped`` decode what has not been looked at yet
    (and so does ``list(source)``, since Python asks for the length first; ``for`` does not).
    Only names are held, never images. EXIF orientation is ignored, as evaluation protocols do.

    Attributes:
        kind: ``folder``, ``class-folder``, ``manifest``, ``tensors``, ``tar``, ``synthetic``.
        seed: Seed of the choice.
        batch_size: Samples per batch; the last batch may be smaller.
        preprocessing: Applied to every image; None where it is bound later, or not needed.

    Raises:
        SourceError: ``samples``, ``seed`` or ``batch_size`` is out of bounds.
    """

    def __init__(
        self,
        storage: Samples,
        *,
        samples: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        check_settings(samples, seed, batch_size)
        self._storage = storage
        self._asked = samples
        self.kind = storage.kind
        self.seed = seed
        self.batch_size = batch_size
        self.preprocessing = None if storage.preprocessed else preprocessing
        ordered = samples if storage.permuted else None
        order = candidate_order(len(storage.ids), storage.labels, ordered, seed)
        self._choice = Choice(order, samples)

    def __iter__(self) -> Iterator[Batch]:
        if self.preprocessing is None and not self._storage.preprocessed:
            raise SourceError(
                f"{self._storage.location}: expected a preprocessing before images are read, "
                "found none; pass preprocessing= or call with_preprocessing()"
            )
        return self._batches()

    def __bool__(self) -> bool:
        # Without this, `if source:` would ask __len__ and decode everything.
        return True

    def __len__(self) -> int:
        return len(self._resolved().accepted)

    @property
    def has_labels(self) -> bool:
        """Whether batches carry labels."""
        return self._storage.labels is not None

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Names of the chosen samples, in the order of iteration."""
        return tuple(self._storage.ids[number] for number in self._resolved().accepted)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Samples that came up for choice and could not be read."""
        return tuple(self._all_skipped(self._resolved()))

    def digest(self) -> str:
        """Return a SHA-256 over what the model will see.

        Covers kind, names, labels, content (file or array bytes) and preprocessing; neither
        the batch size nor the place on disk enters.
        """
        storage, total = self._storage, hashlib.sha256()
        header: dict[str, object] = {"kind": self.kind, "count": len(self)}
        if self.preprocessing is not None:
            header["preprocessing"] = self.preprocessing.to_dict()
        total.update(json.dumps(header, sort_keys=True).encode() + b"\n")
        for number in self._resolved().accepted:
            try:
                content = storage.content(number, self.preprocessing)
            except UnreadableError as error:
                raise self._changed(number, error) from error
            label = None if storage.labels is None else storage.labels[number]
            line = [storage.ids[number], label, hashlib.sha256(content).hexdigest()]
            # json.dumps escapes to ASCII, so names that are no valid UTF-8 are covered too.
            total.update(json.dumps(line).encode() + b"\n")
        return total.hexdigest()

    def with_preprocessing(self, preprocessing: Preprocessing | None) -> Self:
        """Return a copy with the same choice and another preprocessing."""
        twin = copy.copy(self)
        twin.preprocessing = None if self._storage.preprocessed else preprocessing
        return twin

    def with_batch_size(self, batch_size: int) -> Self:
        """Return a copy with the same choice and another batch size.

        Raises:
            SourceError: ``batch_size`` is below 1.
        """
        check_settings(self._asked, self.seed, batch_size)
        twin = copy.copy(self)
        twin.batch_size = batch_size
        return twin

    def describe(self) -> str:
        """Return one line, e.g. ``32 of 1000 images, manifest, seed 0, class-balanced``.

        Decodes the chosen samples where ``samples`` was given; a source of everything is
        described without looking through all of it.
        """
        choice = self._choice if self._asked is None else self._resolved()
        complete = choice.pending() is None
        count = len(choice.accepted) if complete else choice.wanted
        parts = [f"{count} of {len(self._storage.ids)} images"]
        if self._asked is not None and self._asked > count:
            parts[0] += f" ({self._asked} asked)"
        parts.append(self._storage.noun)
        if self._asked is not None or not self._storage.permuted:
            parts.append(f"seed {self.seed}")
        if self._asked is not None and self.has_labels:
            parts.append("class-balanced")
        skipped = len(list(self._all_skipped(choice)))
        if skipped:
            parts.append(f"{skipped} skipped")
        return ", ".join(parts)

    def _batches(self) -> Iterator[Batch]:
        numbers: list[int] = []
        images: list[Tensor] = []
        for number, image in self._chosen():
            numbers.append(number)
            images.append(image)
            if len(numbers) == self.batch_size:
                yield self._batch(numbers, images)
                numbers, images = [], []
        if numbers:
            yield self._batch(numbers, images)

    def _batch(self, numbers: list[int], images: list[Tensor]) -> Batch:
        storage = self._storage
        labels = None
        if storage.labels is not None:
            chosen = [storage.labels[number] for number in numbers]
            labels = torch.tensor(chosen, dtype=torch.int64)
        ids = tuple(storage.ids[number] for number in numbers)
        return Batch(images=torch.stack(images), labels=labels, ids=ids)

    def _chosen(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the chosen samples, examining candidates that nobody has looked at yet."""
        choice, place = self._choice, 0
        while True:
            # Iterators of copies may interleave: what another one accepted is only read here.
            known = place < len(choice.accepted)
            number = choice.accepted[place] if known else choice.pending()
            if number is None:
                break
            try:
                image = self._storage.tensor(number, self.preprocessing)
            except UnreadableError as error:
                if known:
                    raise self._changed(number, error) from error
                choice.reject(str(error))
                continue
            if not known:
                choice.accept()
            place += 1
            yield number, image
        self._check_not_empty()

    def _resolved(self) -> Choice:
        """Return the choice, complete."""
        choice = self._choice
        while (number := choice.pending()) is not None:
            try:
                self._storage.verify(number)
            except UnreadableError as error:
                choice.reject(str(error))
            else:
                choice.accept()
        self._check_not_empty()
        return choice

    def _all_skipped(self, choice: Choice) -> Iterator[Skipped]:
        yield from self._storage.unusable
        for number, reason in choice.rejected:
            yield Skipped(self._storage.ids[number], reason)

    def _check_not_empty(self) -> None:
        if self._choice.accepted:
            return
        skipped = list(self._all_skipped(self._choice))
        reasons = "; ".join(f"{item.id}: {item.reason}" for item in skipped[:REASONS_SHOWN])
        raise SourceError(
            f"{self._storage.location}: expected at least one readable image, found none "
            f"among {len(self._storage.ids)}; {len(skipped)} skipped, first {reasons}"
        )

    def _changed(self, number: int, error: UnreadableError) -> SourceError:
        return SourceError(
            f"{self._storage.location}: {self._storage.ids[number]} was readable when it was "
            f"chosen and is no longer: {error}; open the source again"
        )
