"""The names that users may rely on. A change here is a change of the public interface."""

import importlib
import inspect
import pkgutil

import pytest

import calib
import vitcompress

PUBLIC = {
    "calib": [
        "Batch",
        "Preprocessing",
        "Skipped",
        "Source",
        "SourceError",
        "TensorSource",
        "open_source",
    ],
    "vitcompress": [
        "ArtifactError",
        "CompressedModel",
        "ConfigError",
        "ExportError",
        "InputError",
        "PassError",
        "Recipe",
        "UnsupportedModelError",
        "VitcompressError",
        "analyze",
        "benchmark",
        "capture",
        "evaluate",
        "export_onnx",
        "load",
        "load_model",
        "quantize",
        "sweep",
    ],
    "vitcompress.analyze": [
        "Analysis",
        "AnalysisEntry",
        "Distance",
        "analyze",
        "read_analysis",
    ],
    "vitcompress.artifact": [
        "StoredModel",
        "is_artifact",
        "read_artifact",
        "write_artifact",
        "write_directory",
        "write_file",
        "write_files",
    ],
    "vitcompress.calibration": [
        "Batch",
        "CalibrationSource",
        "ChannelAbsMax",
        "FirstImages",
        "Histogram",
        "MinMax",
        "Observer",
        "QuantizationNoise",
        "RangeConfig",
        "Request",
        "Samples",
        "SecondMoment",
        "Statistics",
        "fit_range",
        "search_range",
    ],
    "vitcompress.demo": ["DigitsViT", "load_digits", "load_model"],
    "vitcompress.cli": ["app", "main"],
    "vitcompress.engine": ["Checkpoint", "LocalEngine", "PassRecord", "run_recipe"],
    "vitcompress.export.onnx": [
        "TARGETS",
        "ExportResult",
        "Target",
        "Verification",
        "export_onnx",
    ],
    "vitcompress.export.rewrites": ["REWRITES", "Rewritten", "rewritten"],
    "vitcompress.gate": [
        "Baseline",
        "CellVerdict",
        "GateReport",
        "MetricVerdict",
        "judge",
        "read_baseline",
        "to_junit",
        "to_markdown",
        "update_baseline",
    ],
    "vitcompress.html_report": ["to_csv", "to_html", "to_markdown", "write_report"],
    "vitcompress.graph": [
        "CapturedGraph",
        "OutputDict",
        "Provenance",
        "QuantizationSite",
        "Role",
        "capture",
        "enumerate_sites",
        "unlisted_products",
    ],
    "vitcompress.models": ["LoadedModel", "create_architecture", "load_model"],
    "vitcompress.passes": [
        "PASSES",
        "Attach",
        "Calibrate",
        "Erq",
        "Fact",
        "Freeze",
        "Gptq",
        "Hadamard",
        "IntegerBias",
        "IsVit",
        "MassiveActivations",
        "MlpReconstruction",
        "Pass",
        "PassContext",
        "PassReport",
        "RangeSearch",
        "Reconstruct",
        "RefineRanges",
        "RepqVit",
        "register",
    ],
    "vitcompress.quantizers": [
        "FORMATS",
        "AdaLog",
        "Affine",
        "Codebook",
        "Granularity",
        "Log2",
        "LogSqrt2",
        "PerChannel",
        "PerGroup",
        "PerHead",
        "PerTensor",
        "QuantSpec",
        "Quantizer",
        "Sulq",
        "make_quantizer",
    ],
    "vitcompress.sweep": [
        "FailedCell",
        "GridCell",
        "Sweep",
        "SweepIndex",
        "read_sweep",
        "sweep",
    ],
}


def modules(package):
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        # The entry point of ``python -m``, and programs of their own.
        if found.name.rpartition(".")[2] not in ("__main__", "session", "timing"):
            yield importlib.import_module(found.name)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_exactly_these(name):
    module = importlib.import_module(name)

    assert sorted(module.__all__) == sorted(PUBLIC[name])


def test_every_package_with_public_names_is_listed():
    packages = {
        module.__name__
        for top in (calib, vitcompress)
        for module in [top, *modules(top)]
        if hasattr(module, "__path__") and getattr(module, "__all__", [])
    }

    assert packages == set(PUBLIC)


@pytest.mark.parametrize("package", [calib, vitcompress])
def test_every_public_name_exists(package):
    for module in [package, *modules(package)]:
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{module.__name__}.{name}"


def test_errors_carry_the_documented_exit_codes():
    codes = {
        name: value.exit_code
        for name, value in vars(vitcompress).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }

    assert codes == {
        "VitcompressError": 1,
        "ConfigError": 2,
        "UnsupportedModelError": 4,
        "ExportError": 4,
        "PassError": 4,
        "InputError": 5,
        "ArtifactError": 5,
    }


def test_arguments_of_the_entry_points_keep_their_names():
    def names(function):
        return list(inspect.signature(function).parameters)

    assert names(vitcompress.quantize) == [
        *("model", "bits", "scheme", "effort", "recipe", "source", "overrides", "model_id"),
        "checkpoint",
    ]
    assert names(vitcompress.load) == ["path"]
    assert names(vitcompress.export_onnx) == [
        *("model", "path", "target", "leftovers", "ir"),
    ]
    assert names(vitcompress.evaluate) == ["model", "source", "reference", "execution", "data"]
    assert names(vitcompress.benchmark) == [
        *("paths", "runtime", "threads", "batches", "rounds", "references", "seed"),
    ]
    assert names(vitcompress.sweep) == [
        *("model", "output", "schemes", "recipes", "evaluation", "seeds", "calibration"),
        *("samples", "eval_samples", "batch_size", "jobs", "engine", "address", "model_id"),
        *("command", "say"),
    ]
    assert names(vitcompress.analyze) == [
        *("model", "bits", "scheme", "recipe", "source", "evaluation", "mode", "by", "budget"),
        *("overrides", "model_id", "command"),
    ]
    assert names(vitcompress.CompressedModel.save) == ["self", "path", "overwrite"]
    assert names(calib.open_source)[:2] == ["spec", "samples"]
