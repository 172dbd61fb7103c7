import json
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import lte
from byte_tokenizer import byte_tokenizer
from lte.cli import sweep
from lte.cli.main import main


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """llama, bert and t5, tiny and dense; text.txt, ids.npy, classes.jsonl, prompts.jsonl."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    shape = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "pad_token_id": 1, "eos_token_id": 0, "max_position_embeddings": 256}
    t5 = {"vocab_size": 258, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    t5 |= {"pad_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1}
    for name, model in {
        "llama": LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=0)),
        "bert": BertForSequenceClassification(BertConfig(**shape)),
        "t5": T5ForConditionalGeneration(T5Config(**t5)),
    }.items():
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    text = "".join(f"{n} and {n + 1} make {2 * n + 1}.\n" for n in range(150))
    (folder / "text.txt").write_text(text)
    np.save(folder / "ids.npy", np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16))
    classes = [{"text": f"the number {n}", "label": "odd" if n % 2 else "even"} for n in range(60)]
    prompts = [{"prompt": f"after {n} comes ", "completion": f"{n + 1}"} for n in range(60)]
    for name, rows in {"classes.jsonl": classes, "prompts.jsonl": prompts}.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def sparse(files, tmp_path_factory):
    """Hard, untrained."""
    folder = tmp_path_factory.mktemp("sparse")
    assert main(["sparsify", "--model", str(files / "llama"), "-o", str(folder), "--expert-size", "8"]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    lte.set_mode_(model, "hard")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Commands of a sweep run here, without the seconds that each process takes to begin."""

    def run(command, *, stdout, stderr, **_):
        with redirect_stdout(StringIO()) as printed, redirect_stderr(stderr):
            code = main(command[3:])
        return subprocess.CompletedProcess(command, code, printed.getvalue())

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
