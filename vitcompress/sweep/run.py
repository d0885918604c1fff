"""Run a sweep: find out which cells are missing, and have them computed."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

import calib
from vitcompress import api
from vitcompress.errors import ConfigError, InputError
from vitcompress.graph import CapturedGraph
from vitcompress.models import LoadedModel
from vitcompress.models.identity import computing_versions, model_digest
from vitcompress.recipe import Recipe, Scheme
from vitcompress.result import ImageSet, Origin, Outcomes, Result, read_result
from vitcompress.sweep.bench import peak_bytes
from vitcompress.sweep.engines import ENGINES, Answer, Cell, map_cells
from vitcompress.sweep.grid import parse_schemes, parse_seeds, planned_recipes
from vitcompress.sweep.on_ray import library
from vitcompress.sweep.records import FailedCell, GridCell, Sweep, SweepFolder, SweepIndex
from vitcompress.sweep.shared import SharedFiles

__all__ = ["sweep"]

#: A model that ``api.quantize`` takes.
Model = nn.Module | LoadedModel | CapturedGraph


def sweep(
    model: Model,
    output: str | Path,
    *,
    schemes: str | Sequence[str | Scheme],
    recipes: str | Sequence[str | Path],
    evaluation: str | Path | calib.Source,
    seeds: str | Sequence[int] = "0",
    calibration: str | Path | Callable[[int], calib.Source] = "synthetic",
    samples: int = api.DEFAULT_SAMPLES,
    eval_samples: int | None = None,
    batch_size: int = 32,
    jobs: int | None = None,
    engine: str = "local",
    address: str | None = None,
    model_id: str = "",
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> Sweep:
    """Quantize and evaluate a model in every cell of a grid; cells that are there are kept.

    A cell is decided by the model, the recipe with its scheme and seed, the images and the
    versions of what computes; see ``Origin``. One that fails is recorded, and tried again by
    the next run. Each cell is computed by one process with one thread, so that results do not
    depend on how many run side by side.

    Args:
        model: Any module from images to logits, or a graph captured from one.
        output: Directory of the sweep: new, empty, or of an earlier sweep of this model.
        schemes: E.g. ``W8A8,W4A4``.
        recipes: Names or files, e.g. ``deploy,repq_vit``.
        evaluation: Images that outcomes are about; without labels there is no accuracy.
        seeds: E.g. ``0..2``: of recipes, and of the choice of calibration images.
        calibration: What ``calib.open_source`` takes, or a function from a seed to a source.
        samples: Calibration images.
        eval_samples: Evaluation images; all by default.
        batch_size: Images in a batch.
        jobs: Most cells at a time; as many as there are processors by default. Fewer run
            where memory is short.
        engine: ``local``, or ``ray`` for a Ray cluster.
        address: Of the cluster; a Ray of this machine by default.
        model_id: What to call the model.
        command: Command line, for the record.
        say: Takes a line for the user now and then.

    Raises:
        ConfigError: A setting is wrong, or the directory is taken.
        InputError: Weights are not finite, or a label is no class of the model.
        UnsupportedModelError: The model cannot be captured.
        calib.SourceError: Images cannot be read.
    """
    _check(engine, address, jobs)
    widths, numbers = parse_schemes(schemes), parse_seeds(seeds)
    names, cells = planned_recipes(recipes, widths, numbers)
    sources = {
        seed: api.bound_source(model, _opened(calibration, samples, seed, batch_size))
        for seed in numbers
    }
    images = api.bound_source(model, _opened(evaluation, eval_samples, 0, batch_size))
    digest, name = model_digest(model), model_id or _name(model)
    origins = _origins(
        cells, name, digest, {seed: ImageSet.of(s) for seed, s in sources.items()}, images
    )
    plan = {origin.key(): origin for origin in origins}
    folder = SweepFolder(Path(output))
    with folder.held(name, digest) as index:
        results = _present(folder, plan, say)
        missing = [Cell(k, origin, command) for k, origin in plan.items() if k not in results]
        say(f"{len(plan)} cells, {len(results)} there already")
        if missing or index is None or not _serves(index, origins[0]):
            wanted = {
                cell.origin.seed: (sources[cell.origin.seed], cell.origin.calibration)
                for cell in missing
            }
            graph = _captured(model, images, model_id)
            reference = _shared(folder, graph, origins[0], images, list(wanted.values()))
            float_bytes = sum(t.numel() * t.element_size() for t in graph.tensors().values())
        else:
            reference, float_bytes = index.reference, index.float_bytes
        say(_about_reference(reference))
        grid = SweepIndex(
            model=name,
            model_digest=digest,
            schemes=tuple(str(scheme) for scheme in widths),
            recipes=names,
            seeds=numbers,
            cells=tuple(
                GridCell(key=key, recipe=o.recipe, scheme=o.scheme, seed=o.seed)
                for key, o in plan.items()
            ),
            evaluation=origins[0].evaluation,
            reference=reference,
            float_bytes=float_bytes,
            command=command,
        )
        folder.write(folder.path / "sweep.json", grid)
        computed, failures = _computed(
            folder, missing, results, say, engine=engine, address=address, jobs=jobs
        )
    found = {key: results[key] for key in plan if key in results}
    return Sweep(folder.path, grid, found, failures, computed)


def _check(engine: str, address: str | None, jobs: int | None) -> None:
    if engine not in ENGINES:
        raise ConfigError(f"engine: expected one of {list(ENGINES)}, got '{engine}'")
    if engine == "ray":
        library()
    if address is not None and engine != "ray":
        raise ConfigError("address: is for the engine 'ray' alone")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs: expected at least 1, got {jobs}")


def _opened(
    spec: str | Path | calib.Source | Callable[[int], calib.Source],
    samples: int | None,
    seed: int,
    batch_size: int,
) -> calib.Source:
    if isinstance(spec, calib.Source):
        return spec
    if callable(spec):
        return spec(seed)
    return calib.open_source(spec, samples=samples, seed=seed, batch_size=batch_size)


def _name(model: Model) -> str:
    if isinstance(model, CapturedGraph):
        return model.provenance.model
    return model.name if isinstance(model, LoadedModel) else type(model).__name__


def _captured(model: Model, images: calib.Source, model_id: str) -> CapturedGraph:
    first = next(iter(images)).images
    return api.captured(model, torch.zeros(2, *first.shape[1:]), model_id)


def _origins(
    cells: Sequence[Recipe],
    name: str,
    digest: str,
    calibration: dict[int, ImageSet],
    images: calib.Source,
) -> list[Origin]:
    evaluated, versions = ImageSet.of(images), computing_versions()
    return [
        Origin(
            model=name,
            model_digest=digest,
            recipe=recipe.name,
            scheme=str(recipe.scheme),
            resolved_recipe=recipe.to_yaml(),
            seed=recipe.seed,
            calibration=calibration[recipe.seed],
            evaluation=evaluated,
            versions=versions,
        )
        for recipe in cells
    ]


def _serves(index: SweepIndex, origin: Origin) -> bool:
    """Return whether the float reference of an index is that of a cell."""
    return (index.model, index.evaluation) == (origin.model, origin.evaluation)


def _shared(
    folder: SweepFolder,
    graph: CapturedGraph,
    origin: Origin,
    images: calib.Source,
    calibration: Sequence[tuple[calib.Source, ImageSet]],
) -> Outcomes:
    """Write what cells share; return what the float model says to the evaluation images."""
    shared = SharedFiles(folder.work)
    shared.write_graph(graph)
    identity = {"model": origin.model_digest, "versions": origin.versions}
    evaluated = shared.write_images(images, origin.evaluation)
    logits = shared.write_logits(graph, evaluated, folder.reference, identity)
    for source, known in calibration:
        stored = shared.write_images(source, known)
        shared.write_logits(graph, stored, folder.reference, identity)
    return Outcomes.of(logits, logits, evaluated.labels)


def _present(
    folder: SweepFolder, plan: dict[str, Origin], say: Callable[[str], None]
) -> dict[str, Result]:
    """Return the results that are there, by key."""
    found = {}
    for key, origin in plan.items():
        if not folder.cell(key).is_file():
            continue
        try:
            result = read_result(folder.cell(key))
        except InputError as error:
            say(f"{error}; computing it again")
            continue
        if result.origin == origin:
            found[key] = result
        else:
            say(f"{folder.cell(key)}: is not the cell of its name; computing it again")
    return found


def _computed(
    folder: SweepFolder,
    missing: Sequence[Cell],
    results: dict[str, Result],
    say: Callable[[str], None],
    *,
    engine: str,
    address: str | None,
    jobs: int | None,
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Compute cells, store each as it comes, and add it to ``results``."""
    computed: list[str] = []
    failures: dict[str, str] = {}
    if not missing:
        return (), {}
    origins = {cell.key: cell.origin for cell in missing}
    started = time.perf_counter()
    answers = map_cells(
        engine,
        missing,
        folder.work,
        jobs=jobs,
        address=address,
        needed_bytes=max(
            (peak_bytes(result.report) for result in results.values()), default=0
        ),
        say=say,
    )
    with closing(answers):
        for answer in answers:
            origin = origins[answer.key]
            result, error = _judged(answer, origin)
            if result is None:
                folder.write(folder.failed(answer.key), FailedCell(origin=origin, error=error))
                failures[answer.key] = error
                about = f"FAILED: {error.splitlines()[0]}"
            else:
                folder.write(folder.cell(answer.key), result)
                folder.failed(answer.key).unlink(missing_ok=True)
                results[answer.key] = result
                computed.append(answer.key)
                about = _about(result)
            place = f"[{len(computed) + len(failures)}/{len(missing)}]"
            seconds = time.perf_counter() - started
            label = f"{origin.recipe} {origin.scheme} seed {origin.seed}"
            say(f"{place} {seconds:.0f} s: {label}: {about}")
    return tuple(computed), failures


def _judged(answer: Answer, origin: Origin) -> tuple[Result | None, str]:
    if answer.result is None:
        return None, answer.error or "no reason was given"
    result = Result.model_validate_json(answer.result)
    assert result.origin == origin
    return result, ""


def _about(result: Result) -> str:
    entry = result.report.evaluations[-1]
    accuracy = "" if entry.top1_percent is None else f"top-1 {entry.top1_percent:.2f} %, "
    return (
        f"{accuracy}agrees with float on {entry.agreement_percent:.2f} %, "
        f"{result.report.size.stored_bytes / 1e6:.2f} MB, took {result.seconds:.0f} s"
    )


def _about_reference(reference: Outcomes) -> str:
    count = len(reference.labels)
    hits = [p == t for p, t in zip(reference.predictions, reference.labels, strict=True)]
    if None in reference.labels:
        return f"{count} evaluation images without labels: agreement only, no accuracy"
    return f"{count} evaluation images; float model: top-1 {100 * sum(hits) / count:.2f} %"
