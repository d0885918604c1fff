"""What onnxruntime would fuse away from its integer kernels."""

import pytest
from tiny import enliven, images, make_source
from torch import nn

import vitcompress


class Perceptron(nn.Module):
    """Two linears on one row for each image, an activation between."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, kernel_size=16)
        self.fc1 = nn.Linear(8, 16)
        self.activation = activation
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x):
        # A quantizer right behind the activation would hide the fusion.
        return self.fc2(self.activation(self.fc1(self.embed(x).flatten(1))).square())


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(),
        nn.GELU(),
        *(
            pytest.param(activation, marks=pytest.mark.slow)
            for activation in (
                nn.LeakyReLU(),
                nn.Sigmoid(),
                nn.Tanh(),
                nn.Softplus(),
                nn.ELU(),
            )
        ),
    ],
    ids=lambda activation: type(activation).__name__,
)
def test_a_linear_with_an_activation_right_behind_runs_as_integers(activation, tmp_path):
    model = enliven(Perceptron(activation))
    compressed = vitcompress.quantize(
        model, recipe="deploy", source=make_source(images(8, 16))
    )

    found = compressed.export_onnx(tmp_path / "m.onnx", images=images(8, 16)).verification

    assert (found.integer_linears, found.linears) == (2, 2)
