"""What is made of large files lies in the cache of `datasets`: the same as in memory, made once, and never by half."""

import json
import os
import pickle
import resource
import signal
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest

from byte_tokenizer import byte_tokenizer, with_bos
from lte.data import mapped_ids, stored, tasks
from lte.data.batches import PackedBlocks, PaddedRows, split_held_out
from lte.data.content import content_of
from lte.data.mapped_ids import MappedIds, rows_of
from lte.data.stored_columns import StoredColumn
from lte.data.tasks import DataConfig, load_dataset_for
from lte.files import NotWritten

TEXTS = [f"{i}: to be or not to be, {'that is ' * (i % 9)}the question é\n" for i in range(160)]


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": one, "other": one[:9]}) + "\n" for one in TEXTS))
    return tmp_path / "a.jsonl"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(mapped_ids, "ROW", 512)
    monkeypatch.setattr(tasks, "_ROWS", 2)
    return tmp_path / "cache"


def load(source, tokenizer=None, large=True, **options):
    before, stored.LARGE = stored.LARGE, 0 if large else 1 << 40
    try:
        config = DataConfig(**{"sequence_length": 32, **options})
        return load_dataset_for("language_modelling", source, tokenizer or byte_tokenizer(), config)
    finally:
        stored.LARGE = before


@pytest.fixture
def read(monkeypatch) -> list:
    """The sources that are read and tokenised, one entry each time."""
    seen, pieces_of = [], tasks._pieces_of

    def counted(source, *rest):
        seen.append(source)
        yield from pieces_of(source, *rest)

    monkeypatch.setattr(tasks, "_pieces_of", counted)
    return seen


def same(one: PackedBlocks | PaddedRows, other: PackedBlocks | PaddedRows) -> bool:
    rows = zip(one, other, strict=True)
    return content_of(one) == content_of(other) and all(a[name].equal(b[name]) for a, b in rows for name in a)


@pytest.mark.parametrize("size", [7, 32, 1500])
@pytest.mark.parametrize("kind", [byte_tokenizer, with_bos])
@pytest.mark.parametrize("shard", ["500MB", "4KB"])
def test_the_same_blocks_as_in_memory(source, monkeypatch, kind, size, shard):
    """Blocks within a row of ids and across several, in one file and in many; parts of them, too."""
    monkeypatch.setattr(datasets.config, "MAX_SHARD_SIZE", shard)
    monkeypatch.setattr("lte.data.batches._LOOKED_AT", 1000)
    monkeypatch.setattr(mapped_ids, "_RENEWED", 5)
    on_disk, in_memory = (load(source, kind(), large, sequence_length=size) for large in (True, False))
    assert isinstance(on_disk.ids, MappedIds)
    assert isinstance(in_memory.ids, np.ndarray)
    assert on_disk.ids.dtype == in_memory.ids.dtype == np.uint16
    assert (len(on_disk.ids._mapping.files) > 3) == (shard == "4KB")
    assert same(on_disk, in_memory)
    assert same(pickle.loads(pickle.dumps(on_disk)), in_memory)
    for a, b in zip(split_held_out(on_disk, 0.3), split_held_out(in_memory, 0.3), strict=True):
        assert isinstance(a.ids, MappedIds)
        assert same(a, b)
    assert same(on_disk.select([5, 0, 2]), in_memory.select([5, 0, 2]))


def test_ids_beyond_16_bits(source):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(66_000)])
    source.write_text(json.dumps({"text": "a<65999>b<3>" * 200}))
    assert load(source, tokenizer).ids.dtype == np.uint32
    assert same(load(source, tokenizer), load(source, tokenizer, large=False))


def test_made_once(source, read):
    first = load(source)
    assert read == [source]
    assert same(load(source), first)
    assert len(load(source, sequence_length=64)) < len(first)  # the same ids, in other blocks
    assert read == [source]


def test_made_again_for_another_file_tokenizer_or_option(source, read):
    load(source)
    content, state = source.read_bytes(), source.stat()
    source.write_bytes(content.replace(b"to be", b"TO BE"))  # as long, and as old
    os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert same(load(source), load(source, large=False))
    assert read == [source] * 3
    load(source, with_bos())
    load(source, byte_tokenizer(eos_token="<pad>"))
    load(source, text_column="other")
    load(source, skip_bad_rows=True)
    assert len(read) == 7
    load(source, with_bos())
    assert len(read) == 7


@pytest.mark.parametrize("task", ["generation", "classification", "regression"])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_same_rows_as_in_memory(tmp_path, monkeypatch, task, labelled):
    monkeypatch.setattr("lte.data.stored_columns._AT_ONCE", 7)
    rows = [{"text": one, "prompt": one, "completion": one[::-1], "label": str(i % 3)} for i, one in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, tokenizer = DataConfig(sequence_length=40, pad_to_multiple_of=8), with_bos()

    def load(large: int) -> PaddedRows:
        monkeypatch.setattr(stored, "LARGE", large)
        found = load_dataset_for(task, tmp_path / "a.jsonl", tokenizer, config, labelled=labelled)
        assert isinstance(found, PaddedRows)
        return found

    on_disk, in_memory = load(0), load(1 << 40)
    assert isinstance(on_disk.columns["input_ids"], StoredColumn)
    assert on_disk.class_names == in_memory.class_names
    pairs = [(on_disk, in_memory), (pickle.loads(pickle.dumps(on_disk)), in_memory)]
    pairs += zip(split_held_out(on_disk, 0.2), split_held_out(in_memory, 0.2), strict=True)
    pairs += [(on_disk.select([9, 150, 3]), in_memory.select([9, 150, 3])), (on_disk.head(5), in_memory.head(5))]
    for a, b in pairs:
        assert same(a, b)
    first, second = (one.collator([one[0], one[-1]]) for one in (on_disk, in_memory))
    assert all(first[name].equal(second[name]) for name in second)
    monkeypatch.setattr("lte.data.config.read_rows", None)  # what is kept is not read again
    assert same(load(0), in_memory)


def in_child(act) -> int:
    """Start a child that does this; it ends with 0 unless that fails."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def killed_in_the_middle(source, monkeypatch):
    pieces_of = tasks._pieces_of

    def dies(*arguments):
        for number, piece in enumerate(pieces_of(*arguments)):
            if number == 140:
                os.kill(os.getpid(), signal.SIGKILL)
            yield piece

    with monkeypatch.context() as patched:
        patched.setattr(tasks, "_pieces_of", dies)
        _, status = os.waitpid(in_child(lambda: load(source)), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_what_a_killed_process_has_written_is_not_read(source, cache, read, monkeypatch):
    killed_in_the_middle(source, monkeypatch)
    (half,) = cache.rglob("*.arrow")  # of a name that nobody reads
    assert half.stat().st_size > 1000
    assert same(load(source), load(source, large=False))
    assert len(read) == 2
    assert same(load(source), load(source, large=False))
    assert len(read) == 3


def test_processes_at_the_same_time(source, read):
    expected = load(source, large=False)

    def right():
        assert same(load(source), expected)

    children = [in_child(right) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    right()
    assert read == [source]  # by the first line here: the children have made it


def test_a_full_disk_is_one_line(source, cache):
    load(source, sequence_length=8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
    try:
        with pytest.raises(
            NotWritten, match=r"cache .*cache \(HF_DATASETS_CACHE names another one\) could not"
        ) as error:
            load(source, text_column="{text}{text}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    options = {"text_column": "{text}{text}"}
    assert same(load(source, **options), load(source, large=False, **options))


def test_a_cache_that_cannot_be_made(source, cache):
    cache.write_text("a file")
    with pytest.raises(NotWritten, match=r"cache .* could not be written"):
        load(source)


def test_errors_of_the_data_are_the_same(source):
    with source.open("a") as file:
        file.write("no JSON\n")
    with pytest.raises(ValueError, match=r"a.jsonl, line 161: not JSON \(Expecting value, column 1\)$"):
        load(source)
    with pytest.raises(ValueError, match=r"a.jsonl: no column 'x', the columns are 'text', 'other'"):
        load(source, text_column="x")
    source.write_text(json.dumps({"text": "a"}))
    with pytest.raises(ValueError, match="hold 1 tokens, fewer than one block"):
        load(source)


def test_damage_is_one_line(source, cache):
    load(source)
    (file,) = cache.rglob("*.arrow")
    os.truncate(file, 200)
    with pytest.raises(ValueError, match=r"generator.default-fingerprint=\w+: damaged \(.*\): remove this folder$"):
        load(source)


def test_no_bar_where_there_is_no_terminal(source, capfd):
    load(source)
    assert capfd.readouterr().err == ""
    assert datasets.utils.is_progress_bar_enabled()


def test_small_files_stay_in_memory(source, cache):
    assert isinstance(load(source, large=False).ids, np.ndarray)
    config = DataConfig(sequence_length=32)
    assert isinstance(load_dataset_for("language_modelling", source, byte_tokenizer(), config).ids, np.ndarray)
    assert not cache.exists()


def test_ids_are_not_kept_in_memory(monkeypatch):
    """Neither while they are written, nor while blocks are found in them and their fingerprint is made."""
    monkeypatch.setattr(mapped_ids, "ROW", 1 << 12)
    monkeypatch.setattr("lte.data.batches._LOOKED_AT", 1 << 14)
    monkeypatch.setattr("lte.data.digest._CHUNK", 1 << 15)
    part = np.arange(1 << 14, dtype=np.uint16)

    def blocks(parts: int) -> PackedBlocks:
        files = stored.keep_rows(lambda: rows_of((part for _ in range(parts)), np.uint16), f"parts{parts}", 2)
        return PackedBlocks(MappedIds(files), 512, bos=(7,))

    content_of(blocks(2))  # libraries keep what they make at first
    tracemalloc.start()
    try:
        found = blocks(150)
        content_of(found)
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) > 4_700
    assert used < 1 << 20 < 4 << 20 < 2 * len(found.ids)
