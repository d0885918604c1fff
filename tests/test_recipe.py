from copy import deepcopy

import pytest
import yaml

from vitcompress.errors import ConfigError
from vitcompress.graph import Role
from vitcompress.recipe import (
    Recipe,
    Scheme,
    available_recipes,
    load_recipe,
)

MINIMAL = {
    "schema": 1,
    "name": "test",
    "scheme": "W4A8",
    "passes": [
        {"pass": "attach", "rules": [{"roles": ["weight"], "bits": "w"}]},
        {"pass": "calibrate", "method": "minmax"},
        {"pass": "freeze"},
    ],
}


def changed(*path_and_value):
    """Return the minimal recipe with the value at a path replaced, or added."""
    *path, value = path_and_value
    fields = deepcopy(MINIMAL)
    target = fields
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    return fields


# Shipped recipes


def attach_rules(recipe):
    return next(step for step in recipe.passes if step.name == "attach").config.rules


@pytest.mark.parametrize("scheme", ["W4A4", "W8A8", "W3A8", "W2A2"])
@pytest.mark.parametrize("name", available_recipes())
def test_shipped_recipes_are_valid_for_every_scheme(name, scheme):
    recipe = load_recipe(name, scheme=Scheme.parse(scheme))

    assert recipe.name == name
    assert recipe.description
    bits = {rule.bits for rule in attach_rules(recipe)}
    assert bits <= {Scheme.parse(scheme).weight_bits, Scheme.parse(scheme).activation_bits, 8}


@pytest.mark.parametrize("name", available_recipes())
def test_a_normalised_recipe_is_a_recipe_and_says_the_same(name):
    recipe = load_recipe(name)

    again = Recipe.from_dict(yaml.safe_load(recipe.to_yaml()))

    assert again.to_dict() == recipe.to_dict()
    assert [step.config for step in again.passes] == [step.config for step in recipe.passes]


@pytest.mark.parametrize("name", available_recipes())
def test_shipped_recipes_leave_no_role_to_chance(name):
    rules = attach_rules(load_recipe(name))

    assert {role for rule in rules for role in rule.roles} == set(Role)


def test_a_name_may_carry_the_scheme():
    assert load_recipe("repq_vit-w6a3").label == "repq_vit-w6a3"
    assert load_recipe("repq_vit").label == "repq_vit-w4a4"


# Reading


def test_words_for_bits_take_the_numbers_of_the_scheme():
    recipe = Recipe.from_dict(
        changed("passes", 0, "rules", 0, {"roles": ["weight", "query"], "bits": "a"}),
        scheme=Scheme(3, 5),
    )

    assert recipe.passes[0].config.rules[0].bits == 5
    assert recipe.to_dict()["passes"][0]["rules"][0]["bits"] == 5
    assert recipe.scheme == Scheme(3, 5)


def test_every_default_is_written_out():
    fields = Recipe.from_dict(MINIMAL).to_dict()

    assert fields["seed"] == 0
    assert fields["passes"][1]["steps"] == 32
    assert fields["passes"][0]["rules"][0]["strict"] is True


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("sed",), 1, r"unknown key 'sed'; did you mean 'seed'\?"),
        (
            ("passes", 1, "metod"),
            "mse",
            r"passes\[1\] 'calibrate': .*'metod'; did you mean 'method'",
        ),
        (
            ("passes", 0, "rules", 0, "bitz"),
            4,
            r"passes\[0\] 'attach': rules\[0\]: unknown key 'bitz'; did you mean 'bits'\?",
        ),
        (
            ("passes", 2, "pass"),
            "freez",
            r"passes\[2\]: no pass 'freez'; did you mean 'freeze'\?",
        ),
        (("schema",), 2, "schema 2 is unknown; expected 1"),
        (("passes",), [], "expected a list of at least one pass"),
        (("passes",), {"pass": "attach"}, "expected a list of at least one pass"),
        (("passes", 0), "attach", "expected a mapping with key 'pass', got 'attach'"),
        (("passes", 0, "rules", 0, "roles"), ["wait"], r"rules.0.roles.0: .*got 'wait'"),
        (("passes", 1, "method"), "best", "method: .*'minmax'.*got 'best'"),
        (("passes", 1, "steps"), 0, "steps: expected at least 1, got 0"),
        (("scheme",), "4 bits", "scheme: expected a form like W4A8, got '4 bits'"),
        (("seed",), "abc", "seed: expected a whole number from 0, got 'abc'"),
        (("seed",), None, "seed: expected a whole number"),
        (("seed",), -1, "seed: expected a whole number"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(path, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.from_dict(changed(*path, value), where="mine.yaml")

    if path != ("scheme",):
        assert str(caught.value).startswith("mine.yaml: ")


@pytest.mark.parametrize("bits", [0, 1, 9, -4, "four", 4.5, None, [4]])
def test_bits_that_are_none_are_refused(bits):
    with pytest.raises(ConfigError, match=r"passes\[0\] 'attach': .*bits"):
        Recipe.from_dict(changed("passes", 0, "rules", 0, "bits", bits))


@pytest.mark.parametrize("key", ["schema", "name", "scheme", "passes"])
def test_a_missing_key_is_named(key):
    fields = {name: value for name, value in MINIMAL.items() if name != key}

    with pytest.raises(ConfigError, match=f"key '{key}' is missing"):
        Recipe.from_dict(fields)


@pytest.mark.parametrize("content", [None, [], "attach", 4])
def test_content_that_is_no_mapping_is_refused(content):
    with pytest.raises(ConfigError, match="expected a mapping"):
        Recipe.from_dict(content)


# Order


def order(*names):
    known = {step["pass"]: step for step in MINIMAL["passes"]} | {
        "repq_vit": {"pass": "repq_vit"}
    }
    return Recipe.from_dict({**MINIMAL, "passes": [known[name] for name in names]})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["calibrate"],
            r"passes\[0\] 'calibrate' needs 'attached', .*; add 'attach' before it",
        ),
        (
            ["attach", "freeze"],
            r"passes\[1\] 'freeze' needs 'calibrated', .*; add 'calibrate'",
        ),
        (["attach", "repq_vit"], r"'repq_vit' needs 'calibrated'.*add 'calibrate' before it"),
        (
            ["attach", "attach"],
            r"passes\[1\] 'attach' cannot follow a pass that provides 'attached'",
        ),
        (["attach", "calibrate", "freeze", "repq_vit"], "'repq_vit' cannot follow .*'final'"),
    ],
)
def test_an_order_that_cannot_work_is_refused_before_a_model_is_seen(names, message):
    with pytest.raises(ConfigError, match=message):
        order(*names)


def test_an_order_that_works_is_accepted():
    recipe = order("attach", "calibrate", "repq_vit", "calibrate", "freeze")

    assert [step.name for step in recipe.passes][2] == "repq_vit"


def test_calibrating_some_roles_is_not_calibrating():
    fields = changed("passes", 1, {"pass": "calibrate", "roles": ["weight"]})

    with pytest.raises(ConfigError, match="'freeze' needs 'calibrated'"):
        Recipe.from_dict(fields)


# Files and overrides


def test_a_file_is_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")

    assert load_recipe(path).to_dict() == Recipe.from_dict(MINIMAL).to_dict()


@pytest.mark.parametrize("text", ["{", "a: b: c", "\x00", "- !!python/object:os.system x"])
def test_a_file_that_is_not_yaml_is_refused_in_one_line(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError, match=r"mine.yaml: not valid YAML: ") as caught:
        load_recipe(path)

    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00\xd8")

    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"nowhere.yaml: cannot read the recipe: No such file"
    ):
        load_recipe(tmp_path / "nowhere.yaml")


def test_a_recipe_that_does_not_exist_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"no recipe 'repq-vit'; did you mean 'repq_vit'\?; shipped"
    ):
        load_recipe("repq-vit")


def test_overrides_replace_settings():
    recipe = load_recipe(
        "repq_vit",
        overrides=[
            "passes.1.method=minmax",
            "seed=7",
            "passes.0.rules.0.bits=6",
            "passes.1.percentiles=[0.9]",
        ],
    )

    assert recipe.passes[1].config.method == "minmax"
    assert recipe.passes[1].config.percentiles == (0.9,)
    assert recipe.passes[0].config.rules[0].bits == 6
    assert recipe.seed == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("passes.1.method", "--set passes.1.method: expected a form like"),
        (
            "passes.9.method=mse",
            "--set passes.9.method=mse: the recipe has no 'passes.9.method'",
        ),
        ("passes.x.method=mse", "the recipe has no 'passes.x.method'"),
        ("seed.deep=1", "the recipe has no 'seed.deep'"),
        ("passes.1.metod=mse", "unknown key 'metod'; did you mean 'method'"),
        ("passes.1.method={", "--set passes.1.method="),
    ],
)
def test_overrides_that_hit_nothing_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("repq_vit", overrides=[override])


# Scheme


@pytest.mark.parametrize("text", ["W4A8", "w4a8", " W4A8 "])
def test_a_scheme_is_parsed_whatever_its_case(text):
    assert Scheme.parse(text) == Scheme(4, 8)
    assert str(Scheme.parse(text)) == "W4A8"


@pytest.mark.parametrize("text", ["", "W4", "A8W4", "4/8", "W4A8x", "W-4A8", "WfourA8"])
def test_a_scheme_of_another_form_is_refused(text):
    with pytest.raises(ConfigError, match="scheme: expected a form like W4A8"):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "word"), [("W1A8", "weight"), ("W4A9", "activation"), ("W0A8", "weight")]
)
def test_a_scheme_out_of_range_is_refused(text, word):
    with pytest.raises(ConfigError, match=f"{word} bits must be between 2 and 8"):
        Scheme.parse(text)
