"""Exported toys, shared between tests: tracing for ONNX takes most of the time."""

from functools import cache

import pytest
from scaffold import SIZE
from tiny import images
from toys import toy_model


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    """Return the verified export of a toy at eight bits, by its name."""

    @cache
    def export(name):
        path = tmp_path_factory.mktemp("toys") / f"{name}.onnx"
        return toy_model(name).export_onnx(path, images=images(8, SIZE, seed=7))

    return export
