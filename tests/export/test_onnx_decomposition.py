"""The exporter decomposes what needs it, and nothing else."""

import pytest
import torch
from torch import nn

from vitcompress.export.onnx.program import _decomposed

ATEN = torch.ops.aten


class Plain(nn.Module):
    def forward(self, x):
        return torch.nn.functional.gelu(x)


class InPlace(nn.Module):
    def forward(self, x):
        return (x * 2.0).add_(1.0)


def exported(model):
    return torch.export.export(model.eval(), (torch.zeros(2, 3),), strict=False)


def test_a_program_of_whole_operators_stays():
    program = _decomposed(exported(Plain()))

    assert program.run_decompositions({ATEN.relu.default: None}) is program


@pytest.mark.parametrize(
    ("model", "table"),
    [
        (Plain(), {ATEN.gelu.default: lambda x, *, approximate="none": x * x.sigmoid()}),
        (InPlace(), {}),
        (Plain(), None),
    ],
)
def test_anything_else_is_decomposed(model, table):
    program = _decomposed(exported(model))

    found = program.run_decompositions(table)

    assert found is not program
    targets = {node.target for node in found.graph.nodes}
    assert not targets & {*(table or ()), ATEN.add_.Tensor}
