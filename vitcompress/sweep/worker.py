"""A process that computes cells: ``python -m vitcompress.sweep.worker FOLDER``.

Takes a line of JSON for each cell on standard input and answers with one on standard output.
It ends, whatever it is doing, when its input is closed: that is how it outlives no sweep, even
one that was killed.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch

from vitcompress.engine.memory import high_water_mark
from vitcompress.errors import VitcompressError
from vitcompress.result import Origin, Result
from vitcompress.sweep.bench import Bench, peak_bytes

__all__ = ["answer", "main"]


def main(folder: str) -> None:
    """Compute cells until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep decides what an interrupt means
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    # Whatever a library prints goes to the log; answers keep the pipe to themselves.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        # One thread, so that results do not depend on how many cells run side by side.
        torch.set_num_threads(1)
        bench = Bench(Path(folder))
        while True:
            request = json.loads(requests.get())
            print(json.dumps(answer(bench, **request)), file=answers, flush=True)


def answer(bench: Bench, origin: dict[str, Any], command: str | None) -> dict[str, Any]:
    """Return what became of a cell as JSON types: a result or an error, and its memory."""
    result: Result | None = None
    error = ""
    try:
        result = bench.compute(Origin.model_validate(origin), command)
    except VitcompressError as failure:
        error = str(failure)
    except Exception:  # whatever it is, the other cells are not to be lost
        error = f"internal error; please report it\n{traceback.format_exc()}"
    return {
        "result": None if result is None else result.to_json(),
        "error": error,
        "peak_bytes": max(
            high_water_mark(), 0 if result is None else peak_bytes(result.report)
        ),
    }


def _listen(requests: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
