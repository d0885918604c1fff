"""The process: signals, pipes, and ``python -m``."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SLEEPING = """
import pathlib, time

def build():
    pathlib.Path("ready").touch()
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    def start(*arguments, **settings):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "vitcompress", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **settings,
        )

    return start


def test_termination_is_an_interrupt_and_leaves_nothing(start, tmp_path):
    (tmp_path / "sleeping.py").write_text(SLEEPING)
    process = start("quantize", "sleeping:build", "-o", "out")
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)

    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)

    assert process.returncode == 130
    assert errors.strip() == "error: interrupted; nothing was written"
    assert {p.name for p in tmp_path.iterdir()} <= {"sleeping.py", "ready", "__pycache__"}


def test_reader_that_goes_away_is_no_error_of_ours(start):
    process = start("recipes", "show", "repq_vit")
    process.stdout.close()

    errors = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()

    assert "Traceback" not in errors
    assert "internal error" not in errors
