"""Efforts: what a user will spend, and the recipe for it.

The recipes were chosen by the figures in ``benchmarks/results``, ``best`` by those at 3 bits.
A new pass takes a place here only with a gain on real images.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitcompress.errors import ConfigError
from vitcompress.recipe import Recipe, Scheme, load_recipe

__all__ = ["EFFORTS", "Effort", "effort_named", "resolve_recipe"]


@dataclass(frozen=True)
class Effort:
    """One rung of the ladder.

    Attributes:
        description: Cost and means, for help texts.
        samples: Calibration images.
        recipe: Name of the recipe for activations of 8 bits, which runtimes execute as
            integers: attention probabilities are spaced evenly.
        narrow: The same for narrower activations, whose probabilities need a logarithm.
            Runtimes look that up in tables: such files are for study.
    """

    description: str
    samples: int
    recipe: str
    narrow: str

    def recipe_for(self, scheme: Scheme) -> str:
        """Return the name of the recipe for a scheme."""
        return self.recipe if scheme.activation_bits == 8 else self.narrow


#: By the name users give.
EFFORTS: dict[str, Effort] = {
    "fast": Effort("closed form, minutes on two cores", 64, "fast", "fast_narrow"),
    "balanced": Effort(
        "every block trained on 512 images", 512, "balanced", "balanced_narrow"
    ),
    "best": Effort("trained longer, on 1,000 images", 1000, "best", "best_narrow"),
}


def effort_named(name: str) -> Effort:
    """Return an effort by name.

    Raises:
        ConfigError: There is none of this name.
    """
    if name in EFFORTS:
        return EFFORTS[name]
    near = difflib.get_close_matches(name, EFFORTS, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise ConfigError(f"effort: expected one of {', '.join(EFFORTS)}, got '{name}'{hint}")


def resolve_recipe(
    *,
    bits: int | None = None,
    scheme: str | Scheme | None = None,
    effort: str | None = None,
    recipe: str | Path | Recipe | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """Return the recipe that these settings mean.

    Raises:
        ConfigError: They contradict each other, or one is wrong.
    """
    if bits is not None and scheme is not None:
        raise ConfigError(f"give bits or scheme, not both; got {bits} and {scheme}")
    if effort is not None and recipe is not None:
        raise ConfigError("an effort chooses the recipe; give one or the other")
    chosen = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if bits is not None:
        chosen = Scheme(bits, 8)
    if isinstance(recipe, Recipe):
        if chosen is not None or overrides:
            raise ConfigError(
                "a Recipe object is complete; leave out bits, scheme and overrides"
            )
        return recipe
    if recipe is None:
        chosen = chosen or Scheme(8, 8)
        recipe = effort_named(effort or "fast").recipe_for(chosen)
    return load_recipe(recipe, scheme=chosen, overrides=overrides)
