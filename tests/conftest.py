import gc
from functools import cache
from importlib import import_module

import pytest
import torch
from tiny import images, make_source, tiny_vit

from vitcompress.graph import capture

# Tensors are tiny: on a busy machine, threads that wait for each other cost more than work.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _rare_collections():
    """Spare the collector the libraries' objects, which it would walk at every capture."""
    gc.collect()
    gc.freeze()
    usual = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    yield
    gc.set_threshold(*usual)
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def vit():
    """The tiny plain ViT, in evaluation mode. Not to be changed."""
    return tiny_vit()


@pytest.fixture(scope="session")
def vit_graph(vit):
    """The captured tiny ViT. Not to be changed: clone it."""
    return capture(vit, images(2), model_id="tiny")


@pytest.fixture
def graph(vit_graph):
    """A copy of the captured tiny ViT to work on."""
    return vit_graph.clone()


@pytest.fixture(scope="session")
def source():
    return make_source(images(8))


@pytest.fixture(scope="session", autouse=True)
def _translations_listed_once():
    """Spare every export the list of translations to ONNX: slow, and always the same."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            registry = import_module(
                "torch.onnx._internal.exporter._registration"
            ).ONNXRegistry
            listed = cache(registry.from_torchlib)
            patch.setattr(registry, "from_torchlib", staticmethod(listed))
        except (ImportError, AttributeError):
            pass  # It has moved: tests take longer, that is all.
        yield
