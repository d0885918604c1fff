"""Efforts: each serves every scheme, and a word that is none gets an answer."""

import pytest

from vitcompress.effort import EFFORTS, Effort, effort_named
from vitcompress.errors import ConfigError
from vitcompress.recipe import Scheme, load_recipe

SCHEMES = ("W8A8", "W6A6", "W4A8", "W4A4", "W3A4", "W3A3", "W2A8")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", EFFORTS)
def test_every_effort_has_a_recipe_for_every_scheme(name, scheme):
    chosen = EFFORTS[name].recipe_for(Scheme.parse(scheme))

    assert load_recipe(chosen, scheme=Scheme.parse(scheme)).scheme == Scheme.parse(scheme)


def test_what_runtimes_execute_has_a_recipe_of_its_own():
    effort = Effort("words", 8, "executed", "narrow")

    assert [effort.recipe_for(Scheme(4, bits)) for bits in (8, 7, 4)] == [
        "executed",
        "narrow",
        "narrow",
    ]


def test_only_fast_passes_train_nothing():
    trained = {"reconstruct", "is_vit", "mlp_reconstruction"}
    for scheme in SCHEMES:
        chosen = EFFORTS["fast"].recipe_for(Scheme.parse(scheme))
        passes = load_recipe(chosen, scheme=Scheme.parse(scheme)).passes
        assert not trained & {step.name for step in passes}


def test_images_grow_with_effort():
    samples = [effort.samples for effort in EFFORTS.values()]

    assert list(EFFORTS) == ["fast", "balanced", "best"]
    assert samples == sorted(samples)


def test_an_unknown_effort_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="got 'fasst'; did you mean 'fast'"):
        effort_named("fasst")
