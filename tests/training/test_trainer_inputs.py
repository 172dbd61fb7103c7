"""What users give ``LTETrainer``: other heads, data and options of ``transformers.Trainer`` than a usual run has."""

import copy
import itertools
import shutil

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_training import arguments, markov_blocks, sparse_llama, trainer_for
from torch.nn import functional as F
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, EarlyStoppingCallback

import lte
from lte.data.batches import PackedBlocks
from lte.modules.recording import sparse_layers
from lte.training.distillation import head_error, predicts
from lte.training.trainer import LTETrainer

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


class Rows(torch.utils.data.Dataset):
    """Rows of six tokens with a label; ``more`` columns that no model takes."""

    def __init__(self, label, **more):
        self.ids = np.random.default_rng(0).integers(3, 64, (200, 6))
        self.label, self.more = label, more

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": torch.tensor(self.ids[index]), "labels": self.label(self.ids[index]), **self.more}


def stacked(rows):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def bert(**config):
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(**SHAPE, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **config)
    )
    return lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="random"))


def classes(ids):
    return int(ids[0]) % 2


def trained(folder, model, dataset, **options):
    trainer = LTETrainer(model, arguments(folder, **options), train_dataset=dataset, data_collator=stacked)
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_accumulation_leaves_the_balance_of_a_classifiers_losses(tmp_path):
    losses = {}
    for batch, steps in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "learning_rate": 0.0}
        trainer = trained(tmp_path, bert(), Rows(classes), router_learning_rate=0.0, seed=1, **options)
        losses[steps] = [np.mean(logged(trainer, name)[:4]) for name in ("task_loss", "efficiency_loss")]
    assert losses[4] == pytest.approx(losses[1], rel=0.1)


def test_a_regression_learns_from_its_teacher(tmp_path):
    rows = Rows(lambda ids: torch.tensor(float(ids[0]) / 64))
    trainer = trained(tmp_path, bert(num_labels=1, problem_type="regression"), rows)
    assert max(logged(trainer, "distillation_loss")) > 1e-6


def test_errors_of_heads_by_hand():
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    assert head_error(student, teacher, "regression") == pytest.approx(
        (student - teacher).square().mean(-1).sum().item()
    )
    p, q = teacher.sigmoid(), student.sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert head_error(student, teacher, "multi_label_classification") == pytest.approx(
        kl.mean(-1).sum().item(), rel=1e-5
    )
    classes = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")
    assert head_error(student, teacher, "single_label_classification") == pytest.approx(classes.item(), rel=1e-5)


def test_a_token_counts_where_its_own_label_is_unless_the_next_is_predicted():
    labels, logits = torch.tensor([[-100, 5, 6, -100]]), torch.zeros(1, 4, 9)
    assert predicts(labels, logits, causal=True).tolist() == [[True, True, False, False]]
    assert predicts(labels, logits, causal=False).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("stage", ["dense", "soft"])
def test_label_smoothing_is_of_the_next_token(tmp_path, stage):
    losses = []
    for smoothing in (0.0, 1e-6):
        trainer = trainer_for(tmp_path, label_smoothing_factor=smoothing)
        trainer.create_optimizer_and_scheduler(12)
        trainer.stages.begin(None)
        trainer.training.set_stage(stage)
        trainer.stages.stage = stage
        batch = trainer._prepare_inputs(PackedBlocks.collator([trainer.train_dataset[0]]))
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("options", [{"feature_distillation_weight": 1.0}, {"distillation_weight": 0.0}], ids=str)
def test_batches_of_padding_alone_count_for_nothing(tmp_path, options):
    calls = itertools.count()

    def collator(rows):
        batch = PackedBlocks.collator(rows)
        real = next(calls) % 3 > 0
        fill = torch.ones_like if real else torch.zeros_like
        return {
            **batch,
            "attention_mask": fill(batch["labels"]),
            "labels": batch["labels"] if real else batch["labels"].fill_(-100),
        }

    trainer = LTETrainer(
        sparse_llama(), arguments(tmp_path, **options), train_dataset=markov_blocks(200), data_collator=collator
    )
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert all(np.isfinite(value) for entry in trainer.state.log_history for value in entry.values())
    assert np.isfinite(
        [
            float(trainer.training.eta),
            float(trainer.training.controller.integral),
            float(trainer.training.controller.gap),
        ]
    ).all()


def test_a_second_run_trains_what_the_first_froze(tmp_path):
    model = lte.sparsify_(tiny_model("llama"), lte.LTEConfig(expert_size=8, grouping="random", compensation_rank=4))
    first = LTETrainer(
        model,
        arguments(tmp_path, schedule="dense", max_steps=2),
        train_dataset=small(),
        data_collator=PackedBlocks.collator,
    )
    first.train()
    second = LTETrainer(model, arguments(tmp_path), train_dataset=small(), data_collator=PackedBlocks.collator)
    second.create_optimizer()
    trained = {id(p) for group in second.optimizer.param_groups for p in group["params"]}
    for layer in sparse_layers(model).values():
        assert all(id(p) in trained for p in [*layer.router.parameters(), *layer.compensation.parameters()])


def small():
    blocks = markov_blocks(200)
    return PackedBlocks(blocks.ids % 40 + 3, blocks.sequence_length)


def test_training_again_begins_anew(tmp_path, caplog):
    trainer = trainer_for(tmp_path, max_steps=8)
    trainer.train()
    assert "start anew" not in caplog.text
    trainer_for(tmp_path, trainer.model, max_steps=8).train()
    assert "in mode hard, so it is trained already: its weights are kept, but its routers and thresholds" in caplog.text
    trainer.training.controller.integral = 9.0
    trainer.stages.begin(None)
    assert (trainer.training.eta, trainer.training.controller.integral, trainer.distiller.teacher) == (0.0, 0.0, None)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's
def test_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(sparse_llama(), peft.LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="adapters of peft"):
        trainer_for(tmp_path, model)


def test_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not take model_init"):
        LTETrainer(args=arguments(tmp_path), model_init=sparse_llama)


def test_a_folder_called_dense_is_left_alone(tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "mine.txt").write_text("kept")
    trainer_for(tmp_path).train()
    assert (tmp_path / "dense" / "mine.txt").read_text() == "kept"


def test_resuming_with_other_steps_is_refused(tmp_path):
    trainer_for(tmp_path, save_strategy="steps", save_steps=6).train()
    with pytest.raises(ValueError, match="the checkpoint's run has max_steps 12, and this one 24"):
        trainer_for(tmp_path, max_steps=24).train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))


@pytest.mark.parametrize(("option", "value"), [("target_sparsity", 0.7), ("learning_rate", 0.0), ("seed", 1)])
def test_resuming_with_other_options_is_refused(tmp_path, option, value):
    trainer_for(tmp_path, save_strategy="steps", save_steps=6).train()
    with pytest.raises(ValueError, match=f"the checkpoint's run has (method.)?{option} "):
        trainer_for(tmp_path, **{option: value}).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_the_teacher_is_found_beside_the_checkpoint(tmp_path):
    trainer_for(tmp_path / "one", save_strategy="steps", save_steps=6).train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_for(tmp_path / "two", **saving).train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-6"))
    for gone in (tmp_path / "one", tmp_path / "two" / "checkpoint-12"):
        shutil.rmtree(gone)
    trainer = trainer_for(tmp_path / "two", **saving)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12


def test_callbacks_that_remember_can_be_resumed(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 6}
    for resume in (None, str(tmp_path / "checkpoint-6")):
        trainer = LTETrainer(
            sparse_llama(),
            arguments(
                tmp_path,
                schedule="dense",
                restore_callback_states_from_checkpoint=True,
                metric_for_best_model="eval_loss",
                **saving,
            ),
            train_dataset=markov_blocks(200),
            eval_dataset=markov_blocks(8, 1),
            data_collator=PackedBlocks.collator,
            callbacks=[EarlyStoppingCallback(99)],
        )
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 12


def test_stopping_early_is_refused(tmp_path):
    trainer = trainer_for(tmp_path, callbacks=[EarlyStoppingCallback(3)], metric_for_best_model="eval_loss")
    with pytest.raises(ValueError, match="EarlyStoppingCallback compares evaluations of all stages"):
        trainer.train()
    assert trainer.state.global_step == 0


class Spans(Rows):
    def __getitem__(self, index):
        return {"input_ids": torch.tensor(self.ids[index]), "start_positions": 1, "end_positions": 2}


def test_a_head_without_logits_has_no_teacher(tmp_path):
    torch.manual_seed(0)
    model = lte.sparsify_(
        BertForQuestionAnswering(BertConfig(**SHAPE)), lte.LTEConfig(expert_size=8, grouping="random")
    )
    with pytest.raises(ValueError, match="has no logits to compare: give distillation_weight=0"):
        trained(tmp_path, model, Spans(classes))
    trainer = trained(tmp_path, model, Spans(classes), distillation_weight=0.0, feature_distillation_weight=1.0)
    assert np.isfinite(logged(trainer, "task_loss")).all()


@pytest.mark.slow
def test_a_batch_size_that_was_found_is_kept(tmp_path):
    def too_large(_model, _args, kwargs):
        if len(kwargs["input_ids"]) > 6:
            raise RuntimeError("CUDA out of memory.")

    model = sparse_llama()
    model.register_forward_pre_hook(too_large, with_kwargs=True)
    trainer = trainer_for(tmp_path, model, auto_find_batch_size=True)
    trainer.train()
    assert trainer.state.train_batch_size == 6
    assert trainer.state.global_step == 12


def test_columns_that_the_model_does_not_take(tmp_path):
    trainer = trained(tmp_path, bert(), Rows(classes, sentence="a text"))
    assert trainer.state.global_step == 12


def test_a_stream_needs_rows_for_thresholds(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(markov_blocks(200))

    with pytest.raises(ValueError, match="give calibration_dataset"):
        trainer_for(tmp_path, train_dataset=Stream())
    trainer = LTETrainer(
        sparse_llama(),
        arguments(tmp_path),
        train_dataset=Stream(),
        calibration_dataset=markov_blocks(8, 1),
        data_collator=PackedBlocks.collator,
    )
    trainer.train()
    assert trainer.state.global_step == 12


def test_evaluations_log_their_sparsity(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.train()
    metrics = trainer.evaluate(markov_blocks(8, 1))
    assert 0.2 < metrics["eval_sparsity"] < 0.8
    assert trainer.state.log_history[-1]["eval_sparsity"] == metrics["eval_sparsity"]


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_a_compensated_model_that_recomputes_its_blocks_can_be_copied(tmp_path, family):
    model = lte.sparsify_(tiny_model(family), lte.LTEConfig(expert_size=8, grouping="random", compensation_rank=4))
    trainer = LTETrainer(
        model,
        arguments(tmp_path, gradient_checkpointing=True),
        train_dataset=small(),
        data_collator=PackedBlocks.collator,
    )
    trainer.train()
    copy.deepcopy(model)
