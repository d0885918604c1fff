import pytest
import torch
from finished import quantized
from tiny import TinyViT, enliven, images, make_source, tiny_vit

import calib
import vitcompress
from vitcompress import api
from vitcompress.effort import resolve_recipe
from vitcompress.errors import ConfigError, ExportError, InputError, UnsupportedModelError
from vitcompress.graph import CapturedGraph
from vitcompress.models import LoadedModel
from vitcompress.recipe import Recipe, Scheme


@pytest.fixture(scope="module")
def reported():
    """A model that says how its images are prepared."""
    model = tiny_vit(depth=1)
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model


@pytest.fixture(scope="module")
def compressed(reported):
    return vitcompress.quantize(reported, recipe="deploy")


@pytest.fixture
def captured(compressed, monkeypatch):
    """Spare a test the capture; return the images that were to be captured with."""
    shapes = []

    def stop(model, images, model_id):
        shapes.append(tuple(images.shape))
        raise UnsupportedModelError("enough")

    monkeypatch.setattr(api, "capture", stop)
    return shapes


def test_module_in_callable_out(vit, source):
    weights = {name: value.clone() for name, value in vit.state_dict().items()}
    x = images(3, seed=6)
    expected = vit(x)

    model = vitcompress.quantize(vit, bits=8, source=source)

    found = model(x)
    assert isinstance(found, torch.Tensor)
    assert found.shape == (3, 10)
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.95
    assert not torch.equal(found, expected)
    assert model.recipe.label == "fast-w8a8"
    assert model.report.model == "TinyViT"
    assert model.preprocessing is None
    assert all(torch.equal(value, weights[name]) for name, value in vit.state_dict().items())


def test_mode_of_the_module_is_left_as_it_was(source):
    model = tiny_vit(depth=1).train()

    vitcompress.quantize(model, recipe="deploy", source=source)

    assert model.training


def test_without_a_source_rendered_images_serve(compressed):
    protocol = compressed.report.protocol

    assert "dead leaves" in protocol.source
    assert protocol.sample_ids == tuple(f"synthetic[{n}]" for n in range(api.DEFAULT_SAMPLES))
    assert compressed.preprocessing.size == (32, 32)
    assert compressed.preprocessing.mean == (0.5, 0.5, 0.5)
    assert protocol.preprocessing == compressed.preprocessing.to_dict()


def test_grey_models_get_grey_rendered_images(captured):
    model = TinyViT(depth=1)
    model.patch_embed = torch.nn.Conv2d(1, 32, kernel_size=8, stride=8)
    model.pretrained_cfg = {"input_size": (1, 32, 32)}

    with pytest.raises(UnsupportedModelError):
        vitcompress.quantize(enliven(model), bits=8)

    assert captured == [(2, 1, 32, 32)]


def test_own_preprocessing_of_a_source_goes_first(reported, captured):
    own = calib.Preprocessing(size=(24, 40), mean=(0.1,) * 3, std=(0.9,) * 3)
    source = calib.open_source("synthetic", samples=4, preprocessing=own)

    with pytest.raises(UnsupportedModelError):
        vitcompress.quantize(reported, bits=8, source=source)

    assert captured == [(2, 3, 24, 40)]


def test_loaded_models_bring_name_and_preprocessing(reported):
    prepared = calib.Preprocessing(size=(32, 32), crop_fraction=1.0)
    loaded = LoadedModel(reported, "user/net", prepared, 10, "made here", None)

    source = calib.open_source("synthetic", samples=4)
    model = vitcompress.quantize(loaded, recipe="deploy", source=source)

    assert model.preprocessing == prepared
    assert model.report.model == model.graph.provenance.model == "user/net"


def test_same_call_twice_gives_the_same_weights(vit, source):
    settings = {"recipe": "repq_vit", "source": source}
    first, second = (vitcompress.quantize(vit, **settings) for _ in range(2))

    for name, value in first.graph.tensors().items():
        assert torch.equal(value, second.graph.tensors()[name]), name
    for target, quantizer in first.graph.quantizers().items():
        other = second.graph.quantizers()[target]
        for name in quantizer.parameter_names:
            assert torch.equal(getattr(quantizer, name), getattr(other, name)), target
    assert torch.equal(first(images(2)), second(images(2)))


def test_global_random_state_neither_matters_nor_changes(vit_graph, source):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = quantized(vit_graph, source, scheme="W4A4")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)

    second = quantized(vit_graph, source, scheme="W4A4")

    assert torch.equal(first(images(2)), second(images(2)))


def test_saved_loaded_and_evaluated(compressed, tmp_path):
    labelled = make_source(images(6), torch.arange(6))

    compressed.save(tmp_path / "out")
    loaded = vitcompress.load(str(tmp_path / "out"))
    entry = vitcompress.evaluate(loaded, labelled, reference=compressed)

    assert loaded.preprocessing == compressed.preprocessing
    assert entry.agreement_percent == 100.0
    assert entry.top1_percent is not None


def test_exported_files_are_verified_on_rendered_images(compressed, tmp_path, monkeypatch):
    seen = []

    def refuse(graph, path, images, **settings):
        seen.append((tuple(images.shape), float(images.std()), settings["target"]))
        raise ExportError("enough")

    monkeypatch.setattr(api, "write_onnx", refuse)

    with pytest.raises(ExportError):
        vitcompress.export_onnx(compressed, tmp_path / "m.onnx", target="generic")

    ((shape, spread, target),) = seen
    assert (shape, target) == ((api.VERIFY_IMAGES, 3, 32, 32), "generic")
    assert 0.1 < spread < 2.0
    assert list(tmp_path.iterdir()) == []


# Recipes and schemes


def test_bits_alone_are_weight_bits():
    assert resolve_recipe(bits=4).scheme == Scheme(4, 8)
    assert resolve_recipe().label == "fast-w8a8"


def test_an_effort_chooses_the_recipe_and_fast_is_the_default():
    assert resolve_recipe(bits=4).to_yaml() == resolve_recipe(bits=4, effort="fast").to_yaml()
    assert resolve_recipe(scheme="w4a4", effort="balanced").label == "balanced_narrow-w4a4"


def test_an_effort_and_a_recipe_contradict_each_other():
    with pytest.raises(ConfigError, match="one or the other"):
        resolve_recipe(effort="fast", recipe="deploy")


def test_scheme_and_recipe_combine():
    assert resolve_recipe(recipe="repq_vit", bits=4).label == "repq_vit-w4a8"
    assert resolve_recipe(recipe="repq_vit-w3a3").label == "repq_vit-w3a3"
    assert resolve_recipe(recipe="repq_vit-w3a3", scheme="W6A6").label == "repq_vit-w6a6"
    assert resolve_recipe(scheme=Scheme(2, 8)).label == "fast-w2a8"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bits": 4, "scheme": "W4A4"}, "give bits or scheme, not both"),
        ({"bits": 0}, "weight bits must be between 2 and 8, got 0"),
        ({"bits": 1}, "weight bits must be between 2 and 8, got 1"),
        ({"bits": 9}, "weight bits must be between 2 and 8, got 9"),
        ({"scheme": "W4A1"}, "activation bits must be between 2 and 8, got 1"),
        ({"scheme": "4"}, "expected a form like W4A8, got '4'"),
        ({"recipe": "repq_vot"}, "did you mean 'repq_vit'"),
        ({"overrides": ["passes.12.method=mse"]}, "has no 'passes.12.method'"),
    ],
)
def test_contradictions_and_impossible_widths_are_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        resolve_recipe(**settings)


def test_recipe_objects_are_complete(vit_graph, source):
    recipe = Recipe.from_dict(
        {
            "schema": 1,
            "name": "weights_only",
            "scheme": "W4A8",
            "passes": [
                {"pass": "attach", "rules": [{"roles": ["weight"], "bits": "w"}]},
                {"pass": "calibrate", "method": "minmax"},
                {"pass": "freeze"},
            ],
        }
    )

    model = quantized(vit_graph, source, recipe=recipe)

    assert model.recipe is recipe
    assert {q.spec.bits for q in model.graph.quantizers().values()} == {4}
    assert resolve_recipe(recipe=recipe) is recipe
    for extra in ({"bits": 4}, {"scheme": "W4A4"}, {"overrides": ["seed=1"]}):
        with pytest.raises(ConfigError, match="a Recipe object is complete"):
            resolve_recipe(recipe=recipe, **extra)


def test_overrides_reach_the_recipe():
    recipe = resolve_recipe(bits=8, overrides=["seed=5", "passes.2.method=minmax"])

    assert recipe.seed == 5
    assert recipe.to_dict()["passes"][2]["method"] == "minmax"


def test_recipe_is_checked_before_the_model_is_touched(vit, monkeypatch):
    monkeypatch.setattr(api, "capture", lambda *_, **__: pytest.fail("captured"))

    with pytest.raises(ConfigError):
        vitcompress.quantize(vit, bits=12)


# Models that cannot be compressed


def test_weights_that_are_not_finite_are_named(source):
    model = tiny_vit(depth=1)
    with torch.no_grad():
        model.blocks[0].fc1.weight[3, 4] = float("nan")

    with pytest.raises(InputError, match=r"blocks\.0\.fc1\.weight"):
        vitcompress.quantize(model, bits=8, source=source)


class Branching(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3 * 32 * 32, 4)

    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return self.fc(x.flatten(1))


def test_branch_on_values_is_refused_with_a_cure(source):
    with pytest.raises(UnsupportedModelError, match=r"replace branches on tensor") as caught:
        vitcompress.quantize(Branching(), bits=8, source=source)

    assert caught.value.exit_code == 4
    assert "test_api.py" in str(caught.value)


def test_capture_is_public(vit):
    assert isinstance(vitcompress.capture, type(vitcompress.load))
    assert CapturedGraph.__module__.startswith("vitcompress.graph")
