"""A reconstruction that is killed and started again through the command line."""

import json

import pytest
from finished import TINY

from vitcompress import api
from vitcompress.engine.checkpoint import StageCheckpoint


@pytest.fixture
def captured(monkeypatch, vit_graph):
    """Spare a test the capture of the tiny model."""
    monkeypatch.setattr(api, "capture", lambda *_, **__: vit_graph)


SETTINGS = (
    *("--effort", "balanced", "--scheme", "W3A4", "--samples", 4),
    *("--set", "passes.6.iterations=1", "--set", "passes.6.device=cpu"),
    *("--set", "passes.4.roles=[value]", "--set", "passes.4.rounds=0"),
)


def contents(folder):
    """Return every file of an artefact, without times and the command, which names it."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest, report = (
        json.loads(found.pop(name)) for name in ("manifest.json", "report.json")
    )
    assert manifest
    for entry in report["passes"]:
        for key in ("seconds", "peak_memory_bytes"):
            entry.pop(key)
        for block in entry["details"].get("blocks", {}).values():
            block.pop("seconds")
    report.pop("stages")
    report["protocol"].pop("command")
    for entry in report["evaluations"]:
        entry.pop("seconds")
    return found, report


def test_a_killed_run_started_again_alone_writes_the_same_artefact(
    vitcompress, captured, monkeypatch, tmp_path
):
    write, written = StageCheckpoint.write, []

    def killed(self, block, outcome):
        write(self, block, outcome)
        written.append(block)
        if len(written) == 2:
            raise KeyboardInterrupt

    arguments = ("quantize", *TINY, *SETTINGS)
    whole = vitcompress(*arguments, "-o", "whole")
    monkeypatch.setattr(StageCheckpoint, "write", killed)
    arguments = (*arguments, "--checkpoint", "kept", "-o", "resumed")
    first = vitcompress(*arguments)
    left = (tmp_path / "resumed").exists()
    other = vitcompress(*arguments, "--set", "passes.6.iterations=2")
    second = vitcompress(*arguments)

    assert (whole.code, first.code != 0, left, second.code) == (0, True, False, 0)
    assert other.code == 2
    assert "kept: is the checkpoint of another run: its recipe differs" in other.err
    assert written == [0, 1, 2, 3]
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
