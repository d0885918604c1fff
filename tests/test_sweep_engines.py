"""Cells in other processes: the same results however many, and whatever happens to them."""

import os
import re
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from sweeping import QUICK, InProcess, calibration, essences, evaluation

import vitcompress
from vitcompress.engine.memory import available_bytes
from vitcompress.errors import ConfigError
from vitcompress.result import ImageSet, Origin
from vitcompress.sweep import local, run
from vitcompress.sweep.engines import Answer, Cell, map_cells

#: Answers with the seed it was given, without the seconds that the library takes to import.
ECHO = """
import json, sys
for line in sys.stdin:
    seed = json.loads(line)["origin"]["seed"]
    print(json.dumps({"result": str(seed), "error": "", "peak_bytes": 10**9}), flush=True)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "quick.yaml"
    path.write_text(QUICK)
    return path


@pytest.fixture
def sweep(vit_graph, recipe):
    """Run a sweep of the tiny model: two cells, both of one group."""

    def sweep(folder, **settings):
        settings = {"schemes": "W8A8,W4A4", "seeds": "0", **settings}
        return vitcompress.sweep(
            vit_graph,
            folder,
            recipes=[recipe],
            evaluation=evaluation(),
            calibration=calibration,
            say=lambda line: None,
            **settings,
        )

    return sweep


@pytest.fixture
def program(monkeypatch):
    """Let workers be a short program instead of the library's."""

    def program(text):
        command = [sys.executable, "-S", "-E", "-c", text]
        monkeypatch.setattr(local, "worker_command", lambda folder: command)

    return program


def cells(count, groups=1):
    """Return cells that only say their number, as their seed; recipes are groups."""
    images = ImageSet(source="", ids=(), digest="")
    return [
        Cell(
            str(number),
            Origin(
                model="",
                model_digest="",
                recipe="r",
                scheme="W8A8",
                resolved_recipe="",
                seed=number // (count // groups),
                calibration=images,
                evaluation=images,
                versions={},
            ),
            None,
        )
        for number in range(count)
    ]


def answers_of(found, folder, jobs, **settings):
    said = []
    answers = map_cells("local", found, folder, jobs=jobs, say=said.append, **settings)
    with closing(answers):
        return list(answers), said


def children():
    """Return the processes that this one started and that still run."""
    own = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, IndexError):
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z":
            own.append(int(entry.name))
    return own


def test_results_are_the_same_bits_with_one_process_two_and_none(sweep, tmp_path, monkeypatch):
    one = sweep(tmp_path / "one", jobs=1)
    two = sweep(tmp_path / "two", jobs=2)
    monkeypatch.setattr(run, "map_cells", InProcess())
    none = sweep(tmp_path / "none")

    assert len(one.results) == 2
    assert essences(one) == essences(two) == essences(none)
    assert one.index.model_copy(update={"command": None}) == two.index


def test_every_cell_is_answered_once(program, tmp_path):
    program(ECHO)

    found, _ = answers_of(cells(7, groups=7), tmp_path, jobs=3)

    assert sorted(found, key=lambda a: a.key) == [
        Answer(str(n), str(n), "", 10**9) for n in range(7)
    ]
    assert children() == []


def test_a_worker_stays_with_its_group(program, tmp_path):
    """Neighbours differ, so that one job alone shows which it prefers."""
    program(ECHO)
    mixed = [
        cell for pair in zip(*[iter(cells(6, groups=2))] * 3, strict=True) for cell in pair
    ]
    shuffled = [mixed[0], mixed[3], mixed[1], mixed[4], mixed[2], mixed[5]]

    found, _ = answers_of(shuffled, tmp_path, jobs=1)

    assert [answer.result for answer in found] == ["0", "0", "0", "1", "1", "1"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            r"its process ended by signal 9 \(out of memory\?\)$",
        ),
        ("raise SystemExit(3)", "its process ended with code 3$"),
        ("raise ValueError('no such disk')", "with code 1: (.|\n)*no such disk"),
    ],
)
def test_a_process_that_ends_fails_its_cell_and_no_other(program, tmp_path, text, reason):
    program(text)

    found, _ = answers_of(cells(3), tmp_path, jobs=2)

    assert sorted(answer.key for answer in found) == ["0", "1", "2"]
    for answer in found:
        assert answer.result is None
        assert re.search(reason, answer.error), answer.error
    assert children() == []


def test_one_cell_runs_at_a_time_where_memory_is_short(program, tmp_path, monkeypatch):
    busy, most = set(), []
    ask = local._Pool._ask

    def watched(pool, number, cell):
        busy.add(number)
        most.append(len(busy))
        time.sleep(0.05)
        answer = ask(pool, number, cell)
        busy.discard(number)
        return answer

    program(ECHO)
    monkeypatch.setattr(local._Pool, "_ask", watched)
    monkeypatch.setattr(local, "PATIENCE", 0.01)
    monkeypatch.setattr(local, "available_bytes", lambda: 10**8)

    found, said = answers_of(cells(4), tmp_path, jobs=2, needed_bytes=10**9)

    assert len(found) == 4
    assert max(most) == 1
    assert "memory: a cell takes 1.0 GB, 0.0 GB are left; going on with 1 at a time" in said


def test_memory_that_running_cells_will_still_take_is_not_left(tmp_path, monkeypatch):
    """One runs, holds 0.4 GB and will take 1; of 1.5 GB only 0.9 are left for another."""

    class Running:
        pid = 1

    pool = local._Pool(cells(2), tmp_path, 10**9, print)
    monkeypatch.setattr(local, "high_water_mark", lambda process: 4 * 10**8)
    pool._workers[0], pool._busy = Running(), {0}

    for available, short in ((1.5e9, True), (1.7e9, False)):
        monkeypatch.setattr(local, "available_bytes", lambda found=available: int(found))
        assert (pool._shortage(1) is not None) == short


def test_memory_that_nobody_knows_limits_nothing(program, tmp_path, monkeypatch):
    program(ECHO)
    monkeypatch.setattr(local, "available_bytes", lambda: None)

    found, said = answers_of(cells(4), tmp_path, jobs=2, needed_bytes=10**15)

    assert len(found) == 4
    assert said == []


def test_available_memory_is_below_that_of_the_machine():
    available = available_bytes()

    assert available is not None
    assert 0 < available < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture
def interrupt():
    """A signal that interrupts, also where test runners ignore that of the keyboard."""

    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_an_interrupt_ends_every_process(program, tmp_path, interrupt):
    program("import sys, time\nfor line in sys.stdin: time.sleep(60)")
    answers = map_cells("local", cells(4), tmp_path, jobs=2, say=print)
    threading.Timer(0.5, interrupt).start()

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), closing(answers):
        next(answers)

    assert time.monotonic() - started < 20
    assert children() == []


def test_ray_that_is_not_installed_is_said(sweep, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(ConfigError, match=r"pip install 'vitcompress\[ray\]'"):
        sweep(tmp_path / "sweep", engine="ray")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.filterwarnings("default")
def test_ray_computes_the_same_and_tries_a_killed_worker_again(sweep, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    killed = []

    def kill_one():
        """Kill the first actor that has begun."""
        while not killed:
            for entry in Path("/proc").iterdir():
                try:
                    name = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if name.startswith(b"ray::") and b"_Remote.compute" in name:
                    os.kill(int(entry.name), signal.SIGKILL)
                    killed.append(int(entry.name))
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    found = sweep(tmp_path / "ray", engine="ray", jobs=2, schemes="W8A8,W4A4", seeds="0..1")
    killer.join(timeout=10)
    monkeypatch.setattr(run, "map_cells", InProcess())
    expected = sweep(tmp_path / "local", schemes="W8A8,W4A4", seeds="0..1")

    assert len(killed) == 1
    assert found.failures == {}
    assert len(found.results) == 4
    assert essences(found) == essences(expected)
