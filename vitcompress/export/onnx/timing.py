"""Time ONNX files beside each other; a program of its own.

Usage: ``python -P timing.py JOB.json``. Prints one line of JSON. Imports neither torch nor the
rest of this package: only the runtime's threads are here.

The job names ``runtime``, ``files`` (path by name), ``bfloat16`` (names of those to run at
that precision), ``shape`` of the images, ``threads``, ``rounds`` and ``seed``. In every round
each file has one turn, in an order drawn anew: what slows the machine down for a while then
meets all of them. A turn is one untimed run, since the others have just taken the caches, and
then a burst of timed ones; the figures are means over the burst, and all threads count as CPU
time.

Threads of a session wait for work by spinning, within a run and for a while after it. Within
a run that is left as users have it by default. After a run it is stopped
(``session.force_spinning_stop``), or the threads of one file would take the processors from
the next and be counted as its CPU time. OpenVINO has no such switch; its threads sleep soon.

OpenVINO computes in bfloat16 by default where the processor can; it is held to float32, or the
float32 reference would be none. Where the processor cannot, a run in bfloat16 is left out. A
network is given the shape of the images before it is compiled, as its users do.
"""

import gc
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

WARM_UP_RUNS = 3
#: How long a burst should last; a slow file is run once all the same.
BURST_SECONDS = 0.1
MOST_RUNS = 100

Run = Callable[[], Any]


def main(job_file: str) -> None:
    """Time all files of a job, or say which of them does not run and why."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    rng = np.random.default_rng(job["seed"])
    images = rng.standard_normal(job["shape"], dtype=np.float32)
    runtime = RUNTIMES[job["runtime"]]()
    half, reason = job["bfloat16"], runtime.without_bfloat16
    left_out = dict.fromkeys(half, reason) if reason else {}
    ops: dict[str, dict[str, int]] = {}
    runs: dict[str, Run] = {}
    lengths: dict[str, int] = {}
    for name, path in job["files"].items():
        if name in left_out:
            continue
        try:
            opened = runtime.open(path, job["threads"], images, bfloat16=name in half)
            runs[name], ops[name] = opened
            lengths[name] = _burst_length(runs[name])
        except Exception as error:  # the runtimes' exception types are not public
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            print(json.dumps({"failed": name, "reason": reason}))
            return
    gc.collect()
    gc.disable()
    order = random.Random(job["seed"])
    rounds = []
    for _ in range(job["rounds"]):
        names = order.sample(list(runs), len(runs))
        rounds.append([(name, *_burst(runs[name], lengths[name])) for name in names])
    versions = {
        "python": sys.version.split()[0],
        **runtime.versions,
        "numpy": np.__version__,
    }
    facts = {
        "runtime": runtime.label,
        "versions": versions,
        "left_out": left_out,
        "ops": ops,
        "rounds": rounds,
    }
    print(json.dumps(facts))


class _Onnxruntime:
    """onnxruntime on the CPU.

    Attributes:
        without_bfloat16: Why it does not run files in bfloat16; empty if it does.
    """

    without_bfloat16 = (
        "onnxruntime's CPU provider has no faster run in bfloat16 or float16 (on x86 it casts "
        "both to float32)"
    )

    def __init__(self) -> None:
        self.label = f"onnxruntime {onnxruntime.__version__} CPU"
        self.versions = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}

    def open(
        self, path: str, threads: int, images: Any, *, bfloat16: bool
    ) -> tuple[Run, dict[str, int]]:
        """Return what runs a file once, and the operators of its optimised graph by type."""
        with tempfile.TemporaryDirectory() as folder:
            # In a session of its own, so that the timed one writes nothing.
            optimised = Path(folder) / "optimised.onnx"
            self._session(path, 1, optimised)
            nodes = onnx.load(optimised, load_external_data=False).graph.node
            ops = Counter(node.op_type for node in nodes)
        session = self._session(path, threads)
        (feed,) = session.get_inputs()
        fed = {feed.name: images}
        return lambda: session.run(None, fed), ops

    def _session(
        self, path: str, threads: int, optimised: Path | None = None
    ) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors arrive as exceptions
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if optimised is not None:
            options.optimized_model_filepath = str(optimised)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class _OpenVino:
    """OpenVINO on the CPU; attributes as of ``_Onnxruntime``."""

    def __init__(self) -> None:
        import openvino

        version = openvino.__version__.partition("-")[0]
        self.core = openvino.Core()
        self.label = f"OpenVINO {version} CPU"
        self.versions = {"openvino": version}
        native = "BF16" in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.without_bfloat16 = "" if native else "OpenVINO finds no bfloat16 units here"

    def open(
        self, path: str, threads: int, images: Any, *, bfloat16: bool
    ) -> tuple[Run, dict[str, int]]:
        """Return what runs a file once, and its compiled operators by type and kernel."""
        model = self.core.read_model(path)
        model.reshape(images.shape)
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
        }
        compiled = self.core.compile_model(model, "CPU", settings)
        ops: Counter[str] = Counter()
        for node in compiled.get_runtime_model().get_ops():
            facts = node.get_rt_info()
            # By the kernel's own suffix: "runtimePrecision" says i8 of a float kernel as well,
            # where only the weights are stored so.
            precision = str(facts["primitiveType"].value).rpartition("_")[2].lower()
            ops[f"{facts['layerType'].value} {precision}"] += 1
        request = compiled.create_infer_request()
        return lambda: request.infer([images]), ops


RUNTIMES: dict[str, type[_Onnxruntime] | type[_OpenVino]] = {
    "ort": _Onnxruntime,
    "openvino": _OpenVino,
}


def _burst_length(run: Run) -> int:
    """Return how many runs take about as long as a burst should."""
    for _ in range(WARM_UP_RUNS - 1):
        run()
    started = time.perf_counter()
    run()
    seconds = max(time.perf_counter() - started, 1e-9)
    return min(max(math.ceil(BURST_SECONDS / seconds), 1), MOST_RUNS)


def _burst(run: Run, length: int) -> tuple[float, float]:
    """Return wall and CPU milliseconds of one run, as means over a burst."""
    run()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(length):
        run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return 1e3 * wall / length, 1e3 * cpu / length


if __name__ == "__main__":
    main(*sys.argv[1:])
