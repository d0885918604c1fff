import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "errors": 0,
    "numerics": 0,
    "graph": 1,
    "quantizers": 1,
    "calibration": 2,
    "passes": 3,
    "recipe": 4,
    "effort": 4,
    "engine": 4,
    "artifact": 4,
    "export": 4,
    "report": 4,
    "speed": 4,
    "result": 4,
    "measure": 4,
    "models": 5,
    "api": 5,
    "evaluate": 5,
    "benchmark": 5,
    "gate": 5,
    "sweep": 5,
    "analyze": 5,
    "compare": 5,
    "results": 5,
    "html_report": 5,
    "demo": 6,
    "terminal": 6,
    "verdict_tables": 6,
    "arguments": 6,
    "cli": 6,
    "__main__": 6,
}
PACKAGE = ROOT / "vitcompress"
# The front door opens onto every floor.
PACKAGE_FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
CALIB_FILES = sorted((ROOT / "calib").rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def floor_of(parts):
    """Return the floor of a module given as its path below the package."""
    return FLOORS[parts[0].removesuffix(".py")]


def imported_modules(source):
    """Return every module a source imports, late imports inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def dotted_names(source):
    return {
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
    }


def floors_above(source, own_floor):
    """Return the modules of the package that ``source`` imports from higher floors."""
    return sorted(
        module
        for module in imported_modules(source)
        if module.startswith("vitcompress.")
        and module.split(".")[1] in FLOORS
        and FLOORS[module.split(".")[1]] > own_floor
    )


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name_of)
def test_a_module_imports_only_its_own_floor_or_lower(path):
    parts = path.relative_to(PACKAGE).parts
    assert floors_above(path.read_text(encoding="utf-8"), floor_of(parts)) == []


def test_an_import_upwards_is_seen_even_inside_a_function():
    source = "def late():\n    from vitcompress.passes import PASSES\n"

    assert floors_above(source, FLOORS["graph"]) == [
        "vitcompress.passes",
        "vitcompress.passes.PASSES",
    ]
    assert floors_above(source, FLOORS["engine"]) == []


@pytest.mark.parametrize("path", CALIB_FILES, ids=name_of)
def test_calib_imports_nothing_of_vitcompress(path):
    modules = imported_modules(path.read_text(encoding="utf-8"))

    assert not [module for module in modules if module.split(".")[0] == "vitcompress"]


@pytest.mark.parametrize("path", [*PACKAGE_FILES, *CALIB_FILES], ids=name_of)
def test_aten_is_named_in_one_file_and_torch_distributed_nowhere(path):
    source = path.read_text(encoding="utf-8")
    names = dotted_names(source) | imported_modules(source)

    assert not [name for name in names if name.startswith("torch.distributed")]
    if name_of(path) != "vitcompress/graph/ops.py":
        assert not [name for name in names if name.startswith("torch.ops.aten")]
