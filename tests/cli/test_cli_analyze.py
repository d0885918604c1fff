"""``vitcompress analyze``: tables, the file, and what users get wrong."""

import pytest
import torch
from finished import TINY
from safetensors.torch import save_file
from tiny import images

from vitcompress import api
from vitcompress.analyze import measuring, read_analysis


@pytest.fixture
def captured(monkeypatch, vit_graph, tmp_path):
    """Spare a test the capture; leave it images."""
    monkeypatch.setattr(api, "capture", lambda *_, **__: vit_graph)
    save_file({"images": images(8)}, tmp_path / "train.safetensors")
    labelled = {"images": images(12, seed=5), "labels": torch.arange(12) % 10}
    save_file(labelled, tmp_path / "eval.safetensors")


COMMON = (*TINY, "--recipe", "repq_vit", "--calib", "train.safetensors", "--samples", 4)


def test_layers_are_ranked_printed_and_written(vitcompress, captured, tmp_path):
    found = vitcompress(
        *("analyze", *COMMON, "--by", "layer", "--eval", "eval.safetensors"),
        *("--eval-samples", 6, "--json", "out/analysis.json"),
    )

    assert (found.code, found.err) == (0, "")
    analysis = read_analysis(tmp_path / "out" / "analysis.json")
    assert (analysis.by, analysis.mode, analysis.scheme) == ("layer", "only", "W4A4")
    assert len(analysis.images.ids) == 6
    assert analysis.command.startswith("vitcompress analyze tiny:tiny_vit")
    for words in (
        "layers quantized alone, most harmful first",
        analysis.entries[0].unit,
        "place",
        "all quantizers on: mean KL",
        "no quantizers on: mean KL",
        "6 images (6 of 12 images, tensors",
    ):
        assert words in found.out
    assert "not measured" not in found.out


def test_what_the_budget_did_not_reach_is_counted(vitcompress, captured, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(clock)))

    found = vitcompress("analyze", *COMMON, "--mode", "except", "--budget", 24)

    assert found.code == 0
    assert "blocks left in float, the rest quantized, most harmful first" in found.out
    assert "sites not measured within 24 s" in found.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--mode", "both"), 2, "mode: expected one of ['only', 'except'], got 'both'"),
        (("--by", "head"), 2, "by: expected one of ['block', 'layer', 'site'], got 'head'"),
        (("--budget", "-1"), 2, "budget: expected seconds above 0, got -1"),
        (("--recipe", "deplay"), 2, "did you mean 'deploy'?"),
        (("--json", "."), 2, "is a directory; name a file in it"),
        (("--eval", "nowhere"), 5, "found nothing"),
        (("--eval-samples", "0"), 2, "Invalid value for '--eval-samples'"),
    ],
)
def test_mistake_is_one_line_and_leaves_nothing(refused, captured, arguments, code, words):
    assert words in refused(code, "analyze", *COMMON, *arguments)
