"""What the cells of one sweep share, as files: the float graph, decoded images, float logits.

Workers are other processes, on other machines perhaps, so that what they share is a directory:
``graph`` is an artefact without quantizers, ``images/DIGEST.npy`` is mapped into memory (one
copy for all workers of a machine), ``logits/DIGEST.npy`` is what the float model says to them.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import calib
from vitcompress.artifact import StoredModel, read_artifact, write_artifact, write_file
from vitcompress.evaluate import Recorder, evaluate
from vitcompress.graph import CapturedGraph
from vitcompress.result import ImageSet

__all__ = ["SharedFiles", "StoredImages"]


class StoredImages:
    """Decoded images in a file; a calibration source that answers like the one it came from.

    Attributes:
        batch_size: Most images in a batch.
        preprocessing: What was done to them.
        sample_ids: Their names.
        labels: ``[N]`` int64, or ``None``.
        skipped: What the original source could not read.
    """

    def __init__(self, path: Path) -> None:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        fields = facts["preprocessing"]
        self.preprocessing = None if fields is None else calib.Preprocessing.from_dict(fields)
        self.batch_size = int(facts["batch_size"])
        self.sample_ids = tuple(facts["ids"])
        self.labels = None if facts["labels"] is None else torch.tensor(facts["labels"])
        self.skipped = tuple(calib.Skipped(*pair) for pair in facts["skipped"])
        self._description = str(facts["description"])
        self._digest = path.stem
        self._images = np.load(path, mmap_mode="r", allow_pickle=False)

    def __iter__(self) -> Iterator[calib.Batch]:
        for start in range(0, len(self), self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield calib.Batch(
                torch.from_numpy(np.array(self._images[rows])),
                None if self.labels is None else self.labels[rows],
                self.sample_ids[rows],
            )

    def __len__(self) -> int:
        return len(self.sample_ids)

    def digest(self) -> str:
        """Return the digest of the original source."""
        return self._digest

    def describe(self) -> str:
        """Return the description of the original source."""
        return self._description


class SharedFiles:
    """The directory of one run.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_graph(self, graph: CapturedGraph) -> None:
        """Store the float graph."""
        write_artifact(self.path / "graph", StoredModel(graph, {}, {}))

    def graph(self) -> CapturedGraph:
        """Return the float graph."""
        return read_artifact(self.path / "graph").graph

    def write_images(self, source: calib.Source, images: ImageSet) -> StoredImages:
        """Decode a source into a file, a batch at a time, and return what was stored."""
        path = self.path / "images" / f"{images.digest}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            labels = self._decode(source, path)
            preprocessing = source.preprocessing
            facts = {
                "ids": images.ids,
                "labels": labels,
                "description": images.source,
                "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
                "batch_size": source.batch_size,
                "skipped": [[skipped.id, skipped.reason] for skipped in source.skipped],
            }
            path.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
        return StoredImages(path)

    def images(self, images: ImageSet) -> StoredImages:
        """Return images that :meth:`write_images` stored."""
        return StoredImages(self.path / "images" / f"{images.digest}.npy")

    def write_logits(
        self,
        graph: CapturedGraph,
        images: StoredImages,
        kept: Path,
        identity: Mapping[str, Any],
    ) -> Tensor:
        """Run the float model on images, unless that was done before, and return the logits.

        Args:
            graph: The float model.
            images: What it sees.
            kept: Directory that outlives the run.
            identity: What decides the logits besides the images.

        Raises:
            InputError: A label is no class of the model.
        """
        text = json.dumps({**identity, "images": images.digest()}, sort_keys=True)
        path = kept / f"{hashlib.sha256(text.encode()).hexdigest()}.npy"
        if not path.is_file():
            recorder = Recorder(graph.logits)
            evaluate(recorder, images, execution="float")  # checks the labels on the way
            logits = recorder.logits().numpy()
            write_file(path, lambda draft: np.save(draft, logits))
        (self.path / "logits").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, self._logits(images))
        return self.logits(images)

    def logits(self, images: StoredImages) -> Tensor:
        """Return the float model's logits of images, ``[N, O]``."""
        return torch.from_numpy(np.load(self._logits(images), allow_pickle=False))

    def _logits(self, images: StoredImages) -> Path:
        return self.path / "logits" / f"{images.digest()}.npy"

    def _decode(self, source: calib.Source, path: Path) -> list[int] | None:
        stored: Any = None
        labels: list[int] = []
        start = 0
        for batch in source:
            if stored is None:
                shape = (len(source), *batch.images.shape[1:])
                stored = np.lib.format.open_memmap(path, "w+", np.float32, shape)
            stored[start : start + len(batch.images)] = batch.images.numpy()
            start += len(batch.images)
            labels += [] if batch.labels is None else batch.labels.tolist()
        stored.flush()
        return labels if source.has_labels else None
