"""What is read is bounded by what is asked for, and hostile files are refused in one line."""

import gzip
import json
import tracemalloc

import numpy as np
import pyarrow.parquet
import pytest
from transformers import BertConfig

from byte_tokenizer import byte_tokenizer
from lte.data import text_files, tokenise
from lte.data.prompts import load_prompts
from lte.data.sources import read_rows
from lte.data.tasks import DataConfig, load_dataset_for, load_texts
from lte.data.text_files import read_pieces
from lte.evaluation.inputs import Inputs


def peak(act) -> int:
    """Bytes that Python held at most while it did this."""
    tracemalloc.start()
    try:
        act()
    finally:
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.tsv.gz"])
def test_gzip_bombs_are_refused(tmp_path, name):
    path = tmp_path / name
    with gzip.open(path, "wb", 1) as file:
        for _ in range(200):
            file.write(b'{"text": "' + b"a " * 500_000 + b'"}\n')

    def read():
        with pytest.raises(ValueError, match=f"{name}: it unpacks to over 100 times its size.*name the plain file"):
            for _ in read_pieces(path) if name == "a.txt.gz" else read_rows(path, ("text",), True):
                pass

    assert peak(read) < (200 << 20 if name == "a.json.gz" else 20 << 20)  # which is kept up to where it is refused


def test_small_files_may_expand_as_they_like(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"a" * 1_000_000))
    assert load_texts(path) == ["a" * 1_000_000]


def test_parquet_bombs_are_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1_000_000] * 300}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: .*unpacks to over 100 times"):
        list(read_rows(tmp_path / "a.parquet"))


def test_rows_are_not_kept(tmp_path):
    with (tmp_path / "a.jsonl").open("w") as file:
        for i in range(2000):
            file.write(json.dumps({"text": f"{i} " * 500, "other": "x" * 5000}) + "\n")
    assert (tmp_path / "a.jsonl").stat().st_size > 10 << 20
    assert peak(lambda: [None for _ in read_rows(tmp_path / "a.jsonl")]) < 2 << 20


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_tokens_are_all_that_is_kept(tmp_path, monkeypatch, name):
    """Text of a token a byte: two bytes of memory each, and no more than a batch beside them."""
    monkeypatch.setattr(tokenise, "_PIECE", 1 << 12)
    monkeypatch.setattr(tokenise._pieces, "__defaults__", (1 << 12,))
    lines = ["to be or not to be\n" * 50] * 3000
    text = "".join(lines if name == "a.txt" else (json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / name).write_text(text)
    size = len(text)
    del text, lines
    tokenizer = byte_tokenizer()
    found = []
    used = peak(lambda: found.append(load_dataset_for("language_modelling", tmp_path / name, tokenizer)))
    assert found[0].ids.dtype == np.uint16
    assert used < 2 * 1.3 * size + (4 << 20)


def test_no_more_is_read_than_rows_are_asked_for(tmp_path, monkeypatch):
    """The end of each source cannot be read, and is not."""
    monkeypatch.setattr(tokenise, "_PIECE", 512)
    monkeypatch.setattr(tokenise._pieces, "__defaults__", (512,))
    tokenizer = byte_tokenizer()
    config = DataConfig(sequence_length=16)
    rows = [{"text": f"the cat {i}", "label": str(i % 2), "prompt": "a", "completion": f"{i}"} for i in range(2000)]
    bad = tmp_path / "a.jsonl"
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON")
    (tmp_path / "a.txt").write_bytes(b"to be or not\n" * 100_000 + b"\xff")
    for task in ("language_modelling", "generation", "classification", "regression"):
        with pytest.raises(ValueError, match="not JSON"):
            load_dataset_for(task, bad, tokenizer, config)
        found = load_dataset_for(task, bad, tokenizer, config, max_rows=3)
        assert len(found) == 3
        (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
        first = load_dataset_for(task, tmp_path / "some.jsonl", tokenizer, config).head(3)
        assert [row["input_ids"].tolist() for row in found] == [row["input_ids"].tolist() for row in first]
    with pytest.raises(ValueError, match=r"not UTF-8 at byte 1300000 \(line 100001\)"):
        load_dataset_for("language_modelling", tmp_path / "a.txt", tokenizer, config)
    assert len(load_dataset_for("language_modelling", tmp_path / "a.txt", tokenizer, config, max_rows=3)) == 3
    assert load_prompts(bad, max_rows=2) == (["a", "a"], ["0", "1"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: JSON that cannot be read: .*recursion"),
        ("a.json", '{"a":' * 100_000, "a.json: JSON that cannot be read: .*recursion"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": ' + "1" * 5000 + "}",
            "a.jsonl, line 2: JSON that cannot be .*Exceeds the limit",
        ),
        ("a.csv", 'text,label\n"' + "a,b\n" * 100, r"a\.csv, line 52: field larger than field limit \(200\)"),
        ("a.csv", "text,label\n" + "a," * 200, r"a\.csv, line 2: above 200 characters"),
        ("a.jsonl", '{"a": 1}\n{"a": "' + "a" * 200, r"a\.jsonl, line 2: above 200 characters"),
    ],
)
def test_absurd_rows(tmp_path, monkeypatch, name, content, message):
    if "200" in message:
        monkeypatch.setattr(text_files, "LONGEST", 200)
        monkeypatch.setattr("lte.data.tables.LONGEST", 200)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(error.value)


def test_classes_that_only_the_data_names_are_all_read(tmp_path):
    """A class that comes late is known; where the model names them, no row is read for it."""
    rows = [{"text": "a", "label": "x" if i < 5 else "y"} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, options = (str(tmp_path / "a.jsonl"),), Inputs(task="classification")
    named = BertConfig(vocab_size=300, architectures=["BertForSequenceClassification"], id2label={0: "y", 1: "x"})
    found = options.load(source, byte_tokenizer(), named, max_rows=2)
    assert found.class_names == ("y", "x")
    assert [row["labels"].item() for row in found] == [1, 1]
    new = options.load(source, byte_tokenizer(), BertConfig(vocab_size=300), max_rows=2, new_head=True)
    assert new.class_names == ("x", "y")
    assert len(new) == 2
