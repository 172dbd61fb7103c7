"""Blocks, prompts and chats begin with the BOS that the tokenizer puts before a text, once."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lte.cli.generate import Generate
from lte.cli.generate import _encode as encode_given
from lte.data.batches import IGNORED, hold_out_for_calibration, split_held_out
from lte.data.tasks import DataConfig, load_dataset_for
from lte.data.tokenise import wrapping
from lte.evaluation.generation import _encode as encode_prompts

WORDS = ["the cat sat on the mat", "a dog ran", "far away, and then it came back to us", "no"] * 4
SPECIAL = ["<eos>", "<pad>", "<bos>", "<more>", "<unk>"]
EOS, BOS, MORE = 0, 2, 3


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


def sentencepiece(prepend: bool) -> Tokenizer:
    """As Llama 2's (with ``prepend``) and Gemma's: blanks are a character of their own, bytes stand in for what is
    unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blanks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prepend else blanks
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


def wrapped(tokenizer: Tokenizer, template: str = "", **special: str) -> PreTrainedTokenizerFast:
    if template:
        ids = [(token, i) for i, token in enumerate(SPECIAL)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"eos_token": "<eos>", "pad_token": "<pad>", **special}
    )


KINDS = {
    "llama3": (lambda: wrapped(byte_level(), "<bos> $A", bos_token="<bos>"), [BOS]),
    "llama2": (lambda: wrapped(sentencepiece(True), "<bos> $A", bos_token="<bos>"), [BOS]),
    "gemma": (lambda: wrapped(sentencepiece(False), "<bos> $A", bos_token="<bos>"), [BOS]),
    "opt": (lambda: wrapped(byte_level(), "<eos> $A", bos_token="<eos>"), [EOS]),
    "glm": (lambda: wrapped(byte_level(), "<bos> <more> $A"), [BOS, MORE]),
    "bert": (lambda: wrapped(byte_level(), "<bos> $A <more>", cls_token="<bos>", sep_token="<more>"), [BOS]),
    "bos and eos": (lambda: wrapped(byte_level(), "<bos> $A <eos>", bos_token="<bos>"), [BOS]),
}
NONE = {
    "gpt2": lambda: wrapped(byte_level(), bos_token="<eos>"),  # it has a BOS and does not put it before texts
    "qwen2": lambda: wrapped(byte_level()),
    "t5": lambda: wrapped(byte_level(), "$A <eos>"),
}


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def stream_of(tokenizer, texts, start):
    """Documents with the tokenizer's start, EOS between two."""
    stream = []
    for text in texts:
        if stream and start[:1] != [EOS]:
            stream.append(EOS)
        stream += [*start, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    return stream


@pytest.mark.parametrize("size", [5, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_begins_with_bos(tmp_path, kind, size):
    made, start = KINDS[kind]
    tokenizer = made()
    stream = stream_of(tokenizer, WORDS, start)
    source = write(tmp_path / "a.jsonl", WORDS)
    dataset = load_dataset_for("language_modelling", source, tokenizer, DataConfig(sequence_length=size))
    place = 0
    for row in dataset:
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        assert len(ids) == len(labels) == size
        assert ids[: len(start)] == start
        own = stream[place : place + len(start)] == start  # a document begins here: no second one
        assert ids[0 if own else len(start) :] == stream[place : place + size - (0 if own else len(start))]
        place += size - (0 if own else len(start))
        assert labels[: len(start)] == [IGNORED] * len(start)
        for token, label in zip(ids[len(start) :], labels[len(start) :], strict=True):
            assert label == (IGNORED if token in start and token != EOS else token)
    assert len(stream) - place < size
    whole = torch.cat([row["labels"] for row in dataset])
    if start != [EOS]:  # each token of the texts and each EOS is predicted once
        assert whole[whole != IGNORED].tolist() == [token for token in stream[:place] if token not in start]
    parts = [
        *split_held_out(dataset, 1),
        *hold_out_for_calibration(dataset, 1, 0),
        dataset.select([1]),
        dataset.head(2),
    ]
    assert all(row["input_ids"][: len(start)].tolist() == start for part in parts for row in part)


@pytest.mark.parametrize("kind", NONE)
def test_without_a_bos_blocks_are_the_stream(tmp_path, kind):
    tokenizer = NONE[kind]()
    stream = stream_of(tokenizer, WORDS, [])
    source = write(tmp_path / "a.jsonl", WORDS)
    dataset = load_dataset_for("language_modelling", source, tokenizer, DataConfig(sequence_length=8))
    assert torch.cat([row["input_ids"] for row in dataset]).tolist() == stream[: len(stream) // 8 * 8]
    assert all(row["labels"].equal(row["input_ids"]) for row in dataset)


def test_token_files_stay_files(tmp_path):
    tokenizer = KINDS["gemma"][0]()
    stream = [10, 11, 12, BOS, 13, 14, 15, 16, EOS, BOS, 17, 18, 19, 20]
    np.save(tmp_path / "ids.npy", np.array(stream, dtype=np.uint16))
    source = tmp_path / "ids.npy"
    dataset = load_dataset_for("language_modelling", source, tokenizer, DataConfig(sequence_length=4))
    blocks = [[BOS, 10, 11, 12], [BOS, 13, 14, 15], [BOS, 16, EOS, BOS], [BOS, 17, 18, 19]]
    assert [row["input_ids"].tolist() for row in dataset] == blocks
    assert dataset[2]["labels"].tolist() == [IGNORED, 16, EOS, IGNORED]
    for part in (dataset, dataset.head(2), *split_held_out(dataset, 1)):
        assert isinstance(part.ids, np.memmap)
    assert [part.ids.tolist() for part in split_held_out(dataset, 1)] == [stream[:10], stream[10:13]]
    chosen = dataset.select([3, 0, 2])
    assert [row["input_ids"].tolist() for row in chosen] == [blocks[i] for i in (3, 0, 2)]
    assert chosen.ids.tolist() == [*stream[10:13], *stream[:3], *stream[7:10]]


def test_a_document_that_writes_bos_has_one(tmp_path):
    tokenizer = KINDS["llama3"][0]()
    source = write(tmp_path / "a.jsonl", ["<bos>the cat sat", "the cat sat"])
    stream = stream_of(tokenizer, ["the cat sat"] * 2, [BOS])
    dataset = load_dataset_for("language_modelling", source, tokenizer, DataConfig(sequence_length=len(stream)))
    assert dataset[0]["input_ids"].tolist() == stream


@pytest.mark.parametrize("template", ["<bos>", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_chats_have_one(tmp_path, kind, template):
    """In training, in evaluation and in `lte generate`, whether or not the template writes BOS too."""
    made, start = KINDS[kind]
    tokenizer = made()
    written = template and "".join(SPECIAL[token] for token in start)
    tokenizer.chat_template = written + "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    row = load_dataset_for("generation", tmp_path / "a.jsonl", tokenizer, DataConfig(messages="messages"))[0]
    prompt = [*start, *tokenizer("the cat|", add_special_tokens=False)["input_ids"]]
    assert row["input_ids"][: len(prompt)].tolist() == prompt
    (evaluated,) = encode_prompts([f"{written}the cat|"], tokenizer, 64, 8, False)
    assert evaluated.tolist() == prompt
    given = encode_given(tokenizer, ["the cat"], Generate("model", chat=True), False)
    assert given["input_ids"].tolist() == [prompt]


def test_the_start_is_what_the_tokenizer_puts():
    for made, start in KINDS.values():
        assert wrapping(made())[0] == start
    assert all(wrapping(made())[0] == [] for made in NONE.values())
