"""Exported files, shared between tests: tracing for ONNX takes most of the time."""

from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
from finished import one_step, quantized
from onnx_files import written_graph
from tiny import images

from vitcompress.export.onnx import exporter
from vitcompress.export.rewrites import rewritten


@pytest.fixture(scope="session")
def models(vit_graph, source):
    """Return the finished tiny model of a recipe and a scheme."""
    return cache(
        lambda recipe, scheme: quantized(
            vit_graph, source, recipe=recipe, scheme=scheme, overrides=one_step(recipe)
        )
    )


@pytest.fixture(scope="session")
def traced_once():
    """Trace each graph once, whatever is written from it.

    A trace depends on the graph and its options alone; a lowering edits it, hence the copy.
    """
    rewrite, mark = cache(exporter.rewritten), cache(exporter.marked_model)

    @contextmanager
    def traced_once():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exporter, "rewritten", rewrite)
            patch.setattr(exporter, "marked_model", lambda *a, **k: mark(*a, **k).clone())
            yield

    return traced_once


@pytest.fixture(scope="session")
def export(models, traced_once, tmp_path_factory):
    """Return a file of a recipe, a scheme and a target: path, model, written graph, result."""

    @cache
    def export(recipe, scheme, target):
        model = models(recipe, scheme)
        path = tmp_path_factory.mktemp("onnx") / f"{recipe}-{scheme}-{target}.onnx"
        with traced_once():
            result = model.export_onnx(path, target=target, images=images(64, seed=7))
        graph = written_graph(model, target)
        return SimpleNamespace(model=model, graph=graph, path=path, result=result)

    return export


@pytest.fixture
def model(models):
    return models("deploy", "W8A8")


@pytest.fixture(scope="session")
def trace(models):
    graph, marked_model = models("deploy", "W8A8").graph, exporter.marked_model

    @cache
    def trace(**options):
        rewrites = options["fuse_attention"]  # both are of the target for onnxruntime
        return marked_model(rewritten(graph).graph if rewrites else graph, **options)

    return trace


@pytest.fixture
def traced(trace, monkeypatch):
    """Spare tests that look at what comes after tracing a trace of their own."""
    monkeypatch.setattr(
        exporter, "marked_model", lambda _, **options: trace(**options).clone()
    )
