import os

import pytest
import torch

from vitcompress.engine import memory
from vitcompress.engine.memory import PeakMemory, available_bytes, high_water_mark

MEMINFO = "MemTotal: 100 kB\nMemFree: 10 kB\nMemAvailable: 60 kB\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 60 kB free memory, with a control group if files are written."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "meminfo")
    names = [("max", "current", "stat"), ("limit", "usage", "stat1")]
    groups = tuple(tuple(tmp_path / name for name in group) for group in names)
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", groups)
    return tmp_path


def test_peak_covers_what_was_held_meanwhile():
    with PeakMemory() as peak:
        held = torch.ones(30_000_000)
        del held

    assert peak.peak_bytes > 120_000_000
    assert high_water_mark() >= peak.peak_bytes - 1_000_000
    assert high_water_mark(os.getpid()) > 100_000_000


def test_process_that_is_none_has_no_mark():
    assert high_water_mark(2**30) == 0


def test_machine_tells_what_is_available(machine):
    assert available_bytes() == 60 * 1024


@pytest.mark.parametrize("version", [("max", "current", "stat"), ("limit", "usage", "stat1")])
def test_control_group_leaves_less(machine, version):
    limit, used, statistics = version
    (machine / limit).write_text("40000\n")
    (machine / used).write_text("25000\n")
    (machine / statistics).write_text("anon 1\ninactive_file 5000\ntotal_inactive_file 6000\n")

    # What files left in the cache is given up on demand.
    assert available_bytes() == 40000 - (25000 - 6000)


def test_group_without_a_limit_limits_nothing(machine):
    (machine / "max").write_text("max\n")
    (machine / "current").write_text("25000\n")
    (machine / "stat").write_text("inactive_file 0\n")

    assert available_bytes() == 60 * 1024


def test_group_beyond_its_limit_leaves_nothing(machine):
    (machine / "max").write_text("10\n")
    (machine / "current").write_text("20\n")
    (machine / "stat").write_text("")

    assert available_bytes() == 0


def test_system_that_tells_nothing_is_unknown(machine):
    (machine / "meminfo").unlink()

    assert available_bytes() is None
