"""The two real models: float accuracy through capture, and what W8A8 keeps.

On demand (``pytest -m accuracy``): minutes, and images that are not part of the repository.
"""

import os
from pathlib import Path

import pytest
import torch

import calib
import vitcompress
from vitcompress.evaluate import evaluate, onnx_predictor

ASSETS = Path(os.environ.get("VITCOMPRESS_ASSETS", "../shared/assets"))

pytestmark = [
    pytest.mark.accuracy,
    pytest.mark.slow,
    pytest.mark.skipif(not ASSETS.is_dir(), reason="real models and images are absent"),
]

#: Share of the resized edge kept, float top-1, and most that W8A8 may lose, in points.
MODELS = {
    "vit_tiny_patch16_224": (0.9, 88.2, 3.0),
    "deit_tiny_patch16_224": (0.875, 84.2, 0.7),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    name = request.param
    crop, top1, most = MODELS[name]
    loaded = vitcompress.load_model(
        ASSETS / "models" / f"{name}.safetensors", arch=f"timm/{name}"
    )
    fields = {**loaded.preprocessing.to_dict(), "crop_fraction": crop}
    preprocessing = calib.Preprocessing.from_dict(fields)
    source = calib.open_source(
        ASSETS / "images" / "train", samples=32, preprocessing=preprocessing
    )
    labelled = calib.open_source(
        ASSETS / "images" / "eval" / "labels.csv", preprocessing=preprocessing
    )
    return loaded, source, labelled, top1, most


def test_w8a8_executed_keeps_the_accuracy(case, tmp_path):
    loaded, source, labelled, top1, most = case
    reference = vitcompress.capture(loaded.module, torch.zeros(2, 3, 224, 224))

    compressed = vitcompress.quantize(reference, bits=8, source=source)
    result = compressed.export_onnx(tmp_path / "model.onnx")

    simulated = evaluate(compressed, labelled, reference=reference.logits)
    executed = evaluate(
        onnx_predictor(tmp_path / "model.onnx"), labelled, reference=compressed
    )
    assert simulated.reference_top1_percent == pytest.approx(top1, abs=0.1)
    assert simulated.top1_drop_pp <= most
    # Patches, head; query, key, value, proj, fc1 and fc2 of twelve blocks.
    assert result.verification.integer_linears == result.verification.linears == 2 + 12 * 6
    assert result.verification.code_mismatch < 1e-4
    assert result.size_bytes <= 7_000_000
    # Two correct runs differ like two draws of the rounding noise; see the README.
    assert executed.agreement_percent >= 98.0
