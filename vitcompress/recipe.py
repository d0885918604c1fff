"""Recipes: ordered passes with complete settings, checked before any model is loaded.

A recipe is YAML. Its scheme, e.g. ``W4A8``, gives meaning to the two words ``w`` and ``a``
where a rule says ``bits``; everything else is written out. There is no inheritance and no
condition.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from vitcompress.errors import ConfigError
from vitcompress.passes import PASSES, Fact, Pass

__all__ = ["Recipe", "Scheme", "available_recipes", "load_recipe"]

SCHEMA = 1
_KEYS = ("schema", "name", "description", "scheme", "seed", "passes")


@dataclass(frozen=True)
class Scheme:
    """Bits of weights and activations.

    Attributes:
        weight_bits: 2 to 8.
        activation_bits: 2 to 8.
    """

    weight_bits: int
    activation_bits: int

    def __post_init__(self) -> None:
        for label, bits in (
            ("weight", self.weight_bits),
            ("activation", self.activation_bits),
        ):
            if not 2 <= bits <= 8:
                raise ConfigError(f"{label} bits must be between 2 and 8, got {bits}")

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Return the scheme written as ``W4A8`` (case does not matter).

        Raises:
            ConfigError: The text has another form, or a width is out of range.
        """
        match = re.fullmatch(r"[wW](\d+)[aA](\d+)", text.strip())
        if match is None:
            raise ConfigError(f"scheme: expected a form like W4A8, got '{text}'")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"W{self.weight_bits}A{self.activation_bits}"


@dataclass(frozen=True)
class Recipe:
    """A validated recipe.

    Attributes:
        name: Short name, e.g. ``repq_vit``.
        scheme: Bits that ``w`` and ``a`` stood for.
        seed: Seeds everything random in the passes.
        passes: The passes in order, with their settings.
        description: One line for people.
    """

    name: str
    scheme: Scheme
    seed: int
    passes: tuple[Pass, ...]
    description: str = ""

    @property
    def label(self) -> str:
        """Name and scheme, e.g. ``repq_vit-w4a8``."""
        return f"{self.name}-{str(self.scheme).lower()}"

    @classmethod
    def from_dict(
        cls, fields: Mapping[str, Any], *, scheme: Scheme | None = None, where: str = "recipe"
    ) -> "Recipe":
        """Return the recipe written in ``fields``.

        Args:
            fields: Content of a recipe file.
            scheme: Used instead of the recipe's own.
            where: File or name, for messages.

        Raises:
            ConfigError: A key is unknown or missing, a value is out of range, or the passes
                cannot follow one another.
        """
        if not isinstance(fields, Mapping):
            raise ConfigError(f"{where}: expected a mapping with keys {list(_KEYS)}")
        _refuse_unknown(fields, _KEYS, where)
        for key in ("schema", "name", "scheme", "passes"):
            if key not in fields:
                raise ConfigError(f"{where}: key '{key}' is missing")
        if fields["schema"] != SCHEMA:
            raise ConfigError(
                f"{where}: schema {fields['schema']!r} is unknown; expected {SCHEMA}"
            )
        if not isinstance(fields["passes"], list) or not fields["passes"]:
            raise ConfigError(f"{where}: passes: expected a list of at least one pass")
        seed = fields.get("seed", 0)
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ConfigError(f"{where}: seed: expected a whole number from 0, got {seed!r}")
        chosen = scheme or Scheme.parse(str(fields["scheme"]))
        passes = tuple(
            _make_pass(entry, chosen, f"{where}: passes[{index}]")
            for index, entry in enumerate(fields["passes"])
        )
        _check_order(passes, where)
        return cls(
            name=str(fields["name"]),
            scheme=chosen,
            seed=seed,
            passes=passes,
            description=str(fields.get("description", "")),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the normalised recipe: every default written out, bits as numbers."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "description": self.description,
            "scheme": str(self.scheme),
            "seed": self.seed,
            "passes": [{"pass": p.name, **_plain(p.config)} for p in self.passes],
        }

    def to_yaml(self) -> str:
        """Return :meth:`to_dict` as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=100)


def recipe_folder() -> Path:
    """Return the folder of the recipes that ship with the library."""
    packaged = Path(__file__).parent / "_recipes"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes"


def available_recipes() -> dict[str, Path]:
    """Return the shipped recipes by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def load_recipe(
    name: str | Path, *, scheme: Scheme | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """Return a recipe by shipped name, by name and scheme, or from a file.

    Args:
        name: ``repq_vit``, ``repq_vit-w4a4`` or the path of a YAML file.
        scheme: Overrides the recipe's own.
        overrides: Settings such as ``passes.1.method=minmax``.

    Raises:
        ConfigError: There is no such recipe, or it is not valid.
    """
    text = str(name)
    shipped = available_recipes()
    match = re.fullmatch(r"(.+)-(w\d+a\d+)", text)
    if text in shipped:
        path = shipped[text]
    elif match is not None and match[1] in shipped:
        path = shipped[match[1]]
        scheme = scheme or Scheme.parse(match[2])
    elif text.endswith((".yaml", ".yml")) or "/" in text:
        path = Path(text)
    else:
        raise ConfigError(
            f"no recipe '{text}'{_nearest(text, shipped)}; shipped: {list(shipped)}"
        )
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML: {detail}") from error
    for override in overrides:
        _override(fields, override)
    return Recipe.from_dict(fields, scheme=scheme, where=path.name)


def _make_pass(entry: Any, scheme: Scheme, where: str) -> Pass:
    if not isinstance(entry, Mapping) or "pass" not in entry:
        raise ConfigError(f"{where}: expected a mapping with key 'pass', got {entry!r}")
    name = str(entry["pass"])
    if name not in PASSES:
        raise ConfigError(
            f"{where}: no pass '{name}'{_nearest(name, PASSES)}; known: {list(PASSES)}"
        )
    kind = PASSES[name]
    settings = {key: value for key, value in entry.items() if key != "pass"}
    _check_keys(settings, kind.config_type, f"{where} '{name}'")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind.config_type)
        config = adapter.validate_python(_with_bits(settings, scheme))
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{where} '{name}': {location}: {first['msg']}, got {first.get('input')!r}"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{where} '{name}': {error}") from error
    return kind(config)


def _with_bits(value: Any, scheme: Scheme) -> Any:
    """Return settings with ``bits: w`` and ``bits: a`` replaced by numbers."""
    if isinstance(value, list):
        return [_with_bits(item, scheme) for item in value]
    if not isinstance(value, Mapping):
        return value
    meaning = {"w": scheme.weight_bits, "a": scheme.activation_bits}
    return {
        key: meaning.get(item, item)
        if key == "bits" and isinstance(item, str)
        else _with_bits(item, scheme)
        for key, item in value.items()
    }


def _check_keys(settings: Mapping[str, Any], config_type: type, where: str) -> None:
    """Refuse keys that are no fields, in nested settings as well."""
    fields = typing.get_type_hints(config_type)
    _refuse_unknown(settings, list(fields), where)
    for key, value in settings.items():
        nested = [t for t in typing.get_args(fields[key]) if dataclasses.is_dataclass(t)]
        for index, item in enumerate(value if nested and isinstance(value, list) else []):
            if isinstance(item, Mapping):
                _check_keys(item, typing.cast(type, nested[0]), f"{where}: {key}[{index}]")


def _refuse_unknown(found: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in found:
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key '{key}'{_nearest(str(key), known)}; "
                f"known: {list(known)}"
            )


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _check_order(passes: Sequence[Pass], where: str) -> None:
    """Refuse an order in which a pass lacks a fact it needs, or meets one it cannot bear."""
    facts: set[Fact] = set()
    for index, step in enumerate(passes):
        for fact in sorted(step.requires - facts):
            provider = next((n for n, p in PASSES.items() if fact in p.provides), "none")
            raise ConfigError(
                f"{where}: passes[{index}] '{step.name}' needs '{fact}', which no earlier "
                f"pass provides; add '{provider}' before it"
            )
        for fact in sorted(step.forbids & facts):
            raise ConfigError(
                f"{where}: passes[{index}] '{step.name}' cannot follow a pass that provides "
                f"'{fact}'; move it up"
            )
        facts |= step.provides


def _override(fields: Any, text: str) -> None:
    """Apply one ``key.path=value`` to the content of a recipe file, in place."""
    path, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: expected a form like passes.1.method=minmax")
    *parents, last = path.split(".")
    target = fields
    try:
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target[part]
        parsed = yaml.safe_load(value)
        if isinstance(target, list):
            target[int(last)] = parsed
        else:
            target[last] = parsed
    except (KeyError, IndexError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"--set {text}: the recipe has no '{path}'") from error


def _plain(value: Any) -> Any:
    """Return dataclasses as dicts, tuples as lists, enums as their values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value
