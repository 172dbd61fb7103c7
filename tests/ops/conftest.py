import pytest
import torch


@pytest.fixture(autouse=True)
def _no_gradient():
    with torch.no_grad():
        yield
