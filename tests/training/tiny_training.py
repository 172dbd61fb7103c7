"""A tiny sparse llama, text of a Markov chain, and a whole run of all stages in a second or two.

As a script it is one process of such a run: ``tiny_training.py FOLDER [kill_after_step]``.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback

import lte
from lte.data.batches import PackedBlocks
from lte.training.arguments import LTETrainingArguments
from lte.training.trainer import LTETrainer

VOCABULARY = 64
TOKENS = 16  # a block


def dense_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})).eval()


def sparse_llama(seed: int = 0, attention_sparsity: float = 0.0, **overrides: Any) -> PreTrainedModel:
    method = lte.LTEConfig(expert_size=8, grouping="random", attention_sparsity=attention_sparsity)
    return lte.sparsify_(dense_llama(seed, **overrides), method)


DEPENDENT = ("zero", "constant", "few", "one large", "dead")


@torch.no_grad()
def make_dependent_(model: Any, data: list[Any], kind: str) -> None:
    """Let the first FFN's inputs, or what its neurons add, depend on each other."""
    layer = model.model.layers[0]
    if kind == "zero":
        layer.post_attention_layernorm.weight.zero_()
    if kind == "constant":
        data[0]["input_ids"].fill_(7)
    if kind == "few":
        data[0]["input_ids"] = data[0]["input_ids"][:1, :3]
    if kind == "one large":
        layer.post_attention_layernorm.weight[0] = 1e8
    if kind == "dead":
        layer.mlp.down_proj.weight.zero_()


def markov_blocks(rows: int, seed: int = 0, length: int = TOKENS) -> PackedBlocks:
    """Each token has four successors; the chain is the same for every seed."""
    successors = np.random.default_rng(0).integers(3, VOCABULARY, (VOCABULARY, 4))
    choices = np.random.default_rng(seed + 1).integers(0, 4, rows * length)
    ids, token = np.empty(rows * length, dtype=np.uint16), 3
    for index, choice in enumerate(choices):
        token = successors[token, choice]
        ids[index] = token
    return PackedBlocks(ids, length)


def arguments(folder: str | Path, **overrides: Any) -> LTETrainingArguments:
    usual = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "router_learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if overrides.get("schedule", overrides.get("recipe", "default")) == "default":
        usual["target_sparsity"] = 0.5
    return LTETrainingArguments(str(folder), **{**usual, **overrides})


def trainer_for(
    folder: str | Path,
    model: PreTrainedModel | None = None,
    train_dataset: Any = None,
    callbacks: list[TrainerCallback] | None = None,
    **overrides: Any,
) -> LTETrainer:
    return LTETrainer(
        model=sparse_llama() if model is None else model,
        args=arguments(folder, **overrides),
        train_dataset=markov_blocks(200) if train_dataset is None else train_dataset,
        data_collator=PackedBlocks.collator,
        callbacks=callbacks,
    )


class Kill(TrainerCallback):
    """Ends the process, with no chance to tidy up, in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, kill_after: str | None = None) -> None:
    torch.set_num_threads(1)
    kill = [Kill(int(kill_after))] if kill_after else []
    saving = {"save_strategy": "steps", "save_steps": 2} if kill_after else {}
    several = "RANK" in os.environ
    options = json.loads(os.environ.get("TINY_OPTIONS", "{}"))
    backend = {"ddp_backend": "gloo"} if several else {}
    model = sparse_llama(attention_sparsity=0.25 * (several and not options))
    trainer = trainer_for(folder, model, callbacks=kill, **saving, **backend, **options)
    trainer.train()
    rank = os.environ.get("RANK", "0")
    torch.save(trainer.model.state_dict(), Path(folder, f"weights-{rank}.pt"))
    kept = {
        "logs": trainer.state.log_history,
        "eta": float(trainer.training.eta),
        "integral": float(trainer.training.controller.integral),
    }
    Path(folder, f"run-{rank}.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    main(*sys.argv[1:])
