"""A run that was stopped goes on where it was, and ends in the same bits."""

import json

import pytest
import torch
from tiny import images, make_source

from vitcompress.engine import LocalEngine, run_recipe
from vitcompress.engine.checkpoint import Checkpoint, StageCheckpoint, digest_of
from vitcompress.errors import ConfigError, InputError
from vitcompress.passes.blocks import BlockOutcome
from vitcompress.passes.training import descend
from vitcompress.recipe import Recipe

IDENTITY = {"recipe": "a", "model": "b"}


def recipe(**settings):
    rules = [
        {"roles": ["weight"], "bits": 3, "granularity": "per_channel"},
        {"roles": ["norm_output", "act_output", "head_input", "patch_input"], "bits": 4},
    ]
    steps = [
        {"pass": "attach", "rules": rules},
        {"pass": "calibrate", "method": "minmax"},
        {"pass": "reconstruct", "iterations": 4, "batch_size": 4, "device": "cpu", **settings},
        {"pass": "freeze"},
    ]
    return Recipe.from_dict({"schema": 1, "name": "test", "scheme": "W3A4", "passes": steps})


@pytest.fixture(scope="module")
def run(vit_graph):
    def run(folder=None, seed=1, graph=vit_graph, **settings):
        source = make_source(images(8, seed=seed))
        chosen = recipe(**settings)
        stored = None if folder is None else Checkpoint.of_run(folder, chosen, graph, source)
        return run_recipe(chosen, graph, source, LocalEngine(stored))

    return run


def bits_of(graph):
    found = dict(graph.tensors())
    for target, quantizer in graph.quantizers().items():
        found.update(
            {f"{target}.{n}": getattr(quantizer, n) for n in quantizer.parameter_names}
        )
    return found


def assert_same(graph, other):
    expected = bits_of(other)
    assert bits_of(graph).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in bits_of(graph).items())


class StoppedError(Exception):
    pass


@pytest.fixture
def stopping(monkeypatch):
    """Stop a run in the middle of the block of the given number."""

    def stop_at(number):
        begun = 0

        def stopped(task, *arguments):
            nonlocal begun
            begun += 1
            if begun == number:
                raise StoppedError
            return descend(task, *arguments)

        monkeypatch.setattr("vitcompress.passes.training.descend", stopped)

    return stop_at


@pytest.mark.parametrize("block", [1, 3])
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    run, stopping, monkeypatch, tmp_path, block
):
    unbroken, records = run()
    stopping(block)
    with pytest.raises(StoppedError):
        run(tmp_path / "kept")
    finished = sorted(path.name for path in (tmp_path / "kept").glob("*.safetensors"))

    stopping(99)
    resumed, found = run(tmp_path / "kept")

    assert finished == [f"00-{number:03d}.safetensors" for number in range(block - 1)]
    assert_same(resumed, unbroken)
    figures = [r.report.details["blocks"] for r in (records[2], found[2])]
    for path, entry in figures[0].items():
        again = figures[1][path]
        assert {**entry, "seconds": 0} == {**again, "seconds": 0}


def test_a_finished_run_is_read_and_not_repeated(run, stopping, tmp_path):
    first, _ = run(tmp_path / "kept")

    stopping(1)
    again, _ = run(tmp_path / "kept")

    assert_same(again, first)


def test_a_checkpoint_changes_nothing(run, tmp_path):
    assert_same(run(tmp_path / "kept")[0], run()[0])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"iterations": 5}, "its recipe differs"),
        ({"seed": 2}, "its images differs"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(run, tmp_path, changed, reason):
    run(tmp_path / "kept")

    with pytest.raises(ConfigError, match=f"kept: is the checkpoint of another run: {reason}"):
        run(tmp_path / "kept", **changed)


def test_a_checkpoint_of_another_model_is_refused(run, vit_graph, tmp_path):
    run(tmp_path / "kept")
    other = vit_graph.clone()
    other.set_parameter("head.bias", other.parameter("head.bias") + 1.0)

    with pytest.raises(ConfigError, match="its model differs; name another directory"):
        run(tmp_path / "kept", graph=other)


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(ConfigError, match="holds files that are no checkpoint; name another"):
        Checkpoint(tmp_path, IDENTITY)

    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "kept").write_text("mine")

    with pytest.raises(ConfigError, match="holds files that are no checkpoint"):
        Checkpoint(tmp_path / "kept", IDENTITY)


def test_a_damaged_description_says_what_to_delete(tmp_path):
    Checkpoint(tmp_path / "kept", IDENTITY)
    (tmp_path / "kept" / "run.json").write_text("{")

    with pytest.raises(InputError, match=r"run\.json: cannot be read: .*; delete .*kept"):
        Checkpoint(tmp_path / "kept", IDENTITY)


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path):
    Checkpoint(tmp_path / "kept", IDENTITY)
    path = tmp_path / "kept" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))

    with pytest.raises(ConfigError, match="format 2; this version reads 1"):
        Checkpoint(tmp_path / "kept", IDENTITY)


def test_an_outcome_survives_its_file(tmp_path):
    stage = StageCheckpoint(tmp_path, 0)
    outcome = BlockOutcome(
        tensors={"blocks.0.fc1.weight": torch.randn(3, 2)},
        quantizers={
            "quantizers.a": {"scale": torch.tensor(0.5), "zero_point": torch.zeros(2)}
        },
        details={"loss_last": 0.25, "held_out_after": None, "untrained": {"a": "why"}},
    )

    stage.write(3, outcome)
    found = stage.read(3)

    assert found.details == outcome.details
    assert torch.equal(found.tensors["blocks.0.fc1.weight"], *outcome.tensors.values())
    assert found.quantizers["quantizers.a"]["scale"].item() == 0.5
    assert found.quantizers["quantizers.a"]["zero_point"].shape == (2,)
    assert stage.read(4) is None


def test_a_damaged_block_says_so(tmp_path):
    StageCheckpoint(tmp_path, 0).write(0, BlockOutcome(tensors={"a": torch.zeros(3)}))
    path = tmp_path / "00-000.safetensors"
    path.write_bytes(path.read_bytes()[:-4])

    with pytest.raises(
        InputError, match=r"00-000\.safetensors: cannot be read: .*; delete it"
    ):
        StageCheckpoint(tmp_path, 0).read(0)


def test_walks_of_one_run_have_files_of_their_own(tmp_path):
    checkpoint = Checkpoint(tmp_path / "kept", IDENTITY)
    first, second = checkpoint.stage(), checkpoint.stage()

    first.write(0, BlockOutcome(details={"walk": 1}))

    assert second.read(0) is None
    again = Checkpoint(tmp_path / "kept", IDENTITY)
    assert again.stage().read(0).details == {"walk": 1}


def test_the_digest_of_a_graph_sees_values_and_operations(vit_graph):
    changed, shorter = vit_graph.clone(), vit_graph.clone()
    changed.set_parameter("head.bias", vit_graph.parameter("head.bias") + 1e-6)
    shorter.graph.find_nodes(op="get_attr", target="head.bias")[0].target = "blocks.0.fc2.bias"

    assert digest_of(vit_graph) == digest_of(vit_graph.clone())
    assert len({digest_of(graph) for graph in (vit_graph, changed, shorter)}) == 3
