import pytest
import torch


@pytest.fixture(scope="session")
def test_vit_state():
    """State dict of a small registered transformer with random weights and 7 classes."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=7).state_dict()
