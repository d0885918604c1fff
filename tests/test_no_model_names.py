"""Nothing but the adapters of model libraries knows the name of a model."""

import re
from pathlib import Path

import pytest
from backbones import BACKBONES

import vitcompress

PACKAGE = Path(vitcompress.__file__).parent
SOURCES = [
    path
    for path in PACKAGE.rglob("*.py")
    if "models" not in path.relative_to(PACKAGE).parts  # the adapters
]
#: First words of registered names that say something else in plain English, or are ours.
ORDINARY = {
    "test",
    "tiny",
    "vit",
    "mixer",
    "nest",
    "pit",
    "coat",
    "inception",
    "vitamin",
    "dinat",
}
FAMILIES = {re.split(r"[_\d]", case.name)[0] for case in BACKBONES.values()} - ORDINARY
NAMES = re.compile(rf"\b({'|'.join(sorted(FAMILIES))})", re.IGNORECASE)


def test_the_families_of_the_matrix_are_looked_for():
    assert {"swin", "deit", "cait", "levit", "fastvit", "poolformer"} <= FAMILIES
    assert NAMES.search("as in Swin, windows share the batch axis")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_names_no_model(path):
    assert NAMES.findall(path.read_text(encoding="utf-8")) == []
