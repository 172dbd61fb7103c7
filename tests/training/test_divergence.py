"""A run that diverges stops, says where, and leaves nothing that is not finite."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import arguments, dense_llama, markov_blocks, sparse_llama, trainer_for
from transformers import AutoModelForCausalLM, TrainerCallback

import lte
from lte.data.batches import PackedBlocks
from lte.surgery.convert import install_routers_
from lte.training.trainer import LTETrainer

ABSURD = 1e30  # overflows whatever the order of sums: 1e6 does on some processors
RUNS = {
    "default": (lte.LTEConfig(expert_size=8, grouping="random"), {}),
    "kmeans": (lte.LTEConfig(expert_size=8, grouping="kmeans"), {}),
    "random start": (lte.LTEConfig(expert_size=8, grouping="random"), {"router_start": "random"}),
    "no dense stage": (lte.LTEConfig(expert_size=8, grouping="random"), {"dense_fraction": 0.0}),
    "dense": (lte.LTEConfig(expert_size=8, grouping="random"), {"schedule": "dense"}),
    "paper": (
        lte.LTEConfig(expert_size=8, grouping="random"),
        {"schedule": "paper", "eta": 0.3, "dense_fraction": 0.0},
    ),
    "topk-moe": (lte.TopKMoEConfig(expert_size=8, grouping="random"), {}),
    "noisy-topk": (lte.NoisyTopKConfig(expert_size=8, grouping="random"), {}),
    "sigma-moe": (lte.SigmaMoEConfig(expert_size=8, grouping="random"), {}),
    "cats": (lte.CATSConfig(tokens=200), {}),
    "deja-vu": (lte.DejaVuConfig(tokens=200, fit_epochs=1), {}),
    "moefication": (lte.MoEficationConfig(expert_size=8, grouping="random", tokens=200, fit_epochs=1), {}),
    "static-pruning": (lte.StaticPruningConfig(tokens=200), {}),
    "relufication": (lte.ReLUficationConfig(tokens=200, target_sparsity=0.7), {}),
}


def run_of(folder, name, **overrides):
    method, options = RUNS[name]
    if options.get("schedule", "default") == "default":
        options = {"target_sparsity": method.target_sparsity or 0.5, **options}
    model = install_routers_(dense_llama(), method)
    return LTETrainer(
        model,
        args=arguments(folder, **{**options, **overrides}),
        train_dataset=markov_blocks(200),
        data_collator=PackedBlocks.collator,
    )


class Breaks(TrainerCallback):
    """Sets a number of a weight once a step is over."""

    def __init__(self, step, value=math.nan, name="model.layers.1.mlp.up_proj.weight"):
        self.step, self.value, self.name = step, value, name

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            kwargs["model"].get_parameter(self.name).data[0] = self.value


def weights_in(folder):
    return [tensor for file in folder.glob("**/*.safetensors") for tensor in load_file(file).values()]


@pytest.mark.parametrize("logging_steps", [1, 100])
@pytest.mark.parametrize("name", RUNS)
def test_an_absurd_learning_rate_with_every_method_and_schedule(tmp_path, name, logging_steps):
    trainer = run_of(
        tmp_path, name, learning_rate=ABSURD, save_strategy="steps", save_steps=1, logging_steps=logging_steps
    )
    with pytest.raises(ValueError, match=r"training diverged in the \w+ stage, at step \d+ of 12: ") as error:
        trainer.train()
    assert f"Train anew with a lower learning_rate than {ABSURD:g}" in str(error.value)
    assert all(tensor.isfinite().all() for tensor in weights_in(tmp_path))


def test_the_last_checkpoint_that_is_finite_is_kept_and_serves(tmp_path):
    trainer = trainer_for(
        tmp_path, callbacks=[Breaks(4)], save_strategy="steps", save_steps=1, save_total_limit=1, dense_fraction=0.5
    )
    with pytest.raises(ValueError, match="of 12: not all weights are finite after it") as error:
        trainer.train()
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    said = re.search(r"(\S+checkpoint-3) is good", str(error.value))
    assert said
    model = AutoModelForCausalLM.from_pretrained(said[1])
    assert all(one.isfinite().all() for one in model.parameters())
    trainer_for(tmp_path / "again", model).train()


def test_a_checkpoint_goes_once_a_step_from_the_next_went_well(tmp_path):
    """With a limit of one, too: weights of 1e30 are finite, and may be saved before anybody knows."""
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    with pytest.raises(ValueError, match="checkpoint-1 is good"):
        trainer_for(tmp_path, schedule="dense", learning_rate=ABSURD, warmup_steps=2, **saving).train()
    assert (tmp_path / "checkpoint-1").is_dir()
    trainer_for(tmp_path / "whole", schedule="dense", max_steps=3, **saving).train()
    assert [folder.name for folder in (tmp_path / "whole").glob("checkpoint-*")] == ["checkpoint-3"]


def test_step_stage_and_weight_are_named_though_nobody_looks_at_each_step(tmp_path):
    trainer = trainer_for(tmp_path, callbacks=[Breaks(2)], logging_steps=5, dense_fraction=0.5)
    looks, look = [], trainer.stop_if_diverged
    trainer.stop_if_diverged = lambda **how: looks.append(trainer.state.global_step) or look(**how)
    with pytest.raises(
        ValueError, match=r"in the dense stage, at step 3 of 12: the loss is nan; \d+ of \d+ weights .* first model\."
    ):
        trainer.train()
    assert looks == [5]


def test_a_router_that_breaks_in_the_soft_stage(tmp_path):
    broken = Breaks(6, name="model.layers.0.mlp.router.weight")
    trainer = trainer_for(tmp_path, callbacks=[broken], save_strategy="steps", save_steps=1)
    with pytest.raises(
        ValueError,
        match=r"in the soft stage, at step 6 of 12: .* 1 of \d+ weights .* first model.layers.0.mlp.router.weight. "
        r"Train anew with a lower learning_rate than 0.001 or router_learning_rate than 0.01\.",
    ):
        trainer.train()


def test_a_gradient_of_nothing_where_there_is_a_loss(tmp_path):
    """Squares overflow in a norm, which then gives 0 for every input: a loss of ln 64, and no gradient."""
    model = sparse_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1e30)
        model.model.norm.weight.zero_()
    with pytest.raises(ValueError, match=r"at step 1 of 12: the gradient is 0 at a loss of 4\.1"):
        trainer_for(tmp_path, model, dense_fraction=0.5).train()


def test_a_batch_without_labels_has_no_gradient_and_is_no_sign(tmp_path):
    rows = [{"input_ids": [3] * 16, "labels": [-100] * 16} for _ in range(200)]

    def collate(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    model = sparse_llama()
    args = arguments(tmp_path, schedule="dense", max_steps=3)
    LTETrainer(model, args=args, train_dataset=rows, data_collator=collate).train()


@pytest.mark.parametrize("value", [math.nan, 3e38])
def test_an_evaluation_that_is_not_finite(tmp_path, value):
    trainer = LTETrainer(
        sparse_llama(),
        args=arguments(tmp_path, logging_steps=100, eval_strategy="steps", eval_steps=1),
        train_dataset=markov_blocks(200),
        eval_dataset=markov_blocks(20, seed=5),
        data_collator=PackedBlocks.collator,
        callbacks=[Breaks(2, value, "lm_head.weight")],
    )
    sign = (
        "not all weights are finite after it"
        if math.isnan(value)
        else "not all outputs are finite after it; all weights are finite, outputs are not, first that of lm_head"
    )
    with pytest.raises(ValueError, match=f"in the dense stage, at step 2 of 12: {sign}"):
        trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [1]


def test_a_model_that_broke_after_training_is_not_saved(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=2, schedule="dense")
    trainer.train()
    trainer.model.lm_head.weight.data[3] = math.inf
    with pytest.raises(ValueError, match=r"1 of \d+ weights hold NaN or infinities, first lm_head.weight"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


class Scaler:
    scale = 65536.0

    def get_scale(self):
        return self.scale


def test_overflow_that_the_scaler_of_fp16_handles_is_no_sign(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, max_steps=2, schedule="dense")
    trainer.train()
    norm = torch.tensor(math.inf)
    trainer._get_grad_norm(trainer.model, norm)
    with pytest.raises(ValueError, match="at step 3 of 2: the gradient norm is inf; all weights are finite"):
        trainer.stop_if_diverged()
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
    trainer.accelerator.scaler = Scaler()
    trainer._get_grad_norm(trainer.model, norm)
    trainer.stop_if_diverged()
    trainer.accelerator.scaler.scale = 2.0**-20
    with pytest.raises(ValueError, match=r"gradients in fp16 overflowed at each of many steps.* or bf16"):
        trainer.stop_if_diverged()


def test_weights_in_float16_are_not_trained(tmp_path):
    with pytest.raises(ValueError, match=r"weights in float16 cannot be trained.* float32 .or bfloat16."):
        trainer_for(tmp_path, sparse_llama().half())
    trainer_for(tmp_path, sparse_llama().bfloat16(), max_steps=4).train()
