"""Files that are damaged, are something else, or would run code."""

import io
import json
import sys
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vitcompress.errors import ConfigError, InputError
from vitcompress.models import load_model


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


class Net(nn.Module):
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x)


def refusal(path, **settings):
    with pytest.raises(InputError) as caught:
        load_model(path, **settings)
    assert caught.value.exit_code == 5
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_bomb_is_refused_without_going_off(tmp_path, zipped, nested):
    path, marker = tmp_path / "bomb.pt", tmp_path / "marker"
    bomb = Bomb(marker)
    content = {"state_dict": {"w": torch.ones(2)}, "args": bomb} if nested else bomb
    torch.save(content, path, _use_new_zipfile_serialization=zipped)

    message = refusal(path)

    assert not marker.exists()
    assert "would run code when opened" in message
    assert "--trust-input" in message


def test_whole_module_is_refused_by_the_name_of_its_class(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(nn.Linear(2, 2), path)

    assert "(torch.nn.modules.linear.Linear)" in refusal(path)


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: {"model": net, "epoch": 1}])
def test_whole_module_is_opened_when_trusted(tmp_path, wrap):
    path, net = tmp_path / "net.pt", Net().half()
    torch.save(wrap(net), path)

    model = load_model(path, trust_input=True, image_size=32)

    assert model.name == "Net"
    assert model.num_classes == 3
    assert model.source == "whole module Net from net.pt"
    assert len(model.digest) == 64
    assert model.preprocessing.size == (32, 32)
    assert model.module.fc.weight.dtype is torch.float32
    assert not model.module.training


def test_trusted_module_gives_its_weights_to_a_given_architecture(tmp_path):
    timm = pytest.importorskip("timm")
    path = tmp_path / "net.pt"
    torch.save(timm.create_model("test_vit", num_classes=4), path)

    model = load_model(path, trust_input=True, arch="timm/test_vit")

    assert (model.name, model.num_classes) == ("timm/test_vit", 4)


def test_trusted_plain_files_still_open(tmp_path, test_vit_state):
    path = tmp_path / "vit.pt"
    torch.save(test_vit_state, path)

    assert load_model(path, trust_input=True).name == "timm/test_vit"


def test_trusted_module_of_a_missing_class_says_so(tmp_path, monkeypatch):
    module = types.ModuleType("lost_code")
    exec("from torch import nn\nclass Gone(nn.Module): pass", module.__dict__)
    monkeypatch.setitem(sys.modules, "lost_code", module)
    path = tmp_path / "net.pt"
    torch.save(module.Gone(), path)
    monkeypatch.delitem(sys.modules, "lost_code")

    assert "class cannot be imported" in refusal(path, trust_input=True)


@pytest.fixture(scope="session")
def exported_bytes():
    program = torch.export.export(Net().eval(), (torch.zeros(2, 4),))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["net.pt2", "net.pth"])
def test_exported_program_is_opened_only_when_trusted(tmp_path, exported_bytes, name):
    path = tmp_path / name
    path.write_bytes(exported_bytes)

    assert "torch.export archive holds a program" in refusal(path)
    model = load_model(path, trust_input=True)

    assert model.name == "net"
    assert model.source == f"exported program from {name}"
    assert model.module(torch.zeros(2, 4)).shape == (2, 3)


def test_damaged_program_is_reported(tmp_path):
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")

    assert "torch.export archive holds a program" in refusal(path)
    assert "cannot be opened by torch" in refusal(path, trust_input=True)


def test_torchscript_gives_its_tensors_only_when_trusted(tmp_path, test_vit_state):
    path = tmp_path / "vit.pt"
    holder = nn.Module()
    for key, tensor in test_vit_state.items():
        *parents, leaf = key.split(".")
        owner = holder
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        owner.register_buffer(leaf, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(holder).save(path)

    assert "TorchScript archive holds a program" in refusal(path)
    assert load_model(path, trust_input=True).name == "timm/test_vit"


def test_folder_name_inside_an_archive_means_nothing(tmp_path, test_vit_state):
    for stem in ("code", "models", "archive_format"):
        path = tmp_path / f"{stem}.pt"
        torch.save(test_vit_state, path)
        with zipfile.ZipFile(path) as archive:
            assert f"{stem}/data.pkl" in archive.namelist()

        assert load_model(path).name == "timm/test_vit"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file (0 bytes)"),
        (bytes(range(200, 250)), "unknown binary data starting with c8 c9"),
        (b"accuracy 0.9\nloss 1.0\n", "text starting with 'accuracy 0.9' (22 bytes)"),
        ("à".encode() * 300, "text starting with"),
        (b" \n\n", "nothing but white space"),
        (b"version https://git-lfs and more", "Git LFS pointer"),
        (b"\x1f\x8b" + bytes(20), "gzip"),
        (b"PK\x03\x04" + bytes(40), "damaged or cut-off zip archive"),
        (b"\x80\x02" + bytes(range(60)), "damaged"),
        (b"\x80", "unknown binary data"),
    ],
)
def test_other_content_is_described(tmp_path, content, found):
    path = tmp_path / "vit.pt"
    path.write_bytes(content)

    assert found in refusal(path)
    assert found in refusal(path, trust_input=True)


def test_other_zip_archives_are_described(tmp_path):
    path = tmp_path / "vit.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/notes.txt", "hello")

    assert "zip archive without data.pkl" in refusal(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_off_torch_file_is_refused(tmp_path, zipped):
    path = tmp_path / "vit.pt"
    torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-600])

    message = refusal(path)

    assert "damaged" in message
    assert "\n" not in message


def test_cut_off_safetensors_say_how_many_bytes_are_missing(tmp_path):
    path = tmp_path / "vit.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    whole = path.read_bytes()

    path.write_bytes(whole[:-100])
    message = refusal(path)
    path.write_bytes(whole[:20])
    header_message = refusal(path)

    assert f"describes {len(whole):,} bytes, the file has {len(whole) - 100:,}" in message
    assert "the file has 20" in header_message


@pytest.mark.parametrize("header", [b"{not json", json.dumps({"w": 3}).encode()])
def test_nonsense_in_a_safetensors_header_is_refused(tmp_path, header):
    path = tmp_path / "vit.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)

    assert "header is not the JSON it should be" in refusal(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 3, "note": "none"}, "no tensors at its top level, only epoch, note"),
        ({}, "only nothing"),
        ({"state_dict": {}}, "no tensors under 'state_dict'"),
        ([torch.ones(2)], "found list"),
        (torch.ones(2), "found Tensor"),
        ({"model": {"w": torch.ones(2), "lr": 0.1}}, "found float under 'lr'"),
        ({"w": torch.ones(2).to_sparse()}, "quantized or sparse"),
        ({"w": torch.ones(2, device="meta")}, "without data"),
    ],
)
def test_files_without_a_plain_state_dict_are_refused(tmp_path, content, found):
    path = tmp_path / "vit.pt"
    torch.save(content, path)

    assert found in refusal(path)


def test_missing_file_suggests_the_nearest_name(tmp_path):
    (tmp_path / "deit_tiny.pth").touch()

    assert "did you mean deit_tiny.pth?" in refusal(tmp_path / "deit_tny.pth")
    assert "found no directory" in refusal(tmp_path / "nowhere" / "vit.pth")


def test_directories_and_odd_paths_are_refused(tmp_path):
    assert "found a directory" in refusal(tmp_path)
    (tmp_path / "config.json").touch()
    assert f"write hf/{tmp_path}" in refusal(tmp_path)
    assert "File name too long" in refusal("x" * 300)
    with pytest.raises(InputError, match="empty path"):
        load_model("")


def test_whole_module_is_checked_for_finite_weights_and_classes(tmp_path):
    path, net = tmp_path / "net.pt", Net()
    torch.save(net, path)

    with pytest.raises(ConfigError, match="9 classes were asked for"):
        load_model(path, trust_input=True, num_classes=9)

    net.fc.weight.data[0, 0] = float("nan")
    torch.save(net, path)
    assert "NaN or infinity in 1 of 2 tensors: fc.weight" in refusal(path, trust_input=True)
