"""How many registered architectures do the names and shapes of their tensors tell apart?

Builds the index that ``vitcompress.models.fingerprint`` looks names up in: every timm
architecture and every torchvision classifier, as registered and, where that leaves the
classifier out, with one added. Nothing is downloaded; models are built without storage where
they allow it. Left out: other image sizes than the registered ones, and classifiers removed.
"""

import argparse
import gzip
import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

from vitcompress.models.fingerprint import INDEX_PATH, fingerprint

OTHER_CLASS_COUNT = 7  # the size of nothing else, so a tensor left unmasked shows


@dataclass(frozen=True)
class Case:
    """An architecture: its indexed name, its constructor, and whether it has a classifier."""

    name: str
    build: Callable[..., nn.Module]
    has_classifier: bool


def cases() -> Iterator[Case]:
    """Yield every registered architecture."""
    for name in timm.list_models():
        config = timm.get_pretrained_cfg(name)
        has_classifier = config is None or config.num_classes > 0
        yield Case(f"timm/{name}", partial(timm.create_model, name), has_classifier)
    for name in torchvision.models.list_models(module=torchvision.models):
        build = partial(torchvision.models.get_model, name, weights=None)
        yield Case(f"torchvision/{name}", build, has_classifier=True)


def built_fingerprint(build: Callable[[], nn.Module]) -> str:
    """Return the fingerprint of a model, built without storage where its constructor can."""
    try:
        with torch.device("meta"):
            state = build().state_dict()
    except RuntimeError:
        # Some constructors read values back, which tensors without storage do not have.
        state = build().state_dict()
    return fingerprint({name: tensor.shape for name, tensor in state.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=INDEX_PATH)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names_of: dict[str, set[str]] = defaultdict(set)
    total = failed = unmasked = 0
    for case in cases():
        total += 1
        try:
            registered = built_fingerprint(case.build)
            other = built_fingerprint(partial(case.build, num_classes=OTHER_CLASS_COUNT))
        except Exception as error:  # whatever one model raises, the others are still indexed
            failed += 1
            print(f"{case.name}: not built: {error!r}", file=sys.stderr)
            continue
        if case.has_classifier and other != registered:
            unmasked += 1
            print(f"{case.name}: changes with the number of classes", file=sys.stderr)
        names_of[registered].add(case.name)
        names_of[other].add(case.name)

    index = {
        # Without the local part ("+cpu"), which says nothing about the architectures.
        "versions": {p.__name__: p.__version__.split("+")[0] for p in (timm, torchvision)},
        "fingerprints": {key: sorted(names_of[key]) for key in sorted(names_of)},
    }
    text = json.dumps(index, separators=(",", ":"))
    # Without a time stamp the same models give the same bytes.
    arguments.out.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{total} architectures, {len(names_of)} fingerprints, {failed} not built,", end=" ")
    print(f"{unmasked} with classes unmasked, {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
