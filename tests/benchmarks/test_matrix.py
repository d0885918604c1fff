"""The whole matrix, one model after the other: an hour or two."""

import pytest
from backbones import BACKBONES
from bench_backbones import measure_apart


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_passes_every_stage(name):
    row = measure_apart(BACKBONES[name])

    # How long a capture takes is for the recorded results to say, not for a test.
    assert [
        problem for problem in row["problems"] if not problem.startswith("capture took")
    ] == []
