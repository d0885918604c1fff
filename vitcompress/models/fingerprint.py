"""Which registered architecture does a state dict belong to, judged by names and shapes alone?

A fingerprint is a hash over the names and shapes of all parameters and persistent buffers,
with the number of classes masked, so that a fine-tuned checkpoint is still recognised. The
packaged index maps fingerprints to names; ``benchmarks/build_fingerprints.py`` makes it.

What a fingerprint cannot see: anything without a tensor, such as strides, activations, the
epsilon of a norm or the normalisation of the images. Architectures that differ only there
share one fingerprint, and all their names are returned. Shapes that follow from the image
size, such as position embeddings, are those of the registered size.
"""

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

__all__ = ["CLASSIFIER_MODULES", "fingerprint", "lookup"]

INDEX_PATH = Path(__file__).with_name("fingerprints.json.gz")

# Full names of the modules whose outputs are classes. Which one a state dict uses is unknown,
# so all are masked. A hidden layer caught along (the second last of a VGG) costs nothing: the
# layer after it still shows its width.
CLASSIFIER_MODULES = (
    # One linear layer, or one per branch or stage.
    *("head", "head.0", "head.1", "heads.head", "fc", "classifier", "classif", "last_linear"),
    *("heads.0", "heads.1", "heads.2", "heads.3"),
    # The last layer of a larger head.
    *("head.fc", "head.fc2", "head.fc.fc2", "head.l", "head.head.l", "head.linear"),
    *("head.proj", "head.classifier.4", "head.classifier.linear"),
    *("classifier.1", "classifier.2", "classifier.3", "classifier.5", "classifier.6"),
    # Distillation and auxiliary heads.
    *("head_dist", "head_dist.l", "head_dist.linear", "head.head_dist.l"),
    *("heads_dist.0", "heads_dist.1", "heads_dist.2", "heads_dist.3"),
    *("cls_classifier", "distillation_classifier"),
    *("aux_head", "aux1.fc2", "aux2.fc2", "AuxLogits.fc"),
)


def is_classifier_tensor(name: str, shape: Sequence[int]) -> bool:
    """Return whether the leading dimension of a tensor is the number of classes."""
    if name.rpartition(".")[0] not in CLASSIFIER_MODULES:
        return False
    return len(shape) in (1, 2) or (len(shape) == 4 and tuple(shape[2:]) == (1, 1))


def fingerprint(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return the fingerprint of a set of named shapes.

    Args:
        shapes: Shape of every parameter and persistent buffer, by its name in the state dict;
            the order does not matter.

    Returns:
        The first 16 hexadecimal digits of a SHA-256 over the sorted lines ``name:shape``, in
        which the leading dimension of the classifier's tensors reads ``num_classes``.
    """
    lines = []
    for name, shape in shapes.items():
        sizes = [str(size) for size in shape]
        if is_classifier_tensor(name, shape):
            sizes[0] = "num_classes"
        lines.append(f"{name}:{','.join(sizes)}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


@cache
def packaged_index() -> Mapping[str, Sequence[str]]:
    """Return the packaged index: sorted architecture names by fingerprint."""
    with gzip.open(INDEX_PATH, "rt", encoding="utf-8") as file:
        index: dict[str, list[str]] = json.load(file)["fingerprints"]
    return index


def lookup(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the registered architectures that have exactly these names and shapes.

    Args:
        shapes: As for ``fingerprint``.

    Returns:
        Sorted names such as ``"timm/vit_tiny_patch16_224"`` or ``"torchvision/vit_b_16"``;
        several where architectures share all names and shapes, empty where none fits.
    """
    return list(packaged_index().get(fingerprint(shapes), ()))
