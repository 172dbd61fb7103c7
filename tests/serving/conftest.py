import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """What vLLM keeps from one engine to the next."""
    return tmp_path_factory.mktemp("cache")
