"""Whole or not at all, and never over what is not ours."""

import errno
import os
from pathlib import Path

import pytest
import torch
from finished import quantized
from tiny import images

import vitcompress
from vitcompress.artifact import files, is_artifact, write_directory, write_file
from vitcompress.artifact.files import check_writable
from vitcompress.errors import ConfigError


@pytest.fixture(scope="module")
def model(vit_graph, source):
    return quantized(vit_graph, source, recipe="deploy")


@pytest.fixture(scope="module")
def other(vit_graph, source):
    return quantized(vit_graph, source, bits=2, recipe="deploy")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refusal(call, *arguments, **settings):
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **settings)
    assert caught.value.exit_code == 2
    return str(caught.value)


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_earlier_artefact_is_kept_unless_told_otherwise(model, other, tmp_path):
    model.save(tmp_path / "a")
    before = contents(tmp_path / "a")

    message = refusal(other.save, tmp_path / "a")

    assert "holds an artefact already; pass --overwrite" in message
    assert contents(tmp_path / "a") == before


def test_overwriting_replaces_the_whole_directory(model, other, tmp_path):
    model.save(tmp_path / "a")
    (tmp_path / "a" / "model.onnx").write_text("of the old one")

    other.save(tmp_path / "a", overwrite=True)

    x = images(2)
    assert torch.equal(vitcompress.load(tmp_path / "a")(x), other(x))
    assert not (tmp_path / "a" / "model.onnx").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_directory_that_is_no_artefact_is_never_replaced(model, tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("three years of work")

    message = refusal(model.save, tmp_path, overwrite=overwrite)

    assert "holds files that are no artefact" in message
    assert contents(tmp_path) == {"thesis.txt": b"three years of work"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_in_the_way_is_kept(model, tmp_path, overwrite):
    (tmp_path / "a").write_text("mine")

    assert "is a file" in refusal(model.save, tmp_path / "a", overwrite=overwrite)
    assert "not a writable directory" in refusal(model.save, tmp_path / "a" / "b")
    assert (tmp_path / "a").read_text() == "mine"


def test_empty_and_missing_directories_are_filled(model, tmp_path):
    (tmp_path / "empty").mkdir()

    model.save(tmp_path / "empty")
    model.save(str(tmp_path / "deep" / "er" / "new"))

    assert is_artifact(tmp_path / "empty")
    assert is_artifact(tmp_path / "deep" / "er" / "new")


@pytest.mark.parametrize("method", ["write_bytes", "write_text"])
def test_full_disk_leaves_nothing_half_written(model, tmp_path, monkeypatch, method):
    monkeypatch.setattr(Path, method, disk_full)

    message = refusal(model.save, tmp_path / "a")

    assert "No space left on device; nothing was changed" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["write_bytes", "write_text"])
def test_full_disk_keeps_the_earlier_artefact(model, other, tmp_path, monkeypatch, method):
    model.save(tmp_path / "a")
    before = contents(tmp_path / "a")
    monkeypatch.setattr(Path, method, disk_full)

    refusal(other.save, tmp_path / "a", overwrite=True)

    assert contents(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_interrupt_while_writing_keeps_the_earlier_artefact(model, tmp_path):
    model.save(tmp_path / "a")
    before = contents(tmp_path / "a")

    def write(folder):
        (folder / "manifest.json").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_directory(tmp_path / "a", write, overwrite=True)

    assert contents(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_failure_between_the_two_renames_brings_the_earlier_one_back(
    model, tmp_path, monkeypatch, failing, error
):
    model.save(tmp_path / "a")
    before = contents(tmp_path / "a")
    calls, rename = [], Path.rename

    def fails_once(self, target):
        calls.append(target)
        if len(calls) == failing:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)

    with pytest.raises((KeyboardInterrupt, ConfigError)):
        write_directory(tmp_path / "a", lambda folder: None, overwrite=True)

    assert contents(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_folder_that_may_not_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)

    message = refusal(check_writable, tmp_path / "a" / "b", overwrite=False)

    assert f"{tmp_path} is not a writable directory" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300])
def test_name_that_the_file_system_refuses_is_a_config_error(model, tmp_path, name):
    for call in (model.save, model.export_onnx):
        assert "cannot be written" in refusal(call, tmp_path / name)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "report.json"
    write_file(path, lambda draft: draft.write_text("first"))

    def half(draft):
        draft.write_text("half")
        disk_full()

    assert "No space left" in refusal(write_file, path, half)
    assert "exists already" in refusal(write_file, path, half, overwrite=False)
    assert "is a directory" in refusal(write_file, path.parent, half)
    assert contents(path.parent) == {"report.json": b"first"}

    write_file(path, lambda draft: draft.write_text("second"))

    assert contents(path.parent) == {"report.json": b"second"}


def test_model_that_is_not_finished_cannot_be_saved(model, vit_graph, tmp_path):
    graph = model.graph.clone()
    target, quantizer = next(iter(graph.quantizers().items()))
    quantizer.scale = None
    unfinished = vitcompress.CompressedModel(graph, model.recipe, model.report, None)

    message = refusal(unfinished.save, tmp_path / "a")

    assert "not calibrated" in message
    assert target.removeprefix("quantizers.").split("_")[0] in message
    assert list(tmp_path.iterdir()) == []
