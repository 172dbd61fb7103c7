import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where vLLM keeps what it knows of models, from one engine to the next."""
    given = os.environ.get("VLLM_CACHE_ROOT")
    return Path(given) if given else tmp_path_factory.mktemp("cache")
