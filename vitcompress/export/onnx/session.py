"""Run an ONNX file in onnxruntime and report what it was optimised into; a program of its own.

Usage: ``python -P session.py MODEL IMAGES.npy RESULTS.npz``. Prints one line of JSON. Imports
neither torch nor the rest of this package, so it starts quickly.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime


def main(model: str, images_file: str, results_file: str) -> None:
    """Run the model on all images and on the first alone; write both results."""
    images = np.load(images_file, allow_pickle=False)
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
    everything = session.run([output], {feed: images})[0]
    first = session.run([output], {feed: images[:1]})[0]
    np.savez(results_file, all=everything, first=first)
    facts = {
        "runtime": f"onnxruntime {onnxruntime.__version__} CPU",
        "nodes": listed,
        "ops": Counter(op for op, _ in listed),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
