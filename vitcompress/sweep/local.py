"""Cells on this machine: one process for each job, as many as memory allows."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from vitcompress.engine.memory import available_bytes, high_water_mark
from vitcompress.sweep.engines import Answer, Cell

__all__ = ["compute_locally"]

#: Seconds between two looks at the memory, where there is too little of it.
PATIENCE = 1.0


def compute_locally(
    cells: Sequence[Cell],
    folder: Path,
    *,
    jobs: int | None,
    needed_bytes: int,
    say: Callable[[str], None],
) -> Generator[Answer, None, None]:
    """Yield answers as they come; see :func:`vitcompress.sweep.engines.map_cells`."""
    count = min(jobs or os.cpu_count() or 1, len(cells))
    pool = _Pool(cells, folder, needed_bytes, say)
    threads = [threading.Thread(target=pool.work, args=(n,)) for n in range(count)]
    try:
        for thread in threads:
            thread.start()
        for _ in cells:
            answer = pool.answers.get()
            if isinstance(answer, BaseException):
                raise answer
            yield answer
    finally:
        pool.stop()
        for thread in threads:
            thread.join()


class _Pool:
    """Cells that wait, processes that run, and the memory between them."""

    def __init__(
        self,
        cells: Sequence[Cell],
        folder: Path,
        needed_bytes: int,
        say: Callable[[str], None],
    ) -> None:
        self.answers: queue.Queue[Answer | BaseException] = queue.Queue()
        self._pending = list(cells)
        self._folder = folder
        self._needed = needed_bytes
        self._say = say
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._workers: dict[int, _Worker] = {}
        self._busy: set[int] = set()

    def work(self, number: int) -> None:
        """Compute cells, one after the other, until none is left or the pool is stopped."""
        group = None
        try:
            while (cell := self._next(number, group)) is not None:
                group = cell.group
                self.answers.put(self._ask(number, cell))
        except BaseException as error:  # seen by whoever waits for answers
            self.answers.put(error)
        finally:
            self._close(number)

    def stop(self) -> None:
        """End every process at once."""
        with self._lock:
            self._stopped.set()
            self._pending.clear()
            workers = list(self._workers.values())
        for worker in workers:
            worker.close()

    def _next(self, number: int, group: tuple[str, int] | None) -> Cell | None:
        """Return a cell, one of the same group if there is one; wait for memory before."""
        told = False
        while not self._stopped.is_set():
            with self._lock:
                self._busy.discard(number)
                if not self._pending:
                    return None
                short = self._shortage(number)
                if short is None:
                    same = (i for i, cell in enumerate(self._pending) if cell.group == group)
                    self._busy.add(number)
                    return self._pending.pop(next(same, 0))
                running = len(self._busy)
            self._close(number)
            if not told:
                self._say(f"{short}; going on with {running} at a time")
                told = True
            self._stopped.wait(PATIENCE)
        return None

    def _shortage(self, number: int) -> str | None:
        """Return why one more cell cannot run beside those that do, or ``None``.

        Those that run have not taken all they need yet; that much is promised to them.
        """
        available = available_bytes()
        if not self._busy or available is None:
            return None
        marks = {n: high_water_mark(worker.pid) for n, worker in self._workers.items()}
        needed = max(self._needed, *marks.values(), 0)
        promised = sum(needed - marks.get(n, 0) for n in self._busy)
        # What a waiting worker holds already is its own.
        left = max(available - promised, 0) + marks.get(number, 0)
        if left >= needed:
            return None
        return f"memory: a cell takes {needed / 1e9:.1f} GB, {left / 1e9:.1f} GB are left"

    def _ask(self, number: int, cell: Cell) -> Answer:
        with self._lock:
            if self._stopped.is_set():
                return Answer(cell.key, error="stopped")
            worker = self._workers.get(number) or _Worker(self._folder, number)
            self._workers[number] = worker
        text = json.dumps(
            {"origin": cell.origin.model_dump(mode="json"), "command": cell.command}
        )
        line = worker.ask(text)
        if line is None:
            self._close(number)
            return Answer(cell.key, error=worker.epitaph())
        found = json.loads(line)
        with self._lock:
            self._needed = max(self._needed, int(found["peak_bytes"]))
        return Answer(cell.key, found["result"], found["error"], int(found["peak_bytes"]))

    def _close(self, number: int) -> None:
        with self._lock:
            worker = self._workers.pop(number, None)
            self._busy.discard(number)
        if worker is not None:
            worker.close()


class _Worker:
    """A process of ``vitcompress.sweep.worker``."""

    def __init__(self, folder: Path, number: int) -> None:
        root = str(Path(__file__).parent.parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._log = folder / f"worker-{number}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                worker_command(folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                text=True,
                encoding="utf-8",
            )
        self.pid = self._process.pid

    def ask(self, line: str) -> str | None:
        """Send a line and return the answer; ``None`` if the process ended instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline() or None
        except (OSError, ValueError):  # closed on this side or on the other
            return None

    def close(self) -> None:
        """End the process; waits until its memory is free."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()

    def epitaph(self) -> str:
        """Return how the process ended, with its last words."""
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        cause = " (out of memory?)" if code == -9 else ""
        with contextlib.suppress(OSError):
            words = self._log.read_text(encoding="utf-8", errors="replace").strip()
            if words:
                return f"its process ended {how}{cause}: {words[-1000:]}"
        return f"its process ended {how}{cause}"


def worker_command(folder: Path) -> list[str]:
    """Return the command that starts a worker."""
    return [sys.executable, "-P", "-m", "vitcompress.sweep.worker", str(folder)]
