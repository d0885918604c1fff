"""The digest of a model changes with its function, and with nothing else."""

import copy
import textwrap

import pytest
import torch
from tiny import TinyViT, enliven, tiny_vit
from torch import nn

import calib
from vitcompress.models import LoadedModel, identity
from vitcompress.models.identity import computing_versions, model_digest


class Scaled(nn.Module):
    """What it computes shows in an attribute alone."""

    def __init__(self, factor=2, act=torch.relu):
        super().__init__()
        self.factor = factor
        self.act = act

    def forward(self, x):
        return self.act(self.factor * x)


def test_equal_models_have_equal_digests():
    model = tiny_vit()

    assert model_digest(model) == model_digest(copy.deepcopy(model))
    assert model_digest(model) == model_digest(tiny_vit())
    assert model_digest(model) == model_digest(model.train())
    assert len(model_digest(model)) == 64


def test_loaded_model_has_the_digest_of_its_module():
    model = tiny_vit()
    loaded = LoadedModel(model, "a name", calib.Preprocessing(), 10, "somewhere", None)

    assert model_digest(loaded) == model_digest(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.head.weight.data.view(-1)[0].add_(1e-3),
        lambda m: m.cls_token.data.mul_(-1),
        lambda m: setattr(m.norm, "eps", 1e-3),
        lambda m: setattr(m.blocks[1], "act", nn.ReLU()),
        lambda m: setattr(m.blocks[1].attn, "heads", 4),
        lambda m: m.register_buffer("extra", torch.zeros(1), persistent=False),
        lambda m: m.half(),
        lambda m: setattr(m, "head", nn.Sequential(m.head)),
    ],
)
def test_digest_changes_with_tensors_structure_and_plain_attributes(change):
    model = tiny_vit()
    before = model_digest(model)

    change(model)

    assert model_digest(model) != before


def test_digest_changes_with_functions_and_numbers():
    digests = {
        model_digest(Scaled(factor, act))
        for factor in (2, 2.5, (1, 2))
        for act in (torch.relu, torch.sigmoid)
    }

    assert len(digests) == 6


def test_an_attribute_of_another_kind_has_no_part():
    """An object that prints its address would make every digest another."""
    first, second = Scaled(), Scaled()
    first.note, second.note = object(), object()

    assert model_digest(first) == model_digest(second)


def test_digest_changes_with_the_source_of_the_users_class(tmp_path, monkeypatch):
    def digest(name, body):
        text = f"""
        from torch import nn
        class Model(nn.Module):
            def forward(self, x):
                {body}
        """
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        kind = __import__(name).Model
        kind.__module__ = "model"  # as if one file had been edited
        monkeypatch.setitem(identity.inspect.sys.modules, "model", __import__(name))
        return model_digest(kind())

    monkeypatch.syspath_prepend(tmp_path)

    plain = digest("a", "return 2 * x")

    assert digest("b", "return  2*x  # twice") == plain
    assert digest("c", "return 3 * x") != plain


def test_class_without_a_file_is_no_error():
    scope = {"nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x): return x", scope)

    assert len(model_digest(scope["Typed"]())) == 64


def test_graph_has_a_digest_of_its_nodes_and_tensors(vit_graph):
    clone = vit_graph.clone()
    before = model_digest(clone)

    clone.set_parameter("head.bias", clone.parameter("head.bias") + 1.0)

    assert model_digest(vit_graph) == before
    assert model_digest(clone) != before


def test_every_kind_of_tensor_enters():
    class Holder(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.register_buffer("value", value)

    values = [
        torch.zeros(()),
        torch.zeros(1),
        torch.zeros(0),
        torch.zeros(1, dtype=torch.bfloat16),
        torch.zeros(1, dtype=torch.bool),
        torch.zeros(2, 3).T,
        torch.zeros(2, 3),
    ]

    assert len({model_digest(Holder(value)) for value in values}) == len(values)


def test_versions_name_what_computes_and_the_source_of_this_package(monkeypatch):
    found = computing_versions()

    assert found["torch"] == torch.__version__
    assert {"numpy", "pillow"} <= set(found)
    assert len(found["vitcompress_source"]) == 16
    assert found == computing_versions()


def test_source_digest_reads_what_computes_and_not_what_prints(tmp_path, monkeypatch):
    package = tmp_path / "vitcompress"
    for name in ("models/identity.py", "passes/a.py", "cli/a.py", "terminal.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("one")
    (tmp_path / "calib").mkdir()
    monkeypatch.setattr(identity, "__file__", str(package / "models" / "identity.py"))
    before = computing_versions()["vitcompress_source"]

    (package / "cli" / "a.py").write_text("two")
    (package / "terminal.py").write_text("two")
    assert computing_versions()["vitcompress_source"] == before

    (package / "passes" / "a.py").write_text("two")
    assert computing_versions()["vitcompress_source"] != before


def test_depth_and_seed_are_other_models():
    assert model_digest(enliven(TinyViT(depth=1))) != model_digest(enliven(TinyViT(depth=2)))
    assert model_digest(tiny_vit(seed=1)) != model_digest(tiny_vit(seed=2))
