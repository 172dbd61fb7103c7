import pytest

from lte.surgery import families


@pytest.fixture
def family_table(monkeypatch):
    """Families registered in a test are forgotten after it."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
