"""The splits that experiments/prepare.py makes, and that grids.sh is a script."""

import importlib.util
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments"


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare", FOLDER / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_xsum_is_split_once_and_whole(prepare, tmp_path):
    source = tmp_path / "all.jsonl"
    source.write_text("".join(json.dumps({"article": f"é{n}"}) + "\n" for n in range(1000)), encoding="utf-8")
    prepare.xsum(source, tmp_path / "xsum")
    splits = [
        [row["article"] for row in rows(tmp_path / "xsum" / f"{name}.jsonl")] for name in ("train", "valid", "test")
    ]
    assert [len(split) for split in splits] == [650, 100, 250]
    assert len(set().union(*splits)) == 1000


def test_t0_holds_whole_templates_out(prepare, tmp_path):
    with tarfile.open(tmp_path / "t0.tar.gz", "w:gz") as archive:
        for template in range(40):
            file = tmp_path / f"template{template}.jsonl"
            row = {"prompt": f"{template} ", "completion": "yes<|endoftext|>"}
            file.write_text((json.dumps(row) + "\n") * 5 + "\n")
            archive.add(file, f"t0/{file.name}")
    prepare.t0(tmp_path / "t0.tar.gz", tmp_path / "t0")
    found = {name: rows(tmp_path / "t0" / f"{name}.jsonl") for name in ("heldout", "valid", "train")}
    templates = {name: {row["prompt"] for row in several} for name, several in found.items()}
    assert [len(templates[name]) for name in found] == [24, 10, 6]
    assert len(set().union(*templates.values())) == 40
    assert {row["completion"] for several in found.values() for row in several} == {"yes"}


def test_the_grids_are_a_script(tmp_path):
    script = FOLDER / "grids.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    unknown = subprocess.run(
        ["bash", str(script), "nothing"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (unknown.returncode, unknown.stderr) == (2, "there is no grid nothing\n")
