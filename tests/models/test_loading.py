import argparse
import hashlib

import pytest
import torch
from safetensors.torch import save_file

from vitcompress.errors import ConfigError, InputError
from vitcompress.models import load_model
from vitcompress.models.loading import LIBRARIES

NAME = "timm/test_vit"


def assert_loaded(model, state):
    own = model.module.state_dict()
    assert own.keys() == state.keys()
    for key, tensor in state.items():
        torch.testing.assert_close(own[key], tensor, rtol=0, atol=0)
    assert not model.module.training


def saved(tmp_path, content, name="vit.pth", **settings):
    torch.save(content, tmp_path / name, **settings)
    return tmp_path / name


def test_safetensors_are_found_by_names_and_shapes(tmp_path, test_vit_state):
    path = tmp_path / "vit.safetensors"
    save_file(test_vit_state, path)

    model = load_model(path)

    assert_loaded(model, test_vit_state)
    assert model.name == NAME
    assert model.num_classes == 7
    assert model.source == f"state dict vit.safetensors as {NAME}, found by names and shapes"
    assert model.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.preprocessing.size == (160, 160)
    assert model.preprocessing.crop_fraction == 0.95
    assert model.preprocessing.mean == (0.5, 0.5, 0.5)
    assert model.module(torch.zeros(1, 3, 160, 160)).shape == (1, 7)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["vit.pth", "vit.safetensors"])
def test_torch_files_of_both_formats_are_known_by_content(
    tmp_path, test_vit_state, zipped, name
):
    path = saved(tmp_path, test_vit_state, name, _use_new_zipfile_serialization=zipped)

    assert_loaded(load_model(str(path)), test_vit_state)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "state_dict_ema"])
def test_state_dict_under_a_key_is_found_and_the_key_reported(tmp_path, test_vit_state, key):
    path = saved(tmp_path, {key: test_vit_state, "epoch": 3, "optimizer": {"lr": 0.1}})

    model = load_model(path)

    assert_loaded(model, test_vit_state)
    assert f"(key {key!r})" in model.source


def test_plain_weights_go_before_averaged_ones(tmp_path, test_vit_state):
    averaged = {key: tensor + 1 for key, tensor in test_vit_state.items()}
    path = saved(tmp_path, {"state_dict_ema": averaged, "state_dict": test_vit_state})

    model = load_model(path)

    assert_loaded(model, test_vit_state)
    assert "key 'state_dict', not state_dict_ema" in model.source


def test_metadata_among_the_tensors_of_a_flat_file_is_passed_over(tmp_path, test_vit_state):
    path = saved(tmp_path, {**test_vit_state, "epoch": 3, "best": {"top1": 0.5}})

    assert_loaded(load_model(path), test_vit_state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_wrapper_prefixes_are_removed_from_all_names(tmp_path, test_vit_state, prefix):
    path = saved(tmp_path, {prefix + key: value for key, value in test_vit_state.items()})

    model = load_model(path)

    assert_loaded(model, test_vit_state)
    assert f"prefix {prefix!r} removed" in model.source


def test_prefix_of_only_some_names_is_kept(tmp_path, test_vit_state):
    state = {f"module.{key}": value for key, value in test_vit_state.items()}
    state["norm.weight"] = state.pop("module.norm.weight")

    with pytest.raises(InputError, match=r"unexpected: module\.cls_token"):
        load_model(saved(tmp_path, state), arch=NAME)


def test_prefix_that_belongs_to_the_model_is_kept(tmp_path, monkeypatch):
    (tmp_path / "wrapped_net.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.ModuleDict({'model': nn.Linear(2, 3)})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    state = {"model.weight": torch.ones(3, 2), "model.bias": torch.zeros(3)}

    assert_loaded(load_model(saved(tmp_path, state), arch="wrapped_net:build"), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(tmp_path, test_vit_state, dtype):
    converted = {key: tensor.to(dtype) for key, tensor in test_vit_state.items()}

    model = load_model(saved(tmp_path, converted))

    assert_loaded(model, {key: tensor.float() for key, tensor in converted.items()})
    assert f"converted from {str(dtype).removeprefix('torch.')}" in model.source


def test_timm_checkpoint_names_its_architecture_and_settings(tmp_path):
    timm = pytest.importorskip("timm")
    state = timm.create_model("test_vit", num_classes=5, img_size=96).state_dict()
    settings = argparse.Namespace(
        num_classes=5,
        img_size=96,
        mean=[0.1, 0.2, 0.3],
        std=[0.4],
        crop_pct=0.9,
        interpolation="bilinear",
        lr=0.1,
    )
    path = saved(tmp_path, {"arch": "test_vit", "args": settings, "state_dict": state})

    model = load_model(path)

    assert_loaded(model, state)
    assert model.name == NAME
    assert "named in the checkpoint" in model.source
    assert model.num_classes == 5
    assert model.preprocessing.to_dict() == {
        "size": [96, 96],
        "crop_fraction": 0.9,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.4, 0.4],
    }


def test_unset_settings_of_a_timm_checkpoint_change_nothing(tmp_path, test_vit_state):
    names = ("num_classes", "img_size", "mean", "std", "crop_pct")
    settings = argparse.Namespace(**dict.fromkeys(names), interpolation="")
    content = {"arch": "test_vit", "args": settings, "state_dict": test_vit_state}

    with_settings = load_model(saved(tmp_path, content))
    without = load_model(saved(tmp_path, test_vit_state))

    assert with_settings.num_classes == 7
    assert with_settings.preprocessing == without.preprocessing


def test_impossible_settings_of_a_checkpoint_are_the_files_fault(tmp_path, test_vit_state):
    content = {
        "arch": "test_vit",
        "args": argparse.Namespace(crop_pct=7.0),
        "state_dict": test_vit_state,
    }

    with pytest.raises(InputError, match=r"'args': preprocessing: crop_fraction"):
        load_model(saved(tmp_path, content))


def test_given_architecture_goes_before_the_one_in_the_checkpoint(tmp_path, test_vit_state):
    path = saved(tmp_path, {"arch": "test_vit2", "state_dict": test_vit_state})

    assert load_model(path, arch=NAME).name == NAME
    with pytest.raises(InputError, match="does not fit timm/test_vit2"):
        load_model(path)


def test_unregistered_architecture_in_a_checkpoint_is_passed_over(tmp_path, test_vit_state):
    path = saved(tmp_path, {"arch": "visiontransformer", "state_dict": test_vit_state})

    assert load_model(path).name == NAME


def test_several_candidates_are_all_listed(tmp_path):
    timm = pytest.importorskip("timm")
    path = saved(tmp_path, timm.create_model("test_efficientnet_gn").state_dict())

    with pytest.raises(ConfigError) as caught:
        load_model(path)

    message = str(caught.value)
    assert "timm/test_efficientnet_gn, timm/test_efficientnet_ln" in message
    assert "--arch" in message


def test_unknown_names_and_shapes_ask_for_the_architecture(tmp_path):
    with pytest.raises(ConfigError, match=r"1 tensors \(w\) identify no .* give --arch"):
        load_model(saved(tmp_path, {"w": torch.ones(2)}))


def test_grey_weights_build_a_grey_model(tmp_path):
    timm = pytest.importorskip("timm")
    state = timm.create_model("test_vit", in_chans=1, num_classes=10).state_dict()

    model = load_model(saved(tmp_path, state), arch=NAME)

    assert_loaded(model, state)
    assert model.preprocessing.mean == (0.5,)
    assert model.preprocessing.std == (0.5,)


def test_derived_buffers_may_be_left_over_and_are_reported(tmp_path, test_vit_state):
    extra = {"blocks.0.attn.relative_position_index": torch.zeros(4, dtype=torch.int64)}

    model = load_model(saved(tmp_path, {**test_vit_state, **extra}))

    assert_loaded(model, test_vit_state)
    assert "1 derived buffers left out: blocks.0.attn.relative_position_index" in model.source


def test_mismatches_are_listed_by_kind_and_cut_off(tmp_path, test_vit_state):
    state = dict(test_vit_state)
    del state["norm.weight"]
    state["head.bias"] = torch.zeros(9)
    state |= {f"extra.{index}": torch.zeros(1) for index in range(12)}

    with pytest.raises(InputError) as caught:
        load_model(saved(tmp_path, state), arch=NAME)

    message = str(caught.value)
    assert caught.value.exit_code == 5
    assert "missing: norm.weight\n" in message
    assert "extra.9 and 2 more\n" in message
    assert "shape: head.bias (expected [7], found [9])\n" in message
    assert "--num-classes" in message


def test_explicit_class_count_goes_before_the_one_in_the_weights(tmp_path, test_vit_state):
    path = saved(tmp_path, test_vit_state)

    with pytest.raises(InputError, match=r"head\.weight \(expected \[3, 64\], found \[7"):
        load_model(path, arch=NAME, num_classes=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, test_vit_state, value):
    state = {key: tensor.clone() for key, tensor in test_vit_state.items()}
    broken = list(state)[:6]
    for key in broken:
        state[key].view(-1)[0] = value

    with pytest.raises(InputError) as caught:
        load_model(saved(tmp_path, state))

    message = str(caught.value)
    assert f"in 6 of {len(state)} tensors: {', '.join(broken[:5])} and 1 more" in message


class FakeTimm:
    def __init__(self, error=None):
        self.error = error

    def check_name(self, name):
        pass

    def load_pretrained(self, name, *, image_size):
        from calib import Preprocessing

        if self.error:
            raise self.error
        module = torch.nn.Linear(2, 3)
        module.num_classes = 3
        return module, Preprocessing(size=(image_size or 224,) * 2)


def use_library(monkeypatch, library):
    monkeypatch.setattr("vitcompress.models.loading.LIBRARIES", {**LIBRARIES, "timm": library})


def test_name_alone_loads_pretrained_weights(monkeypatch):
    use_library(monkeypatch, FakeTimm())

    model = load_model("timm/any", image_size=32)

    assert (model.name, model.num_classes, model.digest) == ("timm/any", 3, None)
    assert model.source == "pretrained weights of timm/any"
    assert model.preprocessing.size == (32, 32)
    with pytest.raises(ConfigError, match="5 classes were asked for, this model has 3"):
        load_model("timm/any", num_classes=5)
    with pytest.raises(ConfigError, match=r"arch: timm/x was given for timm/any"):
        load_model("timm/any", arch="timm/x")


@pytest.mark.parametrize(
    "error", [OSError("no route\nmore"), RuntimeError("no route"), Exception("no route")]
)
def test_failed_download_suggests_a_file(monkeypatch, error):
    use_library(monkeypatch, FakeTimm(error))

    with pytest.raises(InputError, match="no route; give a weights file with --arch timm"):
        load_model("timm/any")


def test_library_loaders_ask_for_pretrained_weights(monkeypatch):
    timm = pytest.importorskip("timm")
    models = pytest.importorskip("torchvision.models")
    asked = []
    create, get = timm.create_model, models.get_model

    def create_model(name, pretrained=False, **settings):
        asked.append((name, pretrained))
        return create(name, **settings)

    def get_model(name, weights=None, **settings):
        asked.append((name, weights))
        return get(name, weights=None, **settings)

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(models, "get_model", get_model)

    assert load_model(NAME).num_classes == 1000
    assert load_model("torchvision/squeezenet1_1").num_classes == 1000
    assert asked == [("test_vit", True), ("squeezenet1_1", "DEFAULT")]


@pytest.mark.parametrize("setting", [{"num_classes": -1}, {"image_size": 0}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(ConfigError, match="expected a whole number of at least"):
        load_model(NAME, **setting)
