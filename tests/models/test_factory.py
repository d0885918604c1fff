import sys
from textwrap import dedent

import pytest
import torch

from vitcompress.errors import ConfigError
from vitcompress.models import create_architecture, load_model

SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3, **settings):
        super().__init__()
        self.fc = nn.Linear(4, classes)
        self.num_classes = classes
        self.pretrained_cfg = {
            "input_size": (3, 48, 64), "crop_pct": 1.0, "mean": [0.1, 0.2, 0.3]
        } | settings

def build():
    return Net()

def odd():
    return Net(crop_pct=9)

class Zoo:
    small = Net

def needs(size):
    return Net()

def wrong():
    return "a net"

CONSTANT = 3
"""


@pytest.fixture(autouse=True)
def user_code(tmp_path, monkeypatch):
    package = tmp_path / "user_nets"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(dedent(SOURCE))
    (package / "broken.py").write_text("1 / 0\n")
    (package / "needy.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "user_nets"]:
        del sys.modules[name]


@pytest.mark.parametrize("attribute", ["build", "Net", "Zoo.small"])
def test_factory_in_the_working_directory_is_called(attribute):
    module, preprocessing, name = create_architecture(f"user_nets.nets:{attribute}")

    assert type(module).__name__ == "Net"
    assert name == f"user_nets.nets:{attribute}"
    assert preprocessing.size == (48, 64)
    assert preprocessing.crop_fraction == 1.0
    assert preprocessing.mean == (0.1, 0.2, 0.3)


def test_weights_are_loaded_into_what_the_factory_builds(tmp_path):
    torch.save({"fc.weight": torch.ones(3, 4), "fc.bias": torch.ones(3)}, tmp_path / "w.pt")

    model = load_model(tmp_path / "w.pt", arch="user_nets.nets:build", image_size=32)

    assert model.module.fc.weight.sum() == 12
    assert model.num_classes == 3
    assert model.preprocessing.size == (32, 32)


def test_factory_alone_brings_its_own_weights():
    model = load_model("user_nets.nets:build")

    assert model.source == "module built by user_nets.nets:build"
    assert model.digest is None


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("user_net.nets:build", "no module 'user_net'"),
        ("user_nets.net:build", r"no module 'user_nets\.net'"),
        ("user_nets.nets:biuld", r"no such name; did you mean build\?"),
        ("user_nets.nets:Zoo.large", "expected 'large'"),
        ("user_nets.nets:CONSTANT", r"expected a callable .* found int"),
        ("user_nets.nets:wrong", r"return a torch\.nn\.Module, found str"),
        ("user_nets.nets:needs", "called without arguments and raised TypeError"),
        ("user_nets.nets:odd", r"odd: preprocessing: crop_fraction"),
        ("user_nets.broken:build", "raised ZeroDivisionError"),
        ("user_nets.needy:build", "No module named 'not_installed_anywhere'"),
    ],
)
def test_each_slip_has_its_message(arch, message):
    with pytest.raises(ConfigError, match=message):
        create_architecture(arch)
