"""The work behind the fixture: a sweep of the cells that a test names, and a verdict on it."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console
from torch import nn

import calib as images
from vitcompress.effort import EFFORTS
from vitcompress.errors import VitcompressError
from vitcompress.gate import GateReport, judge, read_baseline, update_baseline
from vitcompress.graph import CapturedGraph
from vitcompress.models import LoadedModel, load_model
from vitcompress.models.identity import model_digest
from vitcompress.recipe import Scheme
from vitcompress.result import Result
from vitcompress.sweep import Sweep, sweep
from vitcompress.verdict_tables import print_gate, print_update

__all__ = ["Gate", "Gates"]

Gate = Callable[..., GateReport | None]
Model = nn.Module | LoadedModel | CapturedGraph

#: Words of the command line, and what they are called here.
_SPELLINGS = {
    "--update-baseline": "--vitcompress-update-baseline",
    "--accept-improvement": "accept_improvement=True",
}


class Gates:
    """All gates of one run: its settings, and the float models that tests share.

    Args:
        config: Of pytest.
        folder: Empty; for the cells of this run.
    """

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._models: dict[tuple[object, ...], LoadedModel] = {}

    def gate(
        self,
        model: str | Path | Model,
        *,
        scheme: str,
        recipe: str | Path | None = None,
        baseline: str | Path | None = None,
        calib: str | Path | Callable[[int], images.Source] | None = None,
        eval: str | Path | images.Source | None = None,
        seed: int | str = 0,
        samples: int = 32,
        eval_samples: int | None = None,
        accept_improvement: bool = False,
        arch: str | None = None,
        num_classes: int | None = None,
        image_size: int | None = None,
        trust_input: bool = False,
    ) -> GateReport | None:
        """Return the verdict, or fail the test with it.

        Relative paths start at pytest's root directory. ``baseline``, ``calib`` and ``eval``
        may be left out where pytest.ini or the command line names them.

        Args:
            model: A module, or what ``vitcompress quantize`` takes.
            scheme: E.g. ``W4A8``; several with commas are computed together, which is faster
                than one after the other.
            recipe: Name or file; the default of the scheme if not given.
            baseline: YAML of accepted figures.
            calib: Calibration images, or a function from a seed to a source; rendered ones
                if nobody names any.
            eval: Labelled images.
            seed: Of the recipe and of the choice of calibration images; ``0..2`` for several.
            samples: Calibration images.
            eval_samples: Evaluation images; all by default.
            accept_improvement: Let figures pass that are better than the tolerance allows.
            arch: As for ``vitcompress quantize``, like those that follow.
            num_classes: See ``arch``.
            image_size: See ``arch``.
            trust_input: See ``arch``.

        Returns:
            ``None`` where the baseline was written instead.
        """
        try:
            path = self._baseline(baseline)
            self._check_alone()
            with warnings.catch_warnings():
                # The verdict is about figures; what libraries deprecate is not the test's.
                warnings.simplefilter("ignore")
                found = self._sweep(
                    self._model(model, arch, trust_input, num_classes, image_size),
                    scheme=scheme,
                    recipe=recipe,
                    calib=self._setting("calib", calib) or "synthetic",
                    eval=self._setting("eval", eval),
                    seed=seed,
                    samples=samples,
                    eval_samples=eval_samples,
                )
            return self._verdict(found, path, accept_improvement)
        except (VitcompressError, images.SourceError) as error:
            _fail(f"vitcompress_gate: {error}")

    # Arguments

    def _located(self, spec: str | Path) -> str:
        """Return a path below the root directory if there is something, else the text."""
        path = self._config.rootpath / spec
        return str(path) if path.exists() else str(spec)

    def _setting(self, name: str, given: Any) -> Any:
        """Return an argument, or what the command line or pytest.ini says instead."""
        if given is None:
            option = self._config.getoption(f"--vitcompress-{name}")
            given = option or self._config.getini(f"vitcompress_{name}") or None
        return self._located(given) if isinstance(given, (str, Path)) else given

    def _baseline(self, given: str | Path | None) -> Path:
        found = self._setting("baseline", given)
        if found is None:
            _fail(_missing("baseline", "baseline.yaml"))
        return Path(self._config.rootpath / found)

    def _check_alone(self) -> None:
        if self._updates() and hasattr(self._config, "workerinput"):
            _fail("vitcompress_gate: writing baselines needs one process; add -n 0")

    def _updates(self) -> bool:
        return bool(self._config.getoption("--vitcompress-update-baseline"))

    def _model(
        self,
        model: str | Path | Model,
        arch: str | None,
        trust_input: bool,
        num_classes: int | None,
        image_size: int | None,
    ) -> Model:
        if not isinstance(model, (str, Path)):
            return model
        settings = (str(model), arch, trust_input, num_classes, image_size)
        if settings not in self._models:
            self._models[settings] = load_model(
                self._located(model),
                arch=arch,
                trust_input=trust_input,
                num_classes=num_classes,
                image_size=image_size,
            )
        return self._models[settings]

    # Work

    def _sweep(
        self,
        model: Model,
        *,
        scheme: str,
        recipe: str | Path | None,
        calib: str | Callable[[int], images.Source],
        eval: str | images.Source | None,
        seed: int | str,
        samples: int,
        eval_samples: int | None,
    ) -> list[Result]:
        if eval is None:
            _fail(_missing("eval", "labels.csv"))
        # Schemes of one recipe are computed together.
        groups: dict[str, list[str]] = {}
        for word in scheme.split(","):
            chosen = recipe or EFFORTS["fast"].recipe_for(Scheme.parse(word))
            groups.setdefault(self._located(chosen), []).append(word.strip())
        folder = self._folder / model_digest(model)[:16]  # what one model says is shared
        found: list[Result] = []
        for name, schemes in groups.items():
            done = sweep(
                model,
                folder,
                schemes=schemes,
                recipes=[name],
                evaluation=eval,
                seeds=str(seed),
                calibration=calib,
                samples=samples,
                eval_samples=eval_samples,
                jobs=1,
            )
            _check_complete(done)
            found += done.results.values()
        return found

    def _verdict(
        self, found: list[Result], path: Path, accept_improvement: bool
    ) -> GateReport | None:
        text = io.StringIO()
        console = Console(file=text, width=120, color_system=None)
        if self._updates():
            print_update(console, str(path), update_baseline(path, found))
            print(text.getvalue())
            return None
        report = judge(
            found,
            read_baseline(path),
            accept_improvement=accept_improvement,
            complete=False,
        )
        print_gate(console, report)
        if not report.passed:
            _fail(text.getvalue())
        print(text.getvalue())
        return report


def _check_complete(done: Sweep) -> None:
    for error in done.failures.values():
        _fail(f"vitcompress_gate: quantization failed: {error}")


def _missing(name: str, example: str) -> str:
    return (
        f"vitcompress_gate: {name} is missing; give {name}='{example}', --vitcompress-{name}, "
        f"or vitcompress_{name} in pytest.ini"
    )


def _fail(text: str) -> NoReturn:
    for word, own in _SPELLINGS.items():
        text = text.replace(word, own)
    pytest.fail(text, pytrace=False)
