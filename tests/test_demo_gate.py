"""The library's own gate: the embedded model at five widths, held to a committed baseline.

``python tests/test_demo_gate.py`` writes the baseline anew; look at the difference before
committing it. Outcomes may differ by an image or two between processors, since rounding does.
"""

import hashlib
from pathlib import Path

import pytest
import torch

import calib
from vitcompress import api
from vitcompress.demo import WEIGHTS_PATH, load_digits, load_model
from vitcompress.engine import LocalEngine
from vitcompress.gate import judge, read_baseline, update_baseline
from vitcompress.graph import Role, capture
from vitcompress.models.identity import computing_versions
from vitcompress.numerics.affine import dequantize_affine
from vitcompress.passes.attach import AttachRule
from vitcompress.quantizers import affine
from vitcompress.recipe import Scheme, load_recipe
from vitcompress.result import ImageSet, Origin, Outcomes, Result

BASELINE = Path(__file__).parent / "golden" / "demo-baseline.yaml"
RECIPES = {
    "W8A8": "deploy",
    "W6A6": "repq_vit",
    "W4A4": "repq_vit",
    "W3A3": "repq_vit",
    "W4A8": "fast",  # what users get who name no recipe
}


class Demo:
    """The float model, its images, and results of it."""

    def __init__(self):
        # Tensors this small gain nothing from a second thread.
        torch.set_num_threads(1)
        self.calibration = calib.TensorSource(*load_digits("train"), samples=32, seed=0)
        self.held_out = calib.TensorSource(*load_digits("test"), batch_size=600)
        (batch,) = self.held_out
        self.images, self.labels = batch.images, batch.labels
        self.graph = capture(load_model(), self.images[:2], model_id="vitcompress/digits_vit")
        # Of the file: a new version of torch prints modules differently.
        self.digest = hashlib.sha256(WEIGHTS_PATH.read_bytes()).hexdigest()
        self.evaluation = ImageSet.of(self.held_out)
        self.reference = self.logits(self.graph)

    def logits(self, graph):
        with torch.no_grad():
            return graph.logits(self.images)

    def result(self, scheme):
        """Return what quantization at a width gives."""
        recipe = load_recipe(RECIPES[scheme], scheme=Scheme.parse(scheme))
        compressed = api.compress(
            recipe,
            self.graph,
            self.calibration,
            engine=LocalEngine(),
            model_digest=self.digest,
        )
        origin = Origin(
            model="vitcompress/digits_vit",
            model_digest=self.digest,
            recipe=recipe.name,
            scheme=scheme,
            resolved_recipe=recipe.to_yaml(),
            seed=recipe.seed,
            calibration=ImageSet.of(self.calibration),
            evaluation=self.evaluation,
            versions=computing_versions(),
        )
        logits = self.logits(compressed.graph)
        return Result(
            origin=origin,
            execution="simulated",
            outcomes=Outcomes.of(logits, self.reference, self.labels),
            report=compressed.report,
            seconds=0.0,
        )


@pytest.fixture(scope="module")
def demo():
    return Demo()


def failures(demo, scheme):
    """Return the metrics by which the gate fails, with their verdicts."""
    report = judge([demo.result(scheme)], read_baseline(BASELINE), complete=False)
    (cell,) = report.cells
    assert report.passed == (not any(metric.failed for metric in cell.metrics))
    return {metric.metric: metric.verdict for metric in cell.metrics if metric.failed}


def test_baseline_limits_five_widths():
    cells = read_baseline(BASELINE).cells()

    assert [name.scheme for name in cells] == list(RECIPES)
    assert all(list(cell.limits) == ["top1", "agreement", "size"] for cell in cells.values())


@pytest.mark.parametrize("scheme", RECIPES)
def test_figures_have_not_moved(demo, scheme):
    assert failures(demo, scheme) == {}


def test_rounding_down_is_caught(demo, monkeypatch):
    def floor(x, scale, zero_point, *, qmin, qmax):
        return torch.clamp(torch.floor(x / scale) + zero_point, qmin, qmax)

    monkeypatch.setattr(affine, "quantize_affine", floor)

    assert failures(demo, "W3A3") == {"top1": "regressed", "agreement": "regressed"}


def test_zero_point_off_by_one_is_caught(demo, monkeypatch):
    """Whoever decodes takes another zero point than whoever encoded."""

    def shifted(codes, scale, zero_point):
        return dequantize_affine(codes, scale, zero_point + 1)

    monkeypatch.setattr(affine, "dequantize_affine", shifted)

    assert failures(demo, "W3A3") == {"top1": "regressed", "agreement": "regressed"}


def test_weights_of_one_block_left_in_float_are_caught(demo, monkeypatch):
    """Accuracy says nothing, if it is not better: the size does."""
    matches = AttachRule.matches

    def forgetful(rule, site):
        left = site.role is Role.WEIGHT and site.name.startswith("blocks.2.")
        return matches(rule, site) and not left

    monkeypatch.setattr(AttachRule, "matches", forgetful)

    assert failures(demo, "W4A4") == {"size": "regressed"}


if __name__ == "__main__":
    made = Demo()
    for name, done in update_baseline(BASELINE, [made.result(s) for s in RECIPES]).items():
        print(f"{name}: {done}")
