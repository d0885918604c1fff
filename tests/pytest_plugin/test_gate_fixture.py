"""The pytest plugin, in a pytest of its own."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from results import make_result, write_sweep
from tiny import images

import calib
from pytest_vitcompress import gates as plugin
from pytest_vitcompress.gates import Gates
from vitcompress.errors import InputError
from vitcompress.gate import read_baseline, update_baseline
from vitcompress.sweep import read_sweep

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parent.parent.parent
GATE = """
def test_gate(vitcompress_gate):
    vitcompress_gate({arguments})
"""
USUAL = "'tiny:tiny_vit', scheme='W4A4', baseline='baseline.yaml', eval='labels.npz'"


@pytest.fixture
def asked(pytester, monkeypatch):
    """Record what sweeps are asked for; answer with results that err on ``asked.wrong``."""

    class Asked(list):
        wrong = range(9)
        failed = None

    calls = Asked()

    def sweep(model, output, **settings):
        calls.append({"model": model, "output": output, **settings})
        (recipe,) = settings["recipes"]
        results = [
            make_result(scheme=scheme, recipe=recipe, wrong=calls.wrong)
            for scheme in settings["schemes"]
        ]
        folder = pytester.path / f"sweep{len(calls)}"
        return read_sweep(write_sweep(folder, results, failed=calls.failed))

    monkeypatch.setattr(plugin, "sweep", sweep)
    monkeypatch.setattr(plugin, "load_model", lambda spec, **settings: (spec, settings))
    monkeypatch.setattr(plugin, "model_digest", lambda model: str(abs(hash(str(model)))))
    update_baseline(
        pytester.path / "baseline.yaml",
        [
            make_result(wrong=range(9), recipe="fast_narrow"),
            make_result(scheme="W8A8", recipe="fast"),
        ],
    )
    return calls


@pytest.fixture
def run(pytester):
    """Run one test with a gate, this project's settings away."""

    def run(*options, arguments=USUAL, settings=""):
        pytester.makeini(f"[pytest]\n{settings}\n")
        pytester.makepyfile(GATE.format(arguments=arguments))
        return pytester.runpytest_inprocess("-p", "pytest_vitcompress", *options)

    return run


def test_figures_that_did_not_move_pass_and_are_shown(asked, run):
    result = run("-rP")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["toy, 200 images*", "*W4A4 fast_narrow*", "gate passed: 3 figures"]
    )


def test_moved_figures_fail_with_the_table_and_no_traceback(asked, run):
    asked.wrong = range(60)

    result = run()

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*W4A4 fast_narrow*", "*top1*0/51*regressed*", "gate failed: 2 of 3 figures"]
    )
    result.stdout.no_fnmatch_line("*gates.py*")


def test_improvement_fails_with_the_words_of_pytest(asked, run):
    asked.wrong = ()

    run().stdout.fnmatch_lines(
        [
            "better than the baseline: record it with --vitcompress-update-baseline, or let "
            "it pass with accept_improvement=True"
        ]
    )
    run(arguments=f"{USUAL}, accept_improvement=True").assert_outcomes(passed=1)


def test_other_cells_of_the_baseline_are_left_to_other_tests(asked, run):
    run(arguments=USUAL.replace("W4A4", "W8A8")).assert_outcomes(failed=1)
    asked.wrong = ()

    run(arguments=USUAL.replace("W4A4", "W8A8")).assert_outcomes(passed=1)


def test_several_schemes_are_swept_together_by_recipe(asked, run):
    run(arguments=USUAL.replace("W4A4", "W4A4, W8A8,W3A3") + ", seed='0..2', samples=8")

    assert [(c["recipes"], c["schemes"], c["seeds"], c["samples"]) for c in asked] == [
        (["fast_narrow"], ["W4A4", "W3A3"], "0..2", 8),
        (["fast"], ["W8A8"], "0..2", 8),
    ]
    assert asked[0]["output"] == asked[1]["output"]
    assert asked[0]["calibration"] == "synthetic"


def test_update_writes_the_baseline_and_passes(asked, run, pytester):
    asked.wrong = range(60)

    result = run("--vitcompress-update-baseline", "-rP")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["toy / W4A4 / fast_narrow: changed", "*kept; it has no result"]
    )
    limits = [cell.limits["top1"].value for cell in read_baseline_of(pytester).values()]
    assert limits == [70.0, 100.0]


def test_new_baseline_is_written_below_the_root(asked, run, pytester):
    run(
        "--vitcompress-update-baseline", arguments=USUAL.replace("baseline.yaml", "new/b.yaml")
    )

    assert (pytester.path / "new/b.yaml").is_file()


def read_baseline_of(pytester):
    return read_baseline(pytester.path / "baseline.yaml").cells()


def test_settings_come_from_the_file_and_the_command_line_wins(asked, run, pytester):
    (pytester.path / "held_out").mkdir()
    settings = "vitcompress_baseline = baseline.yaml\nvitcompress_eval = held_out\n"
    settings += "vitcompress_calib = images"

    run(arguments="'m.pt', scheme='W4A4'", settings=settings).assert_outcomes(passed=1)
    run("--vitcompress-eval=other", arguments="'m.pt', scheme='W4A4'", settings=settings)
    run(arguments="'m.pt', scheme='W4A4', eval='third', calib='c'", settings=settings)

    found = [(call["evaluation"], call["calibration"]) for call in asked]
    # A path that is there is that below the root; anything else is passed on as it is.
    assert found == [
        (str(pytester.path / "held_out"), "images"),
        ("other", "images"),
        ("third", "c"),
    ]


def test_models_are_opened_once_and_found_below_the_root(asked, run, pytester):
    (pytester.path / "m.pt").touch()
    arguments = "'m.pt', scheme='W4A4', arch='timm/x', eval='e'"
    pytester.makepyfile(test_more=GATE.format(arguments=arguments))

    run("--vitcompress-baseline=baseline.yaml", arguments=arguments).assert_outcomes(passed=2)

    path, settings = asked[0]["model"]
    assert asked[0]["model"] is asked[1]["model"]
    assert path == str(pytester.path / "m.pt")
    assert settings["arch"] == "timm/x"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("'m', scheme='W4A4', eval='e'", "baseline is missing; give baseline='baseline.yaml'"),
        (
            "'m', scheme='W4A4', baseline='b.yaml'",
            "eval is missing; give eval='labels.csv', --vitcompress-eval, or vitcompress_eval",
        ),
        (
            "'m', scheme='W4A4', baseline='b.yaml', eval='e'",
            "file is missing; --vitcompress-update-baseline writes one",
        ),
        ("'m', scheme='four', baseline='b.yaml', eval='e'", "expected a form like W4A8"),
        (
            "'m', scheme='W6A6', baseline='baseline.yaml', eval='e'",
            "is not in the baseline; --vitcompress-update-baseline adds it",
        ),
    ],
)
def test_mistakes_fail_the_test_in_one_line(asked, run, arguments, words):
    result = run(arguments=arguments)

    result.assert_outcomes(failed=1)
    assert words in result.stdout.str()
    result.stdout.no_fnmatch_line("*Traceback*")


def test_failed_quantization_fails_the_test(asked, run):
    asked.failed = {0: "PassError: nothing to quantize"}

    result = run()

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*quantization failed: PassError: nothing to quantize*"])


def test_errors_of_the_work_fail_the_test(asked, run, monkeypatch):
    def broken(*_, **__):
        raise InputError("m.pt: damaged")

    monkeypatch.setattr(plugin, "sweep", broken)

    run().stdout.fnmatch_lines(["vitcompress_gate: m.pt: damaged"])


def test_baselines_are_not_written_by_several_processes(asked, run, monkeypatch):
    monkeypatch.setattr(pytest.Config, "workerinput", {}, raising=False)

    result = run("--vitcompress-update-baseline")

    result.stdout.fnmatch_lines(["*writing baselines needs one process; add -n 0*"])
    assert list(asked) == []


def test_plugin_imports_nothing_heavy():
    code = (
        "import sys, pytest_vitcompress; "
        "print([m for m in ('torch', 'numpy', 'vitcompress', 'calib') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    found = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )

    assert found.stdout.strip() == "[]"


def test_entry_point_names_the_plugin():
    tomllib = importlib.import_module("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    assert project["project"]["entry-points"]["pytest11"] == {
        "pytest_vitcompress": "pytest_vitcompress"
    }
    assert (
        "pytest_vitcompress"
        in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    )


def test_whole_road_from_a_model_to_a_verdict(tmp_path, vit_graph):
    """Computed and recorded; then the same figures pass, and an edited one fails."""
    options = {"--vitcompress-update-baseline": True}
    config = SimpleNamespace(rootpath=tmp_path, getoption=options.get, getini=lambda name: "")
    gates, baseline = Gates(config, tmp_path / "cells"), tmp_path / "b.yaml"

    def gate():
        return gates.gate(
            vit_graph,
            scheme="W4A8",
            baseline="b.yaml",
            calib=lambda seed: calib.TensorSource(images(8, seed=seed)),
            eval=calib.TensorSource(images(40, seed=9), torch.arange(40) % 10),
        )

    assert gate() is None
    options.clear()
    report = gate()
    assert report.passed
    *_, size = report.cells[0].metrics
    assert (len(report.cells[0].metrics), size.metric) == (3, "size")

    baseline.write_text(baseline.read_text().replace(f"{size.value:.0f}", "1000"))
    with pytest.raises(pytest.fail.Exception, match=r"size .*1,000 B .* regressed"):
        gate()
