"""What the documentation promises: links, examples and commands are right, and the words are plain."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_training import dense_llama

import lte
from byte_tokenizer import byte_tokenizer
from lte.cli.calibrate import parse_calibrate
from lte.cli.eval import parse_eval
from lte.cli.generate import Generate
from lte.cli.inspect import Inspect
from lte.cli.main import parse
from lte.cli.report import Report
from lte.cli.train import parse_train

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "*/README.md") for path in ROOT.glob(pattern))


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_first_example_runs_as_it_is(tmp_path, monkeypatch, capsys):
    (code, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    dense_llama(vocab_size=258).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.txt").write_text("".join(f"{n} and {n + 1} make {2 * n + 1}.\n" for n in range(4000)))
    monkeypatch.chdir(tmp_path)
    code = code.replace("HuggingFaceTB/SmolLM2-135M", "model")
    exec(code.replace("max_steps=300", "max_steps=8, use_cpu=True, report_to='none'"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_reference_builds_without_a_warning(tmp_path):
    made = [sys.executable, str(ROOT / "docs" / "reference.py"), str(tmp_path)]
    subprocess.run(made, check=True, capture_output=True, text=True, timeout=280)
    page = (tmp_path / "lte.html").read_text()
    assert not [name for name in lte.__all__ if f'id="{name}"' not in page]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1300


STUMBLING = (r"lea(?:ve|ves|ving|f) (?:\S+ )?away", "left away", "of one's own", "shared out", "dealt out")
"""Readers whose second language is English stumble over these."""
TEXTS = [*PAGES, *sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / "src" / "lte").rglob("*.py"))]


@pytest.mark.parametrize("phrase", STUMBLING)
def test_no_phrase_that_readers_stumble_over(phrase):
    pattern = re.compile(rf"\b{phrase}\b", re.IGNORECASE)
    assert not [str(path.relative_to(ROOT)) for path in TEXTS if pattern.search(" ".join(path.read_text().split()))]


def documented(path: Path) -> list[ast.FunctionDef]:
    return [one for one in ast.walk(ast.parse(path.read_text())) if isinstance(one, ast.FunctionDef)]


def test_no_function_without_a_result_says_whether():
    """A check raises, and its docstring says "Raise ValueError unless ..."."""
    for path in sorted((ROOT / "src" / "lte").rglob("*.py")):
        for function in documented(path):
            nothing = isinstance(function.returns, ast.Constant) and function.returns.value is None
            assert not (nothing and (ast.get_docstring(function) or "").startswith("Whether")), (path, function.name)


def commands_in(page: Path) -> list[list[str]]:
    """The ``lte`` commands of a page's blocks, as lists of arguments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(text for language, text in blocks if not language).replace("\\\n", " ").splitlines()
    commands = [re.split(r" \| | >", one)[0] for one in lines if one.startswith("lte ")]
    return [shlex.split(one.replace("$M", "model.gguf"), comments=True)[1:] for one in commands]


def test_the_commands_of_the_tutorial_can_be_parsed():
    parsers = {
        "inspect": lambda argv: parse(Inspect, "inspect", argv),
        "train": parse_train,
        "generate": lambda argv: parse(Generate, "generate", argv),
        "calibrate": parse_calibrate,
        "eval": parse_eval,
        "report": lambda argv: parse(Report, "report", argv),
    }
    found = commands_in(ROOT / "docs" / "tutorial.md")
    assert {name for name, *_ in found} == {*parsers}
    for name, *arguments in found:
        parsers[name](arguments)


def test_the_core_is_as_long_as_contributing_says():
    """The files to read first, with their lines: some 1,200 in all."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| \d+ \| \[[^\]]+\]\(([^)]+)\) \| (\d+) \|", text, re.MULTILINE)
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name, _ in rows}
    for name, said in rows:
        assert abs(lengths[name] - int(said)) <= max(10, 0.1 * lengths[name]), (name, lengths[name])
    assert 1000 <= sum(lengths.values()) <= 1400


def sentences_of(page: Path) -> Iterator[str]:
    """The sentences of a page's running text, without code, tables, headings and what stands in brackets."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)|\n(?=[|#])", text):
        if not paragraph.lstrip().startswith(("|", "#", "![")):
            plain = re.sub(r"`[^`]*`", "code", " ".join(paragraph.split()))
            plain = re.sub(r"\([^)]*\)", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain))
            yield from re.split(r"(?<=[.!?:;])\s+", plain)


TEACHING = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("tutorial", "usage", "families"))]


@pytest.mark.parametrize("page", TEACHING, ids=lambda page: page.name)
def test_sentences_of_teaching_pages_are_short(page):
    assert not [one for one in sentences_of(page) if len(re.findall(r"\S*[A-Za-z]\S*", one)) > 30]
