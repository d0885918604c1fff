"""From arguments of the command line to the objects that the API takes."""

import json
import shlex
import sys
from pathlib import Path

import onnx
from rich.markup import escape

import calib
from vitcompress import api
from vitcompress.artifact import is_artifact
from vitcompress.errors import ConfigError, InputError
from vitcompress.evaluate import Predictor, onnx_predictor
from vitcompress.export.onnx.exporter import METADATA_KEY
from vitcompress.models import LoadedModel, load_model
from vitcompress.recipe import Recipe
from vitcompress.terminal import out

__all__ = [
    "calibration_source",
    "calibration_spec",
    "chosen_scheme",
    "command_line",
    "default_output",
    "load_float",
    "overridden",
    "predictor_of",
    "say",
    "whole_numbers",
    "with_preprocessing",
]


def chosen_scheme(
    bits: int | None, scheme: str | None, w_bits: int | None, a_bits: int | None
) -> str | None:
    """Return the scheme that ``--scheme`` or the two widths name, or ``None`` for neither.

    Raises:
        ConfigError: They contradict each other.
    """
    if w_bits is None and a_bits is None:
        return scheme
    if scheme is not None or bits is not None:
        raise ConfigError("give one of --bits, --scheme, or --w-bits with --a-bits")
    return f"W{8 if w_bits is None else w_bits}A{8 if a_bits is None else a_bits}"


def command_line() -> str:
    """Return the command that the user gave, to be recorded with what it makes."""
    return shlex.join(["vitcompress", *sys.argv[1:]])


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Return the numbers of a list like ``1,2``.

    Raises:
        ConfigError: It is no such list.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{option}: expected whole numbers like 1,2, got '{text}'"
        ) from error


def default_output(model: str, recipe: Recipe) -> Path:
    """Return the directory written where the user names none: model and scheme."""
    stem = model.rpartition("/")[2].partition(":")[0]
    for suffix in (".safetensors", ".pth.tar", ".pth", ".pt", ".bin"):
        stem = stem.removesuffix(suffix)
    return Path(f"{stem}-{str(recipe.scheme).lower()}")


def load_float(
    model: str,
    arch: str | None,
    trust_input: bool,
    num_classes: int | None,
    image_size: int | None,
) -> LoadedModel:
    """Return the float model that an argument names.

    Raises:
        InputError: It is missing, damaged, unsafe, or an artefact.
    """
    if is_artifact(Path(model)):
        raise InputError(
            f"{model}: is compressed already; give the float model it was made from"
        )
    return load_model(
        model,
        arch=arch,
        trust_input=trust_input,
        num_classes=num_classes,
        image_size=image_size,
    )


def with_preprocessing(
    loaded: LoadedModel,
    crop_fraction: float | None,
    interpolation: str | None,
    mean: str | None,
    std: str | None,
) -> LoadedModel:
    """Return the model with what the user overrides of its preprocessing."""
    preprocessing = overridden(loaded.preprocessing, crop_fraction, interpolation, mean, std)
    return LoadedModel(
        loaded.module,
        loaded.name,
        preprocessing,
        loaded.num_classes,
        loaded.source,
        loaded.digest,
    )


def overridden(
    preprocessing: calib.Preprocessing,
    crop_fraction: float | None,
    interpolation: str | None,
    mean: str | None,
    std: str | None,
) -> calib.Preprocessing:
    """Return the preprocessing with what the user overrides.

    Raises:
        ConfigError: A value is malformed or out of bounds.
    """
    fields = preprocessing.to_dict()
    if crop_fraction is not None:
        fields["crop_fraction"] = crop_fraction
    if interpolation is not None:
        fields["interpolation"] = interpolation
    for name, text in (("mean", mean), ("std", std)):
        if text is not None:
            try:
                fields[name] = [float(part) for part in text.split(",")]
            except ValueError as error:
                raise ConfigError(
                    f"--{name}: expected numbers like 0.5,0.5,0.5, got '{text}'"
                ) from error
    try:
        return calib.Preprocessing.from_dict(fields)
    except calib.SourceError as error:
        raise ConfigError(str(error)) from error


def calibration_spec(spec: str | None) -> str:
    """Return what ``--calib`` names; rendered images, with a line that says so, by default."""
    if spec is None:
        out.print(
            "[yellow]no --calib: calibrating on rendered images (synthetic); real ones serve "
            "better[/yellow]"
        )
    return spec or "synthetic"


def calibration_source(
    spec: str | None,
    samples: int,
    seed: int,
    batch_size: int,
    preprocessing: calib.Preprocessing,
) -> calib.Source:
    """Return the calibration images; rendered ones, with a line that says so, by default."""
    return calib.open_source(
        calibration_spec(spec),
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        preprocessing=preprocessing,
    )


def predictor_of(
    model: str,
    arch: str | None,
    trust_input: bool,
    num_classes: int | None,
    image_size: int | None,
) -> tuple[Predictor, calib.Preprocessing, str]:
    """Return what computes, how its images are prepared, and the word for who computes."""
    path = Path(model)
    if is_artifact(path):
        compressed = api.load(path)
        say("model", f"artefact {model}: {compressed.recipe.label}")
        return (
            compressed.graph.logits,
            compressed.preprocessing or calib.Preprocessing(),
            "simulated",
        )
    if path.suffix == ".onnx":
        predictor = onnx_predictor(path)
        say("model", f"ONNX file {model} in onnxruntime")
        return predictor, _onnx_preprocessing(path), "executed"
    loaded = load_float(model, arch, trust_input, num_classes, image_size)
    say("model", loaded.source)
    return loaded.module, loaded.preprocessing, "float"


def _onnx_preprocessing(path: Path) -> calib.Preprocessing:
    properties = onnx.load(str(path), load_external_data=False).metadata_props
    found = {entry.key: entry.value for entry in properties}
    try:
        fields = json.loads(found[METADATA_KEY])["preprocessing"]
        return calib.Preprocessing.from_dict(fields)
    except (KeyError, TypeError, ValueError, calib.SourceError):
        out.print(
            "[yellow]the file does not say how its images are prepared: "
            "ImageNet's way[/yellow]"
        )
        return calib.Preprocessing()


def say(label: str, text: str) -> None:
    """Print one labelled line."""
    out.print(f"[dim]{label}:[/dim] {escape(text)}", soft_wrap=True)
