"""A quantized model held to its baseline as a test of pytest.

def test_w4a8(vitcompress_gate):
    vitcompress_gate("model.pt", scheme="W4A8", baseline="baseline.yaml", eval="labels.csv")

This file is imported in every run of pytest where vitcompress is installed, so it imports
nothing of it: the package stands beside ``vitcompress``, whose import takes seconds.
"""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_vitcompress.gates import Gate, Gates

__all__ = ["vitcompress_gate"]

#: Defaults of arguments: options of the command line, and keys of pytest.ini.
SETTINGS = {
    "calib": "calibration images of vitcompress_gate, as for vitcompress quantize --calib",
    "eval": "evaluation images of vitcompress_gate, as for vitcompress evaluate --eval",
    "baseline": "YAML of accepted figures of vitcompress_gate",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("vitcompress", "gates of quantized models")
    for name, text in SETTINGS.items():
        group.addoption(f"--vitcompress-{name}", default=None, metavar="PATH", help=text)
        parser.addini(f"vitcompress_{name}", text, default="")
    group.addoption(
        "--vitcompress-update-baseline",
        action="store_true",
        help="write the figures of vitcompress_gate into its baselines, judging nothing",
    )


@pytest.fixture(scope="session")
def _vitcompress_gates(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> "Gates":
    from pytest_vitcompress.gates import Gates

    return Gates(request.config, tmp_path_factory.mktemp("vitcompress"))


@pytest.fixture
def vitcompress_gate(_vitcompress_gates: "Gates") -> "Gate":
    """Quantize a model, evaluate it, and fail where a figure has moved from its baseline.

    A function; see ``pytest_vitcompress.gates.Gates.gate`` for its arguments.
    """
    return _vitcompress_gates.gate
