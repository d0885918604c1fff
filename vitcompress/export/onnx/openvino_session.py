"""Run an ONNX file in OpenVINO and report what it was compiled into; a program of its own.

Usage: ``python -P openvino_session.py MODEL IMAGES.npy RESULTS.npz NAMES.json [IR.xml]``.
Prints one line of JSON, as ``session.py`` does. Imports neither torch nor the rest of this
package. OpenVINO computes in bfloat16 by default where the processor can; it is held to
float32, or rounding would hide errors.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

#: Batches whose codes are kept: they take as much memory as all activations together.
STEP_BATCHES = (1, 2)
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32"}


def main(
    model: str, images_file: str, results_file: str, names_file: str, ir_file: str = ""
) -> None:
    """Run all images, then a few, alone and together, with the named values kept as well."""
    import openvino  # an extra

    images = np.load(images_file, allow_pickle=False)
    kept = json.loads(Path(names_file).read_text(encoding="utf-8"))
    core = openvino.Core()
    if ir_file:
        openvino.save_model(core.read_model(model), ir_file, compress_to_fp16=False)
    extent = core.read_model(model).inputs[0].partial_shape[0]
    fixed = extent.get_length() if extent.is_static else None
    whole = fixed or len(images)
    images = images[np.arange(-(-len(images) // whole) * whole) % len(images)]
    compiled = _compiled(core, ir_file or model, images[:whole])
    named = [output.get_names() for output in compiled.outputs]
    output = next((i for i, names in enumerate(named) if "logits" in names), 0)
    everything = [
        np.array(compiled(images[start : start + whole])[output])
        for start in range(0, len(images), whole)
    ]
    arrays = {}
    batches = (fixed,) if fixed else STEP_BATCHES
    for batch in batches:
        stepping = _compiled(core, ir_file or model, images[:batch], kept)
        found = stepping(images[:batch])
        values = [found[index] for index in range(len(named))]
        values += [found[stepping.output(name)] for name in kept]
        arrays.update({f"batch_{batch}_{i}": value for i, value in enumerate(values)})
    np.savez(results_file, all=np.concatenate(everything), **arrays)
    nodes, ops = [], Counter[str]()
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        # By the kernel's own suffix: "runtimePrecision" says i8 of a float kernel as well,
        # where only the weights are stored so.
        precision = str(facts["primitiveType"].value).rpartition("_")[2].lower()
        op = f"{facts['layerType'].value} {precision}"
        ops[op] += 1
        origins = str(facts["originalLayersNames"].value).split(",")
        nodes += [(op, name) for name in origins if name]
    version = openvino.__version__.partition("-")[0]
    print(
        json.dumps(
            {
                "batches": batches,
                "runtime": f"OpenVINO {version} CPU (f32)",
                "nodes": nodes,
                "ops": ops,
            }
        )
    )


def _compiled(core: Any, model: str, images: Any, kept: list[str] | None = None) -> Any:
    """Return a compiled model of this batch that also gives the named values."""
    read = core.read_model(model)
    if kept:
        read.add_outputs(kept)
    read.reshape(images.shape)
    return core.compile_model(read, "CPU", SETTINGS)


if __name__ == "__main__":
    main(*sys.argv[1:])
