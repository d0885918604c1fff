"""Two results beside each other: conditions, recipe, size, sites, accuracy."""

import shutil

import pytest
from finished import edit_json, quantized
from results import make_result, make_sites

from vitcompress.compare import compare
from vitcompress.errors import ArtifactError, InputError


@pytest.fixture
def compared(tmp_path):
    """Compare two results written to files."""

    def compared(a, b):
        for name, result in (("a.json", a), ("b.json", b)):
            (tmp_path / name).write_text(result.to_json())
        return compare(tmp_path / "a.json", tmp_path / "b.json")

    return compared


def pairs(changes):
    return {change.key: (change.a, change.b) for change in changes}


def test_equal_results_differ_in_nothing(compared):
    found = compared(make_result(wrong=range(5)), make_result(wrong=range(5)))

    assert (found.protocol, found.recipe, found.size) == ((), (), ())
    assert found.changed_sites() == []
    assert len(found.sites) == 18
    top1, agreement = found.accuracy
    assert (top1.metric, top1.difference_pp, top1.p_value) == ("top1", 0.0, 1.0)
    assert (agreement.metric, agreement.a) == ("agreement", 97.5)


def test_conditions_and_settings_that_differ_are_named(compared):
    recipe = (
        "name: x\nscheme: W4A4\npasses:\n"
        "- {pass: attach, rules: [{roles: [weight], bits: 4}]}\n"
        "- {pass: calibrate, method: mse}\n"
    )
    a = make_result(resolved_recipe=recipe, versions={"torch": "2.13", "timm": "1.0"})
    b = make_result(
        resolved_recipe=recipe.replace("mse", "minmax").replace("[weight]", "[weight, probs]"),
        versions={"torch": "2.14", "timm": "1.0", "numpy": "2.4"},
        seed=3,
    )

    found = compared(a, b)

    assert pairs(found.recipe) == {
        "passes.0.rules.0.roles": ("['weight']", "['weight', 'probs']"),
        "passes.1.method": ("mse", "minmax"),
    }
    assert pairs(found.protocol) == {
        "seed": (0, 3),
        "versions.torch": ("2.13", "2.14"),
        "versions.numpy": (None, "2.4"),
    }


def test_sizes_that_differ_are_named(compared):
    found = compared(make_result(size_bytes=4000), make_result(size_bytes=8000))

    assert pairs(found.size) == {"stored_bytes": (4000, 8000), "ratio": (0.125, 0.25)}


def test_sites_that_differ_come_in_order_of_loss(compared):
    a = make_result(sites=make_sites())
    b = make_result(sites=make_sites(blocks_1_fc2_input=-9.0, blocks_0_fc1_weight=+2.0))

    changed = compared(a, b).changed_sites()

    assert [(site.site, site.sqnr_change_db) for site in changed] == [
        ("blocks.1.fc2:input", -9.0),
        ("blocks.0.fc1:weight", 2.0),
    ]
    assert changed[0].range_a == (-2.5, 2.0)
    assert changed[1].range_a is None
    assert (changed[0].spec_a, changed[0].spec_b) == ("u4 per_channel", "u4 per_channel")


def test_formats_and_ranges_that_differ_count(compared):
    sites = make_sites()
    wider = sites[1].model_copy(update={"high": 9.0})
    skipped = sites[0].model_copy(update={"spec": None, "bits": None, "sqnr_db": None})

    changed = compared(
        make_result(sites=sites), make_result(sites=[skipped, wider, *sites[2:]])
    ).changed_sites()

    by_name = {site.site: site for site in changed}
    assert set(by_name) == {sites[0].site, sites[1].site}
    assert (by_name[sites[0].site].spec_b, by_name[sites[0].site].sqnr_change_db) == (
        None,
        None,
    )
    assert by_name[sites[1].site].range_b == (-1.5, 9.0)


def test_sites_without_noise_are_equal_and_survive_json(compared):
    exact = [site.model_copy(update={"sqnr_db": float("inf")}) for site in make_sites()[:1]]
    noisy = [site.model_copy(update={"sqnr_db": 20.0}) for site in exact]

    same = compared(make_result(sites=exact), make_result(sites=exact))
    found = compared(make_result(sites=exact), make_result(sites=noisy))

    assert same.sites[0].sqnr_change_db == 0.0
    assert found.sites[0].sqnr_change_db == float("-inf")
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_sites_of_one_side_are_listed(compared):
    sites = make_sites()

    found = compared(make_result(sites=sites[:5]), make_result(sites=sites[2:8]))

    assert found.only_a == tuple(site.site for site in sites[:2])
    assert found.only_b == tuple(site.site for site in sites[5:8])
    assert len(found.sites) == 3


def test_accuracy_is_paired(compared):
    found = compared(make_result(wrong=range(5)), make_result(wrong=range(5, 25)))

    top1 = found.accuracy[0]
    assert (top1.gained, top1.lost) == (5, 20)
    assert top1.difference_pp == pytest.approx(-7.5)
    assert top1.low_pp < -7.5 < top1.high_pp < 0


def test_two_models_on_the_same_images_are_compared_by_labels_alone(compared):
    found = compared(make_result(), make_result(model="other", model_digest="ab" * 32))

    assert [change.metric for change in found.accuracy] == ["top1"]


def test_other_images_are_not_compared(compared):
    other = make_result()
    images = other.origin.evaluation.model_copy(update={"digest": "0" * 64, "source": "cats"})
    origin = other.origin.model_copy(update={"evaluation": images})

    found = compared(make_result(), other.model_copy(update={"origin": origin}))

    assert found.accuracy == ()
    assert "is about 200 images" in found.not_paired
    assert "about cats, whose digest differs" in found.not_paired


def test_without_labels_agreement_is_compared(compared):
    a, b = make_result(labelled=()), make_result(labelled=(), wrong=range(9))

    assert [change.metric for change in compared(a, b).accuracy] == ["agreement"]
    other = make_result(labelled=(), model_digest="ab" * 32)
    assert compared(a, other).not_paired.startswith("these images have no labels")


def test_some_labels_missing_is_an_error(compared):
    with pytest.raises(InputError, match=r"50 of 200 images have no label, first 'image150'"):
        compared(make_result(labelled=range(150)), make_result())


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory, vit_graph, source):
    """An artefact, and a copy of it whose report says something else of one weight."""
    folder = tmp_path_factory.mktemp("artefacts")
    quantized(vit_graph, source, bits=4, recipe="deploy").save(folder / "first")
    shutil.copytree(folder / "first", folder / "second")

    def change(report):
        report["scheme"] = "W8A8"
        report["size"]["stored_bytes"] += 100
        (site,) = [s for s in report["sites"] if s["site"] == "blocks.1.fc2:weight"]
        site["spec"], site["sqnr_db"] = "u8 per_channel", site["sqnr_db"] + 24

    edit_json(folder / "second", "report.json", change)
    return folder


def test_artefacts_are_compared_without_accuracy(artefacts):
    found = compare(artefacts / "first", artefacts / "second")

    assert pairs(found.protocol) == {"scheme": ("W4A8", "W8A8")}
    assert found.recipe == ()
    (site,) = found.changed_sites()
    assert (site.site, site.role) == ("blocks.1.fc2:weight", "weight")
    assert (site.spec_a, site.spec_b) == ("u4 per_channel", "u8 per_channel")
    assert site.sqnr_change_db == pytest.approx(24)
    before, after = pairs(found.size)["stored_bytes"]
    assert after == before + 100
    assert found.not_paired.endswith(
        "first is an artefact, which keeps no outcomes of single images"
    )


def test_artefact_and_result_are_compared(artefacts, tmp_path):
    (tmp_path / "a.json").write_text(make_result(sites=()).to_json())

    found = compare(tmp_path / "a.json", artefacts / "first")

    assert pairs(found.protocol)["model"] == ("toy", "tiny")
    assert found.sites == ()
    assert "first is an artefact" in found.not_paired


def test_what_is_neither_is_refused(artefacts, tmp_path):
    (tmp_path / "a.json").write_text(make_result().to_json())
    (tmp_path / "notes.json").write_text("{}")
    broken = make_result(resolved_recipe="a: [")
    (tmp_path / "broken.json").write_text(broken.to_json())

    for path, words in (
        (tmp_path, "is a directory but no artefact; name the file of a result"),
        (tmp_path / "none.json", "file is missing"),
        (tmp_path / "notes.json", "is it a result of a sweep?"),
        (tmp_path / "broken.json", "resolved_recipe: not valid YAML"),
    ):
        with pytest.raises(InputError) as caught:
            compare(tmp_path / "a.json", path)
        assert words in str(caught.value)


def test_damaged_artefact_is_refused(artefacts, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in (artefacts / "first").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "report.json").write_text("{}")

    with pytest.raises(ArtifactError, match="does not match the manifest"):
        compare(folder, artefacts / "second")
