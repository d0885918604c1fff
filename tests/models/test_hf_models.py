import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from vitcompress.errors import ConfigError, InputError
from vitcompress.models import create_architecture, load_model

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
}


@pytest.fixture
def folder(tmp_path):
    config = transformers.ViTConfig(**SIZES, num_labels=5)
    config.save_pretrained(tmp_path)
    return tmp_path


def small_vit(labels):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, num_labels=labels)
    return transformers.AutoModelForImageClassification.from_config(config).eval()


def write_processor(folder, **settings):
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def test_weights_fit_a_local_configuration_with_their_class_count(folder):
    source = small_vit(labels=3)
    save_file(source.state_dict(), folder / "vit.safetensors")
    images = torch.randn(2, 3, 32, 32)

    model = load_model(folder / "vit.safetensors", arch=f"hf/{folder / 'config.json'}")

    torch.testing.assert_close(model.module(images).logits, source(images).logits)
    assert model.num_classes == 3
    assert model.preprocessing.to_dict() == {
        "size": [32, 32],
        "crop_fraction": 1.0,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }


def test_published_tensor_names_are_converted_without_noise(folder, capfd):
    source = small_vit(labels=3)
    published = folder / "published"
    source.save_pretrained(published)
    images = torch.randn(2, 3, 32, 32)
    capfd.readouterr()

    model = load_model(published / "model.safetensors", arch=f"hf/{published}")

    torch.testing.assert_close(model.module(images).logits, source(images).logits)
    assert not model.module.training
    assert capfd.readouterr() == ("", "")


def test_mismatches_are_listed_by_kind(folder, capfd):
    state = small_vit(labels=3).state_dict()
    del state["vit.layernorm.weight"]
    state["vit.layernorm.bias"] = torch.zeros(4)
    state["other.weight"] = torch.zeros(4)
    save_file(state, folder / "vit.safetensors")

    with pytest.raises(InputError) as caught:
        load_model(folder / "vit.safetensors", arch=f"hf/{folder}")

    message = str(caught.value)
    assert "missing: vit.layernorm.weight\n" in message
    assert "unexpected: other.weight\n" in message
    assert "vit.layernorm.bias (expected [16], found [4])\n" in message
    assert capfd.readouterr() == ("", "")


def test_folder_alone_loads_its_weights(folder):
    small_vit(labels=3).save_pretrained(folder)

    model = load_model(f"hf/{folder}")

    assert model.num_classes == 3
    assert model.preprocessing.size == (32, 32)


@pytest.mark.parametrize(
    ("settings", "size", "fraction", "mode"),
    [
        ({"size": 32}, (32, 32), 1.0, "squash"),
        ({"size": {"height": 48, "width": 32}}, (48, 32), 1.0, "squash"),
        ({"size": {"shortest_edge": 40}}, (40, 40), 1.0, "center"),
        ({"size": 40, "do_center_crop": True, "crop_size": 32}, (32, 32), 0.8, "squash"),
        (
            {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": [32, 32]},
            (32, 32),
            0.8,
            "center",
        ),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 224), 0.875, "center"),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 384), 1.0, "squash"),
    ],
)
def test_processor_geometry_is_read(folder, settings, size, fraction, mode):
    write_processor(folder, **settings)

    _, preprocessing, _ = create_architecture(f"hf/{folder}")

    assert preprocessing.size == size
    assert preprocessing.crop_fraction == fraction
    assert preprocessing.crop_mode == mode


def test_processor_statistics_are_read(folder):
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    write_processor(folder, size=32, image_mean=mean, image_std=std, resample=3)

    _, preprocessing, _ = create_architecture(f"hf/{folder}", image_size=48)

    torch.testing.assert_close(preprocessing.mean, tuple(mean))
    torch.testing.assert_close(preprocessing.std, tuple(std))
    assert preprocessing.interpolation == "bicubic"
    assert preprocessing.size == (48, 48)


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"do_normalize": False}, 0.0, 1.0),
        ({"rescale_factor": 1 / 127.5}, 0.25, 0.25),
        ({"do_rescale": False}, 0.5 / 255, 0.5 / 255),
    ],
)
def test_other_scales_move_into_mean_and_std(folder, settings, mean, std):
    write_processor(folder, size=32, **settings)

    _, preprocessing, _ = create_architecture(f"hf/{folder}")

    assert preprocessing.mean == pytest.approx((mean,) * 3)
    assert preprocessing.std == pytest.approx((std,) * 3)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", InputError),
        ("[]", InputError),
        ("{}", ConfigError),
        ('{"size": {"longest_edge": 3}}', ConfigError),
        ('{"size": 32, "image_std": [0, 0, 0]}', ConfigError),
        ('{"size": 32, "resample": 5}', ConfigError),
    ],
)
def test_processor_files_that_say_nothing_usable_are_refused(folder, text, error):
    (folder / "preprocessor_config.json").write_text(text)

    with pytest.raises(error, match=r"preprocessor_config\.json"):
        create_architecture(f"hf/{folder}")


def test_missing_and_unusable_configurations_are_refused(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ConfigError, match=r"no such file; did you mean config\.json\?"):
        create_architecture(f"hf/{folder / 'confg.json'}")
    with pytest.raises(ConfigError, match=r"expected config\.json in this folder"):
        create_architecture(f"hf/{empty}")
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no usable configuration"):
        create_architecture(f"hf/{folder}")


def test_unreachable_hub_names_suggest_local_files(monkeypatch):
    def fail(name, **settings):
        assert settings["trust_remote_code"] is False
        raise OSError("\nno connection\nmore")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    loader = transformers.AutoModelForImageClassification
    monkeypatch.setattr(loader, "from_pretrained", fail)

    with pytest.raises(InputError, match=r"no connection; give a local one"):
        create_architecture("hf/some/model")
    with pytest.raises(InputError, match=r"no connection; give a weights file"):
        load_model("hf/some/model")


def test_import_of_the_package_loads_no_model_library():
    import subprocess

    code = (
        "import sys, vitcompress.models; "
        "print([n for n in ('timm', 'torchvision', 'transformers') if n in sys.modules])"
    )

    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout

    assert printed.strip() == "[]"
