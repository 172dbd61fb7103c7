"""What the documentation promises: its links lead somewhere, its first example runs, the reference builds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import dense_llama

import lte
from byte_tokenizer import byte_tokenizer

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
