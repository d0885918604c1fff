"""Grids, keys, directories and what is kept; cells are computed in this process."""

import fcntl
import json
import shutil

import pytest
import torch
from sweeping import BROKEN, QUICK, InProcess, calibration, essence, essences, evaluation
from tiny import TinyViT, enliven, images

import calib
import vitcompress
from vitcompress import api
from vitcompress.engine import LocalEngine
from vitcompress.errors import ConfigError, InputError
from vitcompress.evaluate import evaluate
from vitcompress.recipe import Scheme, load_recipe
from vitcompress.result import read_result
from vitcompress.sweep import grid, read_sweep, run, shared
from vitcompress.sweep.bench import Bench
from vitcompress.sweep.grid import parse_schemes, parse_seeds, planned_recipes

GRID = {"schemes": "W8A8,W4A4", "seeds": "0..1"}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Files of a quick recipe and of one that fails."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, text in (("quick", QUICK), ("broken", BROKEN)):
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture
def cells(monkeypatch):
    """What computes cells: in this process, and countable."""
    found = InProcess()
    monkeypatch.setattr(run, "map_cells", lambda *a, **k: found(*a, **k))
    return found


@pytest.fixture
def sweep(cells, vit_graph, recipes):
    """Run a sweep of the tiny model; what it says is kept in ``sweep.said``."""

    def sweep(folder, **settings):
        settings = {
            "recipes": [recipes / "quick.yaml"],
            "evaluation": evaluation(),
            "calibration": calibration,
            **GRID,
            **settings,
        }
        model = settings.pop("model", vit_graph)
        return vitcompress.sweep(model, folder, say=sweep.said.append, **settings)

    sweep.said = []
    return sweep


@pytest.fixture(scope="module")
def finished(vit_graph, recipes, tmp_path_factory):
    """A finished sweep. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("finished") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "map_cells", InProcess())
        return vitcompress.sweep(
            vit_graph,
            folder,
            recipes=[recipes / "quick.yaml"],
            evaluation=evaluation(),
            calibration=calibration,
            command="vitcompress sweep",
            say=lambda line: None,
            **GRID,
        )


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished sweep's directory."""
    return shutil.copytree(finished.folder, tmp_path / "sweep")


# Cells


def test_every_cell_is_a_file_under_the_key_of_its_origin(finished):
    grid = [(cell.recipe, cell.scheme, cell.seed) for cell in finished.index.cells]

    assert grid == [
        ("quick", "W8A8", 0),
        ("quick", "W4A4", 0),
        ("quick", "W8A8", 1),
        ("quick", "W4A4", 1),
    ]
    assert list(finished.results) == [cell.key for cell in finished.index.cells]
    for key, result in finished.results.items():
        assert result.origin.key() == key
        assert read_result(finished.folder / "cells" / f"{key}.json") == result
    assert finished.computed == tuple(finished.results)
    assert finished.failures == {}
    assert {path.name for path in finished.folder.iterdir()} == {
        *("sweep.json", "cells", "reference", ".sweep-lock"),
    }


def test_cell_says_what_quantize_and_evaluate_say(finished, vit_graph, recipes):
    result = list(finished.results.values())[3]
    recipe = load_recipe(recipes / "quick.yaml", scheme=Scheme(4, 4), overrides=("seed=1",))

    model = api.quantize(vit_graph, recipe=recipe, source=calibration(1))
    entry = evaluate(model, evaluation(), reference=vit_graph.logits)

    clockless = {"seconds": 0.0}
    assert result.report.evaluations[1].model_copy(update=clockless) == entry.model_copy(
        update=clockless
    )
    found = model(torch.cat([batch.images for batch in evaluation()]))
    assert result.outcomes.predictions == tuple(found.argmax(dim=-1).tolist())
    assert result.outcomes.labels == tuple(n % 10 for n in range(24))
    assert sum(result.outcomes.kl) / 24 == pytest.approx(entry.mean_kl)
    hits = [hit for hit in result.outcomes.in_top5 if hit]
    assert 100 * len(hits) / 24 == pytest.approx(entry.top5_percent)
    assert result.report.sites == model.report.sites
    assert result.report.size == model.report.size


def test_cell_records_where_it_comes_from(finished):
    first, _, second, _ = finished.results.values()
    origin, protocol = first.origin, first.report.protocol

    assert (origin.model, origin.scheme, origin.seed) == ("tiny", "W8A8", 0)
    assert origin.calibration.ids == tuple(calibration(0).sample_ids)
    assert origin.calibration.digest == calibration(0).digest()
    assert second.origin.calibration.ids == tuple(calibration(1).sample_ids)
    assert second.origin.calibration.ids != origin.calibration.ids
    assert {"torch", "numpy", "vitcompress_source"} <= set(origin.versions)
    assert "bits: 8" in origin.resolved_recipe
    assert protocol.model_digest == origin.model_digest == finished.index.model_digest
    assert protocol.resolved_recipe == origin.resolved_recipe
    assert protocol.source_digest == origin.calibration.digest
    assert protocol.sample_ids == origin.calibration.ids
    assert protocol.command == first.command == "vitcompress sweep"
    assert origin.evaluation.digest == evaluation().digest()


def test_index_holds_the_float_model_on_the_same_images(finished, vit_graph):
    logits = vit_graph.logits(torch.cat([batch.images for batch in evaluation()]))

    reference = finished.index.reference

    assert reference.predictions == tuple(logits.argmax(dim=-1).tolist())
    assert reference.kl == (0.0,) * 24
    assert finished.index.float_bytes == sum(
        4 * tensor.numel() for tensor in vit_graph.tensors().values()
    )
    for result in finished.results.values():
        assert result.outcomes.reference_predictions == reference.predictions


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": "0"},
        {"scheme": "W2A2"},
        {"resolved_recipe": "x"},
        {"seed": 9},
        {"versions": {"torch": "0"}},
    ],
)
def test_key_changes_with_whatever_decides_a_result(finished, change):
    origin = next(iter(finished.results.values())).origin

    assert origin.model_copy(update=change).key() != origin.key()


@pytest.mark.parametrize("which", ["calibration", "evaluation"])
def test_key_changes_with_the_images(finished, which):
    origin = next(iter(finished.results.values())).origin
    other = getattr(origin, which).model_copy(update={"digest": "0"})

    assert origin.model_copy(update={which: other}).key() != origin.key()


# Kept, resumed, computed again


def test_finished_sweep_is_not_computed_again(sweep, cells, folder, finished, monkeypatch):
    monkeypatch.setattr(api, "captured", lambda *_: pytest.fail("captured"))
    monkeypatch.setattr(shared.SharedFiles, "write_images", lambda *_: pytest.fail("decoded"))
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}

    again = sweep(folder)

    assert cells.computed == []
    assert again.computed == ()
    assert again.results == finished.results
    assert {p: p.stat().st_mtime_ns for p in (folder / "cells").iterdir()} == stamps
    assert "4 cells, 4 there already" in sweep.said


def test_wider_grid_computes_only_what_is_new(sweep, cells, folder, finished, monkeypatch):
    # The float model's logits on the evaluation images are known from the first run.
    monkeypatch.setattr(shared, "evaluate", lambda *_, **__: pytest.fail("float model ran"))

    wider = sweep(folder, schemes="W8A8,W4A4,W6A6")

    assert len(cells.computed) == 2
    assert {wider.results[key].origin.scheme for key in cells.computed} == {"W6A6"}
    assert len(wider.results) == 6
    assert wider.results.items() >= finished.results.items()
    assert read_sweep(folder).index.schemes == ("W8A8", "W4A4", "W6A6")


def test_interrupted_sweep_goes_on_where_it_was(sweep, cells, finished, tmp_path):
    cells.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "sweep")
    before = read_sweep(tmp_path / "sweep")
    cells.stop_after = None

    after = sweep(tmp_path / "sweep")

    assert list(before.results) == list(finished.results)[:3]
    assert cells.computed == list(finished.results)
    assert after.computed == (list(finished.results)[3],)
    assert essences(after) == essences(finished)


def test_what_a_killed_run_left_is_cleared(sweep, folder):
    for name in (".sweep-work/images", ".sweep.json-x", "cells/.k.json-y", "reference/.r-z"):
        (folder / name).mkdir(parents=True)
    (folder / "notes").mkdir()
    (folder / ".hidden").mkdir()

    sweep(folder)

    assert {path.name for path in folder.iterdir()} == {
        *("sweep.json", "cells", "reference", ".sweep-lock", "notes", ".hidden"),
    }
    assert not [p for p in folder.rglob(".*") if p.name not in (".sweep-lock", ".hidden")]


@pytest.mark.parametrize("text", ["", "{", '{"origin": 3}'])
def test_damaged_cell_is_computed_again(sweep, cells, folder, finished, text):
    key = list(finished.results)[1]
    (folder / "cells" / f"{key}.json").write_text(text)

    again = sweep(folder)

    assert cells.computed == [key]
    assert essences(again) == essences(finished)
    assert any(key in line and "computing it again" in line for line in sweep.said)


def test_cell_under_the_name_of_another_is_computed_again(sweep, cells, folder, finished):
    first, second = list(finished.results)[:2]
    shutil.copyfile(folder / "cells" / f"{first}.json", folder / "cells" / f"{second}.json")

    sweep(folder)

    assert cells.computed == [second]


def test_other_evaluation_images_are_other_cells(sweep, cells, folder):
    again = sweep(folder, evaluation=evaluation(16), seeds="0", schemes="W8A8")

    assert len(cells.computed) == 1
    assert len(again.index.reference.labels) == 16


# One failure


def test_failed_cells_are_recorded_and_lose_no_others(sweep, recipes, tmp_path):
    found = sweep(
        tmp_path / "sweep",
        recipes=[recipes / "broken.yaml", recipes / "quick.yaml"],
        schemes="W8A8",
        seeds="0",
    )

    failed, done = [cell.key for cell in found.index.cells]
    assert list(found.results) == [done]
    assert "'nowhere:*' matches none of" in found.failures[failed]
    record = json.loads((tmp_path / "sweep" / "failed" / f"{failed}.json").read_text())
    assert record["origin"]["recipe"] == "broken"
    assert "'nowhere:*' matches none of" in record["error"]
    assert read_sweep(tmp_path / "sweep").failures == found.failures
    assert any("FAILED: passes[0] 'attach'" in line for line in sweep.said)


def test_failed_cell_is_tried_again(sweep, cells, folder, finished, monkeypatch):
    keys = list(finished.results)
    (folder / "cells" / f"{keys[2]}.json").unlink()
    compute = Bench.compute
    monkeypatch.setattr(Bench, "compute", lambda *_: 1 / 0)

    failed = sweep(folder)
    monkeypatch.setattr(Bench, "compute", compute)
    repaired = sweep(folder)

    assert list(failed.failures) == [keys[2]]
    assert "internal error" in failed.failures[keys[2]]
    assert "ZeroDivisionError" in failed.failures[keys[2]]
    assert len(failed.results) == 3
    assert repaired.failures == {}
    assert repaired.computed == (keys[2],)
    assert list((folder / "failed").iterdir()) == []
    assert essences(repaired) == essences(finished)


# What cells share


def test_statistics_of_the_float_model_are_collected_once_for_all_widths(
    sweep, finished, tmp_path, monkeypatch
):
    asked = []
    collect = LocalEngine.collect

    def counted(self, graph, requests, source):
        if requests:
            asked.append(source.digest())
        return collect(self, graph, requests, source)

    monkeypatch.setattr(LocalEngine, "collect", counted)
    found = sweep(tmp_path / "sweep")

    assert asked == [calibration(0).digest(), calibration(1).digest()]
    assert essences(found) == essences(finished)


def test_a_bench_with_memory_computes_what_a_fresh_one_does(
    sweep, tmp_path, recipes, monkeypatch
):
    """``deploy`` folds norms and asks again; what it asks then is no float model's."""

    class Forgetful(InProcess):
        def __call__(self, engine, cells, folder, **settings):
            for cell in cells:
                yield from super().__call__(engine, [cell], folder)

    settings = {"recipes": ["deploy", recipes / "quick.yaml"], "seeds": "0"}
    remembered = sweep(tmp_path / "remembered", **settings)
    monkeypatch.setattr(run, "map_cells", Forgetful())
    fresh = sweep(tmp_path / "fresh", **settings)

    assert len(remembered.results) == 4
    assert essences(remembered) == essences(fresh)


# Models


def test_module_is_swept_with_its_own_digest(sweep, tmp_path):
    model = enliven(TinyViT(depth=1))

    found = sweep(tmp_path / "sweep", model=model, schemes="W8A8", seeds="0")

    assert found.index.model == "TinyViT"
    (result,) = found.results.values()
    assert result.report.model == "TinyViT"
    assert essence(result)["origin"]["model_digest"] == found.index.model_digest


# Images


def test_images_without_labels_give_agreement_only(sweep, tmp_path):
    found = sweep(
        tmp_path / "sweep", evaluation=evaluation(labels=False), schemes="W8A8", seeds="0"
    )

    (result,) = found.results.values()
    assert result.outcomes.labels == (None,) * 24
    assert result.outcomes.in_top5 == (None,) * 24
    assert result.report.evaluations[1].top1_percent is None
    assert result.report.evaluations[1].agreement_percent is not None
    assert "24 evaluation images without labels: agreement only, no accuracy" in sweep.said


def test_label_that_is_no_class_is_refused_before_any_cell(sweep, cells, tmp_path):
    source = calib.TensorSource(images(4), torch.tensor([0, 1, 2, 10]))

    with pytest.raises(InputError, match="label 10 is no class"):
        sweep(tmp_path / "sweep", evaluation=source)

    assert cells.computed == []
    assert not (tmp_path / "sweep").exists()


def test_images_are_stored_as_they_are(tmp_path):
    source, files = evaluation(), shared.SharedFiles(tmp_path)
    described = run.ImageSet.of(source)

    files.write_images(source, described)
    found = files.images(described)

    assert (len(found), found.batch_size, found.sample_ids) == (24, 10, source.sample_ids)
    assert (found.describe(), found.digest()) == (source.describe(), source.digest())
    for ours, theirs in zip(found, source, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.ids == theirs.ids


# Directories


def test_directory_of_another_model_is_refused(sweep, folder):
    before = (folder / "sweep.json").read_bytes()

    with pytest.raises(ConfigError, match="holds a sweep of another model: tiny"):
        sweep(folder, model=enliven(TinyViT(), seed=1))

    assert (folder / "sweep.json").read_bytes() == before


@pytest.mark.parametrize("name", ["photo.jpg", "cells/x.json"])
def test_directory_that_is_no_sweep_is_refused(sweep, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()

    with pytest.raises(ConfigError, match="holds files that are no sweep"):
        sweep(tmp_path)

    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [name.rpartition("/")[2]]


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 1}'])
def test_index_that_is_none_is_refused(sweep, tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)

    with pytest.raises(ConfigError, match=r"sweep\.json: .*choose another directory"):
        sweep(tmp_path)


def test_file_is_no_directory(sweep, tmp_path):
    (tmp_path / "sweep").touch()

    with pytest.raises(ConfigError, match="is a file; name a directory"):
        sweep(tmp_path / "sweep")


def test_two_sweeps_do_not_write_to_one_directory(sweep, folder):
    with (folder / ".sweep-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        with pytest.raises(ConfigError, match="another sweep is writing here"):
            sweep(folder)


def test_reading_wants_a_sweep(tmp_path, folder):
    with pytest.raises(InputError, match=r"holds no sweep\.json"):
        read_sweep(tmp_path)

    text = (folder / "sweep.json").read_text()
    (folder / "sweep.json").write_text(
        text.replace('"schema_version": 1', '"schema_version": 2')
    )
    with pytest.raises(InputError, match="schema_version 2; this version reads 1"):
        read_sweep(folder)


def test_key_in_an_index_is_no_path(folder):
    content = json.loads((folder / "sweep.json").read_text())
    content["cells"][0]["key"] = "../../secret"
    (folder / "sweep.json").write_text(json.dumps(content))

    with pytest.raises(InputError, match=r"cells\.0\.key"):
        read_sweep(folder)


# Grids


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        ("0", (0,)),
        ("0..2", (0, 1, 2)),
        ("3,1,3", (3, 1)),
        ("5..5, 0", (5, 0)),
        ([7, 8], (7, 8)),
    ],
)
def test_seeds_are_numbers_and_inclusive_ranges(seeds, expected):
    assert parse_seeds(seeds) == expected


@pytest.mark.parametrize(
    ("seeds", "reason"),
    [
        ("", "found nothing"),
        ("a", "got 'a'"),
        ("-1", "got '-1'"),
        ("1.5", "got '1.5'"),
        ("0...2", "got '0...2'"),
        ("²", "got '²'"),
        ("2..0", r"2\.\.0 counts down; write 0\.\.2"),
        ("0..99999", "more than 1000 seeds"),
        ("4294967296", "below 2\\^32"),
        ([-1], "got '-1'"),
    ],
)
def test_seeds_of_another_form_are_refused(seeds, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_seeds(seeds)


@pytest.mark.parametrize(
    ("schemes", "reason"),
    [
        ("", "found nothing"),
        ("4W4A", "expected a form like W4A8, got '4W4A'; did you mean 'W4A"),
        ("W8A8,W4A9", "'W4A9': activation bits must be between 2 and 8.*did you mean 'W4A"),
    ],
)
def test_scheme_of_another_form_is_answered_with_the_nearest(schemes, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_schemes(schemes)


def test_recipes_are_known_and_differ_in_name(recipes, tmp_path):
    twin = shutil.copyfile(recipes / "quick.yaml", tmp_path / "twin.yaml")

    for words, reason in (
        ("deplay", "no recipe 'deplay'; did you mean 'deploy'"),
        ("", "found nothing"),
        ([recipes / "quick.yaml", twin], "both called 'quick'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            planned_recipes(words, [Scheme(8, 8)], [0])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"engine": "slurm"}, "engine: expected one of"),
        ({"address": "auto"}, "address: is for the engine 'ray'"),
        ({"jobs": 0}, "jobs: expected at least 1"),
        ({"schemes": "W1A1"}, "weight bits must be between 2 and 8"),
    ],
)
def test_wrong_setting_is_refused_before_any_work(sweep, tmp_path, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        sweep(tmp_path / "sweep", **settings)

    assert not (tmp_path / "sweep").exists()


def test_one_word_may_stand_for_recipes_of_several_names(monkeypatch):
    monkeypatch.setattr(
        grid,
        "load_recipe",
        lambda word, scheme: load_recipe(
            "deploy" if scheme.activation_bits == 8 else "repq_vit", scheme=scheme
        ),
    )

    names, recipes = planned_recipes("best", [Scheme(8, 8), Scheme(4, 4)], [0, 1])

    assert names == ("deploy", "repq_vit")
    assert [(r.name, r.seed) for r in recipes] == [
        ("deploy", 0),
        ("repq_vit", 0),
        ("deploy", 1),
        ("repq_vit", 1),
    ]
