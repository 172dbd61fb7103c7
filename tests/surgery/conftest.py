import pytest
import torch

from lte.surgery import families

torch.set_num_threads(1)


@pytest.fixture
def family_table(monkeypatch):
    """Families registered in a test are forgotten after it."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
