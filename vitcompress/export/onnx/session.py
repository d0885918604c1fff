"""Run an ONNX file in onnxruntime and report what it was optimised into; a program of its own.

Usage: ``python -P session.py MODEL IMAGES.npy RESULTS.npz NAMES.json``. Prints one line of
JSON. Imports neither torch nor the rest of this package, so it starts quickly.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

#: Batches whose codes are kept: they take as much memory as all activations together.
STEP_BATCHES = (1, 2)


def main(model: str, images_file: str, results_file: str, names_file: str) -> None:
    """Run all images, then a few, alone and together, with the named values kept as well."""
    images = np.load(images_file, allow_pickle=False)
    kept = json.loads(Path(names_file).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(optimised)
        session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        nodes = onnx.load(optimised, load_external_data=False).graph.node
        listed = [(node.op_type, node.name) for node in nodes]
    names = [output.name for output in session.get_outputs()]
    output = "logits" if "logits" in names else names[0]
    feed = session.get_inputs()[0].name
    fixed = session.get_inputs()[0].shape[0]
    whole = fixed if isinstance(fixed, int) else len(images)
    images = images[np.arange(-(-len(images) // whole) * whole) % len(images)]
    everything = [
        session.run([output], {feed: images[start : start + whole]})[0]
        for start in range(0, len(images), whole)
    ]
    stepping = _with_outputs(model, kept)
    batches = (fixed,) if isinstance(fixed, int) else STEP_BATCHES
    arrays = {
        f"batch_{batch}_{index}": value
        for batch in batches
        for index, value in enumerate(stepping.run([*names, *kept], {feed: images[:batch]}))
    }
    np.savez(results_file, all=np.concatenate(everything), **arrays)
    facts = {
        "batches": batches,
        "runtime": f"onnxruntime {onnxruntime.__version__} CPU",
        "nodes": listed,
        "ops": Counter(op for op, _ in listed),
    }
    print(json.dumps(facts))


def _with_outputs(model: str, names: list[str]) -> onnxruntime.InferenceSession:
    """Return a session of the same file that also gives the named values."""
    content = onnx.load(model)
    for name in names:
        content.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        content.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
