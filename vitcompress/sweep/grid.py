"""The grid of a sweep: which schemes, recipes and seeds are crossed."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from vitcompress.errors import ConfigError
from vitcompress.recipe import Recipe, Scheme, load_recipe

__all__ = ["parse_schemes", "parse_seeds", "planned_recipes"]

_Item = TypeVar("_Item")

#: More seeds than this are a slip of the hand.
MAX_SEEDS = 1000
_ALL_SCHEMES = [
    f"W{weight}A{activation}" for weight in range(2, 9) for activation in range(2, 9)
]


def parse_schemes(schemes: str | Sequence[str | Scheme]) -> tuple[Scheme, ...]:
    """Return the schemes of a list such as ``W8A8,W4A4``, each once.

    Raises:
        ConfigError: One is no scheme, or there is none.
    """
    found = [s if isinstance(s, Scheme) else _scheme(s) for s in _words(schemes)]
    if not found:
        raise ConfigError("schemes: expected a list like W8A8,W4A4, found nothing")
    return tuple(dict.fromkeys(found))


def parse_seeds(seeds: str | Sequence[int]) -> tuple[int, ...]:
    """Return the seeds of a list such as ``0..2,7``, each once; ranges include both ends.

    Raises:
        ConfigError: It is no such list.
    """
    found: list[int] = []
    for word in _words(seeds):
        match = re.fullmatch(r"(\d{1,10})(?:\.\.(\d{1,10}))?", str(word), flags=re.ASCII)
        if match is None:
            raise ConfigError(
                f"seeds: expected whole numbers and ranges like 0..2,7, got '{word}'"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"seeds: {word} counts down; write {last}..{first}")
        if last >= 2**32:
            raise ConfigError(f"seeds: expected numbers below 2^32, got {last}")
        if len(found) + last - first >= MAX_SEEDS:
            raise ConfigError(f"seeds: {word} makes more than {MAX_SEEDS} seeds")
        found.extend(range(first, last + 1))
    if not found:
        raise ConfigError("seeds: expected a list like 0..2, found nothing")
    return tuple(dict.fromkeys(found))


def planned_recipes(
    recipes: str | Sequence[str | Path], schemes: Sequence[Scheme], seeds: Sequence[int]
) -> tuple[tuple[str, ...], list[Recipe]]:
    """Return the recipes' own names, and the recipe of every cell in order.

    Recipes change slowest, then seeds, then schemes: cells that share statistics are
    neighbours.

    Args:
        recipes: Shipped names or files, as ``load_recipe`` takes them.
        schemes: Widths.
        seeds: Seeds.

    Raises:
        ConfigError: A recipe is unknown or not valid, or two have one name.
    """
    origins: dict[str, str | Path] = {}
    cells: list[Recipe] = []
    for word in dict.fromkeys(_words(recipes)):
        widths = [load_recipe(word, scheme=scheme) for scheme in schemes]
        # One word may stand for recipes of several names, by width.
        names = dict.fromkeys(recipe.name for recipe in widths)
        for name in names:
            if name in origins:
                raise ConfigError(
                    f"recipes: {origins[name]} and {word} are both called '{name}'; give each "
                    "file a name of its own"
                )
        origins |= dict.fromkeys(names, word)
        cells += [dataclasses.replace(r, seed=seed) for seed in seeds for r in widths]
    if not cells:
        raise ConfigError("recipes: expected a list like deploy,repq_vit, found nothing")
    return tuple(origins), cells


def _words(items: str | Iterable[_Item]) -> list[str | _Item]:
    if isinstance(items, str):
        return [word.strip() for word in items.split(",") if word.strip()]
    return list(items)


def _scheme(text: str) -> Scheme:
    try:
        return Scheme.parse(text)
    except ConfigError as error:
        close = difflib.get_close_matches(text.strip().upper(), _ALL_SCHEMES, n=1, cutoff=0.5)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        reason = str(error).removeprefix("scheme: ")
        raise ConfigError(f"schemes: '{text}': {reason}{hint}") from error
