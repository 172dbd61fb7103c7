"""Each folder imports only folders to its left, these only the files below, and ``import lte`` stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "lte"

BELOW = ("argument_error", "files", "saving")
"""Files below all folders: each imports those before it, and the standard library."""
FLOORS = ("core", "data", "ops", "modules", "surgery", "methods")
FLOORS += ("inference", "serving", "evaluation", "training", "bench", "report")
"""From the bottom up: a folder imports from those before it, unless BESIDE says that it knows nothing of one."""
BESIDE = {
    "data": {"core"},
    **{folder: {"data"} for folder in ("ops", "modules", "surgery", "methods")},
    **{folder: {"methods", "data"} for folder in ("inference", "serving")},
    "training": {"methods"},
    "report": {"training", "inference", "serving", "bench", "methods"},
}
LEFT_OF = {folder: {*FLOORS[:index]} - BESIDE.get(folder, set()) for index, folder in enumerate(FLOORS)}
LEFT_OF |= {folder: folders | {*BELOW} for folder, folders in LEFT_OF.items() if folder != "core"}
LEFT_OF |= {file: {*BELOW[:index]} for index, file in enumerate(BELOW)}
LEFT_OF["cli"] = {*LEFT_OF, "lte"}
HEAVY = ("datasets", "gguf", "peft", "matplotlib", "triton", "numba", "pandas", "rouge_score", "sacrebleu", "nltk")


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, those inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) + 1 - node.level]
                origin = ".".join([*above, *filter(None, [origin])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def violations(source: str, folder: str) -> list[str]:
    found = []
    for line, name in imported(source, f"lte.{folder}"):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        target = target if target in LEFT_OF else "lte"  # a name from lte/__init__.py, which imports everything
        if root == "lte":
            allowed = target == folder or target in LEFT_OF[folder]
        else:
            known = folder not in ("core", *BELOW) or (folder == "core" and root == "torch")
            allowed = known or root in sys.stdlib_module_names
        if not allowed:
            found.append(f"{line}: {name}")
    return found


def test_every_folder_has_its_place():
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert folders <= LEFT_OF.keys()


FILES = [*(SOURCE / f"{file}.py" for file in BELOW), *sorted(SOURCE.glob("*/**/*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_left(path):
    assert violations(path.read_text(), path.relative_to(SOURCE).with_suffix("").parts[0]) == []


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("core", "from lte.modules import router"),
        ("core", "import numpy as np"),
        ("core", "from lte.files import write_whole"),
        ("files", "from lte.core import losses"),
        ("files", "import torch"),
        ("files", "from lte.saving import saving"),
        ("core", "from transformers import Trainer"),
        ("modules", "def f():\n    from lte.surgery.sites import FFNSite"),
        ("modules", "if TYPE_CHECKING:\n    import lte.surgery.sites"),
        ("surgery", "from ..training import trainer"),
        ("surgery", "from lte import LTEConfig"),
        ("training", "import lte"),
        ("training", "from lte.methods.lte import LTEConfig"),
        ("inference", "from lte.evaluation.evaluate import evaluate"),
        ("evaluation", "from lte.training.run import train"),
        ("evaluation", "from lte.cli import main"),
    ],
)
def test_a_violation_is_seen(folder, source):
    assert len(violations(source, folder)) == 1


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        (
            "core",
            "import math\nfrom torch import nn\nfrom lte.core.losses import efficiency_loss\nfrom . import losses",
        ),
        ("saving", "import os\nfrom lte.files import sync"),
        ("surgery", "from lte.saving import saving"),
        ("surgery", "from lte.modules.router import Router\nfrom ..core import losses\nfrom .sites import FFNSite"),
        ("cli", "import lte\nfrom lte import LTEConfig\nfrom lte.inference import packing"),
    ],
)
def test_what_is_allowed(folder, source):
    assert violations(source, folder) == []


def loaded_by(code: str, given: str = "") -> set[str]:
    """The modules that code loads in a process of its own, less those that ``given`` has loaded before."""
    whole = f"import sys\n{given}\nbefore = set(sys.modules)\n{code}\nprint('LOADED', *(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rpartition("LOADED")[2].split())


def test_import_lte_is_light():
    found = loaded_by("import lte", "import torch, transformers\nfrom transformers import AutoModelForCausalLM")
    assert found == {"lte", "lte.surgery", "lte.surgery.auto"}


@pytest.mark.slow
def test_a_public_name_loads_what_it_needs():
    given = "import torch, transformers\nfrom transformers import AutoModelForCausalLM, PreTrainedModel\nimport lte"
    found = loaded_by("lte.sparsify_, lte.LTEConfig, lte.optimize_, lte.record_scores", given)
    roots = {name.partition(".")[0] for name in found}
    assert not roots & {*HEAVY}
    assert not {name for name in found if name.startswith(("lte.training", "lte.cli", "lte.evaluation"))}


@pytest.mark.parametrize("asked", ["['lte']", "['lte', '--help']", "['lte', '--version']"])
def test_the_list_of_commands_needs_no_library(asked):
    found = loaded_by(f"sys.argv = {asked}\nimport lte_start\nassert lte_start.main() == 0")
    assert not {name for name in found if name.partition(".")[0] in ("lte", "torch", "transformers", "numpy", "tyro")}


def test_every_public_name_is_there():
    import lte

    assert len(set(lte.__all__)) == len(lte.__all__)
    for name in lte.__all__:
        assert getattr(lte, name) is not None, name
    assert set(lte.__all__) <= set(dir(lte))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = lte.nonsense
