import sys

import pytest
import torch

from vitcompress.errors import ConfigError, UnsupportedModelError
from vitcompress.models import create_architecture, load_model


@pytest.mark.parametrize(
    ("arch", "suggestion"),
    [
        ("timm/test_vitt", "did you mean test_vit"),
        ("timm/vit_tiny_patch16_24.augreg", "vit_tiny_patch16_224"),
        ("torchvision/vit_b16", "did you mean vit_b_16"),
        ("torchvision/fcn_resnet50", "did you mean"),  # segments, does not classify
        ("test_vitt", "did you mean test_vit"),
        ("tim/test_vit", "did you mean timm"),
        ("google/some-model", "write hf/google/some-model"),
        ("timm/", "expected timm/NAME"),
        ("", "expected timm/NAME"),
    ],
)
def test_unknown_names_suggest_the_nearest(arch, suggestion):
    with pytest.raises(ConfigError) as caught:
        create_architecture(arch)

    assert suggestion in str(caught.value)
    assert caught.value.exit_code == 2


def test_unknown_tag_is_refused():
    for state in (None, {}):
        with pytest.raises(ConfigError, match="nonsense"):
            create_architecture("timm/test_vit.nonsense", state=state)


def test_bare_names_are_tried_in_timm_then_in_torchvision():
    assert create_architecture("test_vit")[2] == "timm/test_vit"
    assert create_architecture("shufflenet_v2_x0_5")[2] == "torchvision/shufflenet_v2_x0_5"


def test_image_size_reaches_transformers_and_preprocessing():
    module, preprocessing, _ = create_architecture("timm/test_vit", image_size=96)

    assert preprocessing.size == (96, 96)
    assert module(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)


def test_networks_without_a_size_of_their_own_take_any():
    _, preprocessing, _ = create_architecture("timm/test_resnet", image_size=96)
    _, other, _ = create_architecture("torchvision/squeezenet1_1", image_size=96)

    assert preprocessing.size == other.size == (96, 96)


def test_impossible_image_size_is_a_wrong_setting():
    with pytest.raises(ConfigError, match=r"with 5 classes and 97 pixels: Input shape"):
        create_architecture("torchvision/vit_b_16", num_classes=5, image_size=97)


def test_class_count_is_read_from_all_heads_of_a_distilled_model():
    timm = pytest.importorskip("timm")
    name = "levit_128s"
    state = timm.create_model(name, num_classes=6).state_dict()

    module, _, full_name = create_architecture(f"timm/{name}", state=state)

    assert full_name == f"timm/{name}"
    assert module.num_classes == 6


def test_torchvision_preset_is_taken_over(tmp_path):
    models = pytest.importorskip("torchvision.models")
    state = models.get_model("squeezenet1_1", weights=None, num_classes=4).state_dict()
    torch.save(state, tmp_path / "net.pth")

    model = load_model(tmp_path / "net.pth", arch="torchvision/squeezenet1_1")

    assert model.num_classes == 4
    assert model.preprocessing.to_dict() == {
        "size": [224, 224],
        "crop_fraction": 0.875,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


def test_every_torchvision_preset_can_be_expressed():
    models = pytest.importorskip("torchvision.models")
    from vitcompress.models.torchvision_models import _preprocessing

    for name in models.list_models(module=models):
        preset = models.get_model_weights(name).DEFAULT.transforms()
        resize = f"resize {preset.resize_size[0]} {preset.interpolation.value}"

        assert _preprocessing(name, preset, None).describe().startswith(resize)


@pytest.mark.parametrize(
    ("arch", "module", "command"),
    [
        ("timm/test_vit", "timm", r"pip install 'vitcompress\[timm\]'"),
        ("torchvision/vit_b_16", "torchvision", "pip install torchvision"),
        ("hf/some/model", "transformers", r"pip install 'vitcompress\[hf\]'"),
    ],
)
def test_missing_library_is_named_with_its_install_command(monkeypatch, arch, module, command):
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(ConfigError, match=command):
        create_architecture(arch)


def test_bare_names_need_only_one_of_the_libraries(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert create_architecture("squeezenet1_1")[2] == "torchvision/squeezenet1_1"

    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ConfigError, match="vitcompress"):
        create_architecture("squeezenet1_1")


NATTEN = (
    "Failed to import NATTEN's CPP backend. This could be due to an incomplete install.\n"
    "Please uninstall NATTEN and re-install with the correct torch build."
)


@pytest.mark.parametrize("load", [create_architecture, load_model])
def test_extension_that_is_not_installed_makes_the_model_unsupported(monkeypatch, load):
    timm = pytest.importorskip("timm")

    def create_model(*_, **__):
        raise ImportError(NATTEN)

    monkeypatch.setattr(timm, "create_model", create_model)

    with pytest.raises(UnsupportedModelError) as caught:
        load("timm/test_vit")

    assert caught.value.exit_code == 4
    assert isinstance(caught.value.__cause__, ImportError)
    message = str(caught.value)
    assert message.startswith(f"timm/test_vit: cannot be built here: {NATTEN.splitlines()[0]}")
    assert "\n" not in message
    assert "its operators could still not be exported" in message
