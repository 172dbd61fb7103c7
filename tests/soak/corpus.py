"""Whole files of every kind that ``lte`` reads: small, and the same each time."""

import csv
import gzip
import json
import random
import shutil
from pathlib import Path

import gguf
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from forked import Commands
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 320
SPECIAL = ("<eos>", "<bos>", "<pad>")
CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 128}
IDS = {"eos_token_id": 0, "bos_token_id": 1, "pad_token_id": 2}
COMMON = "train --text text.txt --sequence-length 32 --held-out 4 --per-device-train-batch-size 4 --learning-rate 1e-3"
COMMON += " --report-to none --logging-steps 2 -o out"
EXPERTS = "--expert-size 8 --grouping random"
MIDDLE = "--max-steps 12 --save-steps 2"
TARGET = "--target-sparsity 0.5"
INTERRUPTED = f"{COMMON} --model dense {TARGET} {EXPERTS} {MIDDLE} -o run"
RECIPE = """\
model: model
text: text.txt
sequence_length: 32
held_out: 4
max_steps: 3
per_device_train_batch_size: 4
learning_rate: 1.0e-3
target_sparsity: 0.5
expert_size: 8
grouping: random
dense_fraction: 0.34
lr_scheduler_kwargs: {}
save_strategy: "no"
report_to: none
bf16: no
output_dir: out
"""


def text(sentences: int = 300) -> str:
    chosen = random.Random(0)
    who, does, what = (
        ("the cat", "a dog", "my friend", "the sea"),
        ("sees", "likes", "counts"),
        ("stones", "rain", "it"),
    )
    return "".join(f"{chosen.choice(who)} {chosen.choice(does)} {chosen.choice(what)}.\n" for _ in range(sentences))


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
    )
    made.train_from_iterator([text()], trainer)
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", pair=None, special_tokens=[("<bos>", 1)])
    names = dict(zip(("eos_token", "bos_token", "pad_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=128, chat_template=CHAT, **names)


def build(folder: Path, commands: Commands) -> None:
    """Write all of it: models, data, results, a run that was cut off."""
    torch.manual_seed(0)
    tokens = tokenizer()
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE, **IDS, num_key_value_heads=2)).eval()
    with torch.random.fork_rng():
        bert = BertForSequenceClassification(BertConfig(**SHAPE, pad_token_id=2, id2label={0: "no", 1: "yes"})).eval()
    llama.save_pretrained(folder / "dense")
    llama.save_pretrained(folder / "sharded", max_shard_size="60KB")
    bert.save_pretrained(folder / "classifier")
    for name in ("dense", "sharded", "classifier"):
        tokens.save_pretrained(folder / name)
    _write_gguf(folder / "dense.gguf", llama, tokens)
    _write_data(folder)
    teal = ["--method", "teal", "--target-sparsity", "0.4", *_READ]
    _must(commands, ["sparsify", "--model", "dense", *teal, "-o", "teal"], folder)
    _write_results(folder, commands)
    _write_interrupted(folder, commands)


_READ = ["--text", "text.txt", "--sequence-length", "32"]


def _must(commands: Commands, argv: list[str], folder: Path) -> str:
    ran = commands.run(argv, folder)
    assert ran.code == 0, f"lte {' '.join(argv)}: {ran.err}"
    return ran.out


def _write_data(folder: Path) -> None:
    lines = text().splitlines()[:120]
    (folder / "text.txt").write_text(text())
    (folder / "recipe.yaml").write_text(RECIPE)
    rows = [{"id": index, "text": line, "label": ["no", "yes"][index % 2]} for index, line in enumerate(lines)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    for name, delimiter in {"rows.csv": ",", "rows.tsv": "\t"}.items():
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text", "label"], delimiter=delimiter, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    for name in ("text.txt", "rows.jsonl"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes(), mtime=0))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    np.save(folder / "ids.npy", np.array(tokenizer()(text())["input_ids"], dtype=np.uint16))
    pairs = [{"prompt": line[:-5], "completion": line[-5:]} for line in lines[:40]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    roles = ("user", "assistant")
    chats = [
        {"messages": [{"role": role, "content": part} for role, part in zip(roles, row.values(), strict=True)]}
        for row in pairs
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))


def _write_results(folder: Path, commands: Commands) -> None:
    rows = []
    for name, sparsity in {"sparser": "0.7", "sparse": "0.5"}.items():
        recipe = ["recipe.yaml", "--model", "dense", "--target-sparsity", sparsity, "--compensation-rank", "2"]
        rows.append(_must(commands, ["train", *recipe, "-o", name, "--json"], folder))
        shutil.rmtree(folder / name / "lte_teacher")  # no part of the model
    rows += [_must(commands, ["eval", one, *_READ, "--max-rows", "8", "--json"], folder) for one in ("dense", "sparse")]
    (folder / "results.jsonl").write_text("".join(one.splitlines()[-1] + "\n" for one in rows))


def _write_interrupted(folder: Path, commands: Commands) -> None:
    """What a run leaves that is killed after its eighth step."""
    _must(commands, INTERRUPTED.split(), folder)
    for path in (folder / "sparse").iterdir():
        if path.is_file():
            (folder / "run" / path.name).unlink(missing_ok=True)
    for step in (10, 12):
        shutil.rmtree(folder / "run" / f"checkpoint-{step}")


def _write_gguf(path: Path, model: LlamaForCausalLM, tokens: PreTrainedTokenizerFast) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokens.backend_tokenizer.to_str())["model"]
    words = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL if one in SPECIAL else gguf.TokenType.NORMAL for one in words])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        writer.add_tensor(found, _as_llama_cpp(name, value, config).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _as_llama_cpp(name: str, value: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """With the rows of q and k in the order in which llama.cpp turns them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return value
    return value.view(heads, 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape).contiguous()
