"""Damaged and hostile directories: refused with exit code 5, and nothing in them runs."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from finished import edit_json, quantized, renew_digest
from safetensors.torch import load_file, save_file

import vitcompress
from vitcompress.errors import ArtifactError


@pytest.fixture(scope="module")
def original(vit_graph, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "artefact"
    quantized(vit_graph, source, recipe="deploy").save(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "artefact"))


def refusal(folder):
    with pytest.raises(ArtifactError) as caught:
        vitcompress.load(folder)
    assert caught.value.exit_code == 5
    return str(caught.value)


def first(graph, op, target=""):
    return next(n for n in graph["nodes"] if n["op"] == op and n["target"].startswith(target))


def set_first(kind, **fields):
    return lambda graph: first(graph, kind).update(fields)


# Damage


@pytest.mark.parametrize(
    "name", ["graph.json", "quantizers.json", "recipe.yaml", "report.json"]
)
def test_changed_file_is_refused_by_its_digest(folder, name):
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace("8", "7", 1))

    message = refusal(folder)

    assert str(folder / name) in message
    assert "does not match the manifest" in message


def test_one_flipped_bit_of_the_weights_is_refused(folder):
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(content)

    assert "weights.safetensors: content does not match the manifest" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "graph.json",
        "manifest.json",
        "quantizers.json",
        "recipe.yaml",
        "report.json",
        "weights.safetensors",
    ],
)
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()

    assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize("name", ["recipe.yaml", "report.json", "weights.safetensors"])
def test_file_that_the_manifest_does_not_list_is_missed(folder, name):
    edit_json(folder, "manifest.json", lambda m: m["files"].pop(name))

    assert name in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -50])
def test_truncated_weights_are_refused_even_with_a_matching_digest(folder, keep):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    renew_digest(folder, path.name)

    assert str(path) in refusal(folder)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "files": []}', "[" * 100_000],
)
def test_broken_manifest_is_refused(folder, content):
    (folder / "manifest.json").write_text(content)

    assert str(folder / "manifest.json") in refusal(folder)


@pytest.mark.parametrize(
    "settings", [None, [], {"preprocessing": []}, {"preprocessing": {"a": 1}}, {}]
)
def test_broken_settings_are_refused(folder, settings):
    edit_json(folder, "manifest.json", lambda m: m.update(settings=settings))

    refusal(folder)


@pytest.mark.parametrize("name", ["manifest.json", "graph.json"])
def test_unknown_format_is_refused_with_the_known_one(folder, name):
    edit_json(folder, name, lambda content: content.update(format=2))

    assert "format 2" in refusal(folder)


def test_report_of_a_later_schema_is_refused(folder):
    edit_json(folder, "report.json", lambda report: report.update(schema_version=2))

    assert "schema_version 2; this version reads 1" in refusal(folder)


def test_recipe_that_is_none_is_refused(folder):
    for text in ("passes: 3", "{", "- a", "schema: 1"):
        (folder / "recipe.yaml").write_text(text)
        renew_digest(folder, "recipe.yaml")

        assert "recipe.yaml" in refusal(folder) or "artefact" in refusal(folder)


def test_recipe_cannot_name_python_objects(folder, tmp_path):
    marker = tmp_path / "marker"
    (folder / "recipe.yaml").write_text(f"!!python/object/apply:os.mkdir ['{marker}']")
    renew_digest(folder, "recipe.yaml")

    refusal(folder)

    assert not marker.exists()


def test_directory_without_a_manifest_is_no_artefact(tmp_path):
    assert "is this an artefact directory?" in refusal(tmp_path)
    assert "is this an artefact directory?" in refusal(tmp_path / "nowhere")


# Hostile graphs


@pytest.mark.parametrize(
    "target",
    [
        "aten.from_file.default",
        "aten.from_file.out",
        "aten.add_.Tensor",
        "aten.add.out",
        "aten.set_.source_Storage",
        "aten.no_such_op.default",
        "aten.linear",
        "aten.linear.default.extra",
        "aten.__class__.__init__",
        "aten.add.__class__",
        "aten.add.__getattribute__",
        "torch.sym_nothing",
        "prims.convert_element_type.default",
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "operator.attrgetter",
        "eval",
        "getattr",
        "",
        3,
    ],
)
def test_operator_outside_the_graph_language_is_refused(folder, target):
    edit_json(folder, "graph.json", set_first("call_function", target=target))

    assert "graph.json" in refusal(folder)


@pytest.mark.parametrize(
    "target", ["os.system", "quantizers", "patch_embed", "../quantizers.x"]
)
def test_module_that_is_no_quantizer_is_refused(folder, target):
    edit_json(folder, "graph.json", set_first("call_module", target=target))

    assert "is not a quantizer" in refusal(folder)


def test_quantizer_that_is_not_listed_is_refused(folder):
    edit_json(folder, "graph.json", set_first("call_module", target="quantizers.other"))

    assert "lists no such quantizer" in refusal(folder)


@pytest.mark.parametrize("op", ["call_method", "import", "root", ""])
def test_other_opcode_is_refused(folder, op):
    edit_json(folder, "graph.json", set_first("call_function", op=op, target="numpy"))

    assert f"opcode '{op}' is not part of the graph language" in refusal(folder)


def code_for(marker):
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def input_default(graph, code):
    node = first(graph, "placeholder")
    node["target"] = f"{node['name']}={code}"


def second_input(graph, code):
    graph["nodes"].insert(
        1,
        {"name": "x", "op": "placeholder", "target": f"x={code}", "tensor": ["float32", [1]]},
    )


def argument_name(graph, code):
    first(graph, "call_function")["kwargs"] = {f"a={code}, b": 1}


def tensor_name(graph, code):
    first(graph, "get_attr")["target"] = f'a") or {code} or ("'


def module_name(graph, code):
    first(graph, "call_module")["target"] = f'quantizers.a") or {code} or ("'


def node_name(graph, code):
    first(graph, "call_function")["name"] = f"a = {code}; b"


@pytest.mark.parametrize(
    "attack",
    [input_default, second_input, argument_name, tensor_name, module_name, node_name],
)
def test_code_in_the_place_of_a_name_does_not_run(folder, tmp_path, attack):
    marker = tmp_path / "marker"
    edit_json(folder, "graph.json", lambda graph: attack(graph, code_for(marker)))

    message = refusal(folder)

    assert not marker.exists()
    assert "graph.json" in message


def drop(graph, position):
    del graph["nodes"][position]


@pytest.mark.parametrize(
    "edit",
    [
        lambda g: g.pop("nodes"),
        lambda g: g.update(nodes=3),
        lambda g: g.update(nodes=[]),
        lambda g: drop(g, -1),
        lambda g: g["nodes"].reverse(),
        lambda g: g["nodes"].append(g["nodes"][0]),
        lambda g: g.update(outputs=["a", "b"]),
        lambda g: g.update(outputs=[]),
        lambda g: first(g, "output").update(args=[{"tuple": [3]}]),
        lambda g: first(g, "get_attr").pop("tensor"),
        lambda g: first(g, "get_attr").update(tensor=["float32", [[1]]]),
        lambda g: first(g, "get_attr").update(tensor=["float64", [1, 1, 32]]),
        lambda g: first(g, "get_attr").update(tensor=["float32", [1, 32]]),
        lambda g: first(g, "get_attr").update(target="no.such.tensor"),
        lambda g: first(g, "call_module").update(args=[]),
        lambda g: first(g, "call_module").update(args=[{"tuple": []}]),
        lambda g: first(g, "call_module").pop("tensor"),
        lambda g: first(g, "call_function").update(args=[{"node": "nowhere"}]),
        lambda g: first(g, "call_function").update(args=[{"dtype": "load"}]),
        lambda g: first(g, "call_function").update(args=[{"dtype": "float32", "node": "x"}]),
        lambda g: first(g, "call_function").update(args=[{"class": "float32"}]),
        lambda g: first(g, "call_function").update(args=[{}]),
        lambda g: first(g, "call_function").update(args=[{"device": "nowhere"}]),
    ],
)
def test_malformed_graph_is_refused(folder, edit):
    edit_json(folder, "graph.json", edit)

    refusal(folder)


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"format": 1}'])
@pytest.mark.parametrize("name", ["graph.json", "quantizers.json"])
def test_json_of_another_shape_is_refused(folder, name, content):
    (folder / name).write_text(content)
    renew_digest(folder, name)

    assert name in refusal(folder)


# Hostile file names


@pytest.mark.parametrize(
    "name", ["../secret.txt", "/etc/hostname", "a/b", "..", ".", "", "a\0b", "x" * 300]
)
def test_name_outside_the_directory_is_refused(folder, name):
    (folder.parent / "secret.txt").write_text("secret")
    edit_json(folder, "manifest.json", lambda m: m["files"].update({name: {"sha256": "0"}}))

    assert "secret" not in refusal(folder).replace("secret.txt", "")


def test_listed_file_that_is_no_text_is_refused(folder):
    (folder / "model.onnx").write_bytes(b"\xff\xfe\x00")
    renew_digest(folder, "model.onnx")

    assert "model.onnx: cannot be read as text" in refusal(folder)


def test_unlisted_files_are_left_unread(folder):
    (folder / "notes.bin").write_bytes(b"\xff\xfe\x00")

    vitcompress.load(folder)


# Hostile tensors


def edit_tensors(folder, edit):
    tensors = load_file(folder / "weights.safetensors")
    edit(tensors)
    save_file(tensors, folder / "weights.safetensors")
    renew_digest(folder, "weights.safetensors")


SCALE = "quantizers.blocks_0_fc1_weight.scale"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda t: t.pop("pos_embed"), "pos_embed"),
        (lambda t: t.update(pos_embed=torch.zeros(1, 17, 31)), "pos_embed"),
        (lambda t: t.update(pos_embed=t["pos_embed"].half()), "pos_embed"),
        (lambda t: t.pop("head.weight.codes"), "head.weight.codes"),
        (lambda t: t.update({"head.weight.codes": t["head.weight.codes"][:-1]}), "bytes"),
        (lambda t: t.pop(SCALE), SCALE),
        (lambda t: t.update({SCALE: t[SCALE][:-1].clone()}), SCALE),
        (lambda t: t.update({SCALE: t[SCALE].reshape(-1, 1)}), SCALE),
        (lambda t: t.update({SCALE: t[SCALE] * float("nan")}), "not finite"),
    ],
)
def test_tensor_that_does_not_fit_the_graph_is_refused(folder, edit, reason):
    edit_tensors(folder, edit)

    message = refusal(folder)

    assert "weights.safetensors" in message
    assert reason in message


@pytest.mark.parametrize(
    "change",
    [
        {"spec": {"bits": 9}},
        {"spec": None},
        {"frozen": True},
        {"site": None, "spec": {"granularity": {"kind": "per_planet"}}},
    ],
)
def test_quantizer_entry_that_does_not_fit_is_refused(folder, change):
    def edit(content):
        entry = content["quantizers"]["quantizers.blocks_0_fc1_input"]
        spec = change.get("spec", {})
        entry.update({k: v for k, v in change.items() if k != "spec"})
        entry["spec"] = None if spec is None else {**entry["spec"], **spec}

    edit_json(folder, "quantizers.json", edit)

    refusal(folder)


def test_unreadable_file_is_reported(folder, monkeypatch):
    def denied(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)

    assert "Permission denied" in refusal(folder)


def test_manifest_with_a_matching_digest_is_what_makes_an_edit_pass(folder):
    """Guards the helper: an edit that changes nothing loads."""
    edit_json(folder, "graph.json", lambda graph: json.dumps(graph))

    vitcompress.load(folder)
