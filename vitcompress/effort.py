"""Efforts: what a user will spend, and the recipe that was measured to be best for it.

The figures behind each choice are in ``benchmarks/results``; a new pass takes a place here
only with a gain on real images.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from vitcompress.errors import ConfigError
from vitcompress.recipe import Scheme

__all__ = ["EFFORTS", "Effort", "effort_named"]


@dataclass(frozen=True)
class Effort:
    """One rung of the ladder.

    Attributes:
        description: Cost and means, for help texts.
        samples: Calibration images.
        recipe: Name of the recipe for every scheme that has none of its own.
        exceptions: Recipe names by scheme.
    """

    description: str
    samples: int
    recipe: str
    exceptions: Mapping[str, str] = field(default_factory=dict)

    def recipe_for(self, scheme: Scheme) -> str:
        """Return the name of the recipe for a scheme."""
        return self.exceptions.get(str(scheme), self.recipe)


#: By the name users give.
EFFORTS: dict[str, Effort] = {
    "fast": Effort("closed form, minutes on two cores", 64, "fast"),
    "balanced": Effort("trained for half an hour on two cores", 512, "balanced"),
    "best": Effort("trained for hours on two cores", 1024, "best"),
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
