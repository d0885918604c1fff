"""``vitcompress sweep``: killed and resumed, what it prints, and what users get wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finished import TINY
from safetensors.torch import save_file
from sweeping import BROKEN, QUICK, InProcess
from tiny import images

import calib
from vitcompress import api
from vitcompress.result import read_result
from vitcompress.sweep import read_sweep, run

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def arguments(tmp_path):
    """A sweep of the tiny model as the command line is told of it: four cells."""
    (tmp_path / "quick.yaml").write_text(QUICK)
    (tmp_path / "broken.yaml").write_text(BROKEN)
    save_file({"images": images(8)}, tmp_path / "train.safetensors")
    labelled = {"images": images(12, seed=5), "labels": torch.arange(12) % 10}
    save_file(labelled, tmp_path / "eval.safetensors")
    return {
        "--schemes": "W8A8,W4A4",
        "--recipes": "quick.yaml",
        "--seeds": "0..1",
        "--calib": "train.safetensors",
        "--samples": 4,
        "--eval": "eval.safetensors",
        "-o": "sweep",
    }


@pytest.fixture
def in_process(monkeypatch, vit_graph):
    """Cells without processes, a model without a capture."""
    found = InProcess()
    monkeypatch.setattr(run, "map_cells", lambda *a, **k: found(*a, **k))
    monkeypatch.setattr(api, "capture", lambda *_, **__: vit_graph)
    return found


def command(arguments, **changes):
    given = {**arguments, **changes}
    return ["sweep", *TINY, *(str(word) for pair in given.items() for word in pair)]


def processes_about(folder):
    """Return the processes whose command line names a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_killed_sweep_loses_the_running_cell_and_goes_on(vitcompress, arguments, tmp_path):
    arguments = {**arguments, "--seeds": "0..2", "--jobs": 1, "-o": tmp_path / "sweep"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vitcompress", *command(arguments)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("sweep/cells/*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = read_sweep(tmp_path / "sweep")
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("sweep/cells/*.json")}
    while processes_about(tmp_path / "sweep"):  # the worker sees that its sweep has gone
        assert time.monotonic() < deadline
        time.sleep(0.05)

    found = vitcompress(*command(arguments))

    after = read_sweep(tmp_path / "sweep")
    assert (found.code, found.err) == (0, "")
    assert 1 <= len(before.results) < 6
    assert len(after.results) == 6
    assert f"6 cells, {len(before.results)} there already" in found.out
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert not (tmp_path / "sweep" / ".sweep-work").exists()
    assert after.results.items() >= before.results.items()
    assert processes_about(tmp_path / "sweep") == []


def test_table_gives_means_over_seeds_beside_the_float_model(
    vitcompress, arguments, in_process
):
    found = vitcompress(*command(arguments))

    assert (found.code, found.err) == (0, "")
    for words in (
        "model: module built by tiny:tiny_vit",
        "4 cells, 0 there already",
        "12 evaluation images; float model: top-1",
        "[4/4]",
        "quick W4A4 seed 1: top-1",
        "12 images, seeds 0, 1, simulated",
        "│ float  │ -",
        "│ quick  │ W4A4",
        "2/2",
        " ± ",
        "mean ± standard deviation over seeds",
    ):
        assert words in found.out
    result = read_result(next(iter(Path("sweep/cells").iterdir())))
    assert result.command.startswith("vitcompress sweep tiny:tiny_vit --image-size 32")
    assert result.report.protocol.command == result.command


def test_failed_cells_are_listed_and_end_with_4(vitcompress, arguments, in_process):
    found = vitcompress(*command(arguments, **{"--recipes": "broken.yaml,quick.yaml"}))

    assert found.code == 4
    assert "Traceback" not in found.err
    assert "failed: broken W4A4 seed 1: passes[0] 'attach'" in found.out
    assert "'nowhere:*' matches none of" in found.out
    assert found.out.count("0/2") == 2
    assert found.out.count("2/2") == 2


def test_interrupt_says_what_is_kept(vitcompress, arguments, in_process):
    in_process.stop_after = 1

    found = vitcompress(*command(arguments))

    assert found.code == 130
    assert found.err.strip() == (
        "error: interrupted; finished cells are kept in sweep: the same command goes on"
    )
    assert len(read_sweep("sweep").results) == 1


def test_images_without_labels_are_said_to_give_no_accuracy(
    vitcompress, arguments, in_process
):
    found = vitcompress(*command(arguments, **{"--eval": "train.safetensors"}))

    assert found.code == 0
    assert "8 evaluation images without labels: agreement only, no accuracy" in found.out
    assert "│ quick  │ W8A8   │       - │" in found.out


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"--schemes": "W8A8,4W4"}, 2, "expected a form like W4A8, got '4W4'; did you mean"),
        ({"--schemes": "W9A8"}, 2, "did you mean 'W8A8'?"),
        ({"--recipes": "deplay"}, 2, "no recipe 'deplay'; did you mean 'deploy'?"),
        ({"--recipes": "nowhere.yaml"}, 2, "cannot read the recipe: No such file"),
        ({"--seeds": "2..0"}, 2, "2..0 counts down; write 0..2"),
        ({"--seeds": "one"}, 2, "expected whole numbers and ranges like 0..2,7, got 'one'"),
        ({"--jobs": 0}, 2, "Invalid value for '--jobs'"),
        ({"--engine": "slurm"}, 2, "engine: expected one of ['local', 'ray'], got 'slurm'"),
        ({"--address": "auto"}, 2, "address: is for the engine 'ray' alone"),
        ({"-o": "quick.yaml"}, 2, "quick.yaml: is a file; name a directory"),
        ({"-o": "."}, 2, "holds files that are no sweep"),
        ({"--eval": "evil.safetensors"}, 5, "did you mean eval.safetensors?"),
        ({"--eval": "empty"}, 5, "expected images"),
        ({"--eval": "broken"}, 5, "expected at least one readable image, found none"),
        ({"--calib": "train"}, 5, "found nothing"),
        ({"--eval": "mislabelled.safetensors"}, 5, "label 10 is no class of this model"),
    ],
)
def test_mistake_is_one_line_and_leaves_nothing(
    refused, arguments, in_process, tmp_path, changes, code, words
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "image.png").write_bytes(b"no image")
    labelled = {"images": images(2), "labels": torch.tensor([0, 10])}
    save_file(labelled, tmp_path / "mislabelled.safetensors")

    assert words in refused(code, *command(arguments, **changes))


def test_directory_of_another_model_is_refused(vitcompress, arguments, in_process, tmp_path):
    (tmp_path / "other.py").write_text(
        "import tiny\ndef build(): return tiny.tiny_vit(seed=1)"
    )
    vitcompress(*command(arguments))

    found = vitcompress(*command(arguments), "--image-size", 32)
    other = vitcompress("sweep", "other:build", *command(arguments)[2:])

    assert found.code == 0
    assert other.code == 2
    assert "sweep: holds a sweep of another model: tiny:tiny_vit" in other.err


def test_calibration_is_rendered_where_none_is_named(
    vitcompress, arguments, in_process, monkeypatch
):
    opened = []
    open_source = calib.open_source
    monkeypatch.setattr(
        calib,
        "open_source",
        lambda spec, **settings: opened.append(spec) or open_source(spec, **settings),
    )
    del arguments["--calib"]

    found = vitcompress(*command(arguments, **{"--seeds": 0, "--schemes": "W8A8"}))

    assert found.code == 0
    assert "no --calib: calibrating on rendered images (synthetic)" in found.out
    assert opened == ["synthetic", "eval.safetensors"]
