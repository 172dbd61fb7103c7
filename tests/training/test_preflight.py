"""What kills a run late is tried before its first step."""

from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tiny_training import arguments, markov_blocks, sparse_llama, trainer_for
from transformers import GenerationConfig, TrainerCallback
from transformers.integrations import integration_utils
from transformers.trainer_callback import ExportableState

import lte
from lte.data.batches import PackedBlocks
from lte.training import preflight
from lte.training.preflight import try_out
from lte.training.trainer import LTETrainer

SAVING = {"save_strategy": "steps", "save_steps": 4}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 4}


def evaluated(folder, eval_dataset, compute_metrics=None, callbacks=None, **overrides):
    return LTETrainer(
        sparse_llama(),
        args=arguments(folder, **{**EVALUATING, **overrides}),
        train_dataset=markov_blocks(200),
        eval_dataset=eval_dataset,
        data_collator=PackedBlocks.collator,
        compute_metrics=compute_metrics,
        callbacks=callbacks,
    )


def refused(trainer, message, error=ValueError):
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_generation_settings_without_effect_are_saved_as_they_were(tmp_path):
    model = sparse_llama()
    given = {"temperature": 0.9, "top_p": 0.6, "num_beams": 1, "length_penalty": 2.0}
    model.generation_config.update(**given)
    trainer_for(tmp_path, model, **SAVING).train()
    for folder in ("lte_teacher", "checkpoint-4", "checkpoint-12"):
        saved = GenerationConfig.from_pretrained(tmp_path / folder)
        assert type(saved) is GenerationConfig
        assert {name: getattr(saved, name) for name in given} == given
    lte.densify(model).save_pretrained(tmp_path / "dense")
    assert GenerationConfig.from_pretrained(tmp_path / "dense").temperature == 0.9


def test_generation_settings_that_contradict_each_other(tmp_path):
    model = sparse_llama()
    model.generation_config.num_return_sequences = 3
    refused(trainer_for(tmp_path, model), "generation_config cannot be used, nor saved: Greedy methods")


def test_a_run_leaves_nothing_of_its_trials(tmp_path):
    trainer_for(tmp_path, **SAVING).train()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "lte_teacher",
        *(f"checkpoint-{step}" for step in (4, 8, 12)),
    }
    assert not list(tmp_path.glob("**/.*"))


def test_an_output_folder_that_is_a_file(tmp_path):
    trainer = trainer_for(tmp_path / "file")
    (tmp_path / "file").rmdir()
    (tmp_path / "file").write_text("")
    refused(trainer, "file", OSError)


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, save_total_limit=2, save_strategy="steps", save_steps=2)
    weights = sum(one.numel() for one in trainer.model.parameters()) * 4
    wanted = 2 * weights + 3 * 3 * weights  # the model, the dense one, checkpoints with Adam's two states
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage(wanted - 1))
    refused(trainer, r"GiB free, but .* write .* \(the model .*, 3 checkpoints .*, the dense model .*make room")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage(wanted))
    trainer.train()
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage(weights))
    trainer_for(tmp_path / "other", schedule="dense").train()


@pytest.mark.parametrize("name", ["wandb", "magic"])
def test_a_logger_that_is_not_there(tmp_path, monkeypatch, name):
    class Missing:
        def __init__(self):
            raise RuntimeError("It requires wandb to be installed. Run `pip install wandb`.")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Missing)
    said = {"wandb": "'wandb', which cannot be used: .* `pip install wandb`", "magic": "'magic', but it is none, or of"}
    with pytest.raises(ValueError, match=f"report_to is {said[name]}"):
        arguments(tmp_path, report_to=name)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", TrainerCallback)
    assert arguments(tmp_path, report_to="wandb").report_to == ["wandb"]


def test_a_metric_to_choose_by_that_nobody_measures(tmp_path):
    best = {"schedule": "dense", "load_best_model_at_end": True, **SAVING}
    data = {"some": markov_blocks(20), "other": markov_blocks(20)}
    trainer = evaluated(tmp_path, data, metric_for_best_model="accuracy", **best)
    refused(trainer, "metric_for_best_model is 'accuracy', but evaluation gives .*other_loss.* some_loss")
    for name, sets in (("some_loss", data), ("eval_loss", data["some"]), ("samples_per_second", data["some"])):
        evaluated(tmp_path / name, sets, metric_for_best_model=name, **best).train()


def broken_metrics(_predictions):
    raise ZeroDivisionError("by hand")


def test_metrics_that_fail(tmp_path):
    refused(evaluated(tmp_path, markov_blocks(20), broken_metrics), "by hand", ZeroDivisionError)


def test_rows_to_evaluate_that_are_not_like_those_of_training(tmp_path):
    refused(evaluated(tmp_path, [{"text": "none"}] * 20), "The batch received was empty")


def test_no_row_to_evaluate(tmp_path):
    refused(evaluated(tmp_path, {"some": markov_blocks(20), "none": []}), "eval_dataset none has no row")


def test_no_row_to_calibrate_on(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.calibration_dataset = []
    refused(trainer, "calibration_dataset has no row")


def test_an_evaluation_that_is_not_finite_before_any_step(tmp_path):
    trainer = evaluated(tmp_path, markov_blocks(20))
    trainer.model.lm_head.weight.data.fill_(3e38)
    refused(trainer, r"eval_loss is \w+ on the first batch, before any step: check that its rows have labels")


def test_a_model_that_is_broken_before_training(tmp_path):
    model = sparse_llama()
    model.lm_head.weight.data[0] = torch.nan
    refused(trainer_for(tmp_path, model), "1 weights hold NaN or infinities before any training, first lm_head.weight")


class Remembers(TrainerCallback, ExportableState):
    def state(self):
        return {"args": {}, "attributes": {"seen": {1, 2}}}


def test_a_callback_whose_state_is_not_json(tmp_path):
    trainer = trainer_for(tmp_path, callbacks=[Remembers()], **SAVING)
    refused(trainer, "the state of callback Remembers cannot be saved: .*set is not JSON")


class Sees(TrainerCallback):
    predictions = 0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.predictions += 1


def test_nobody_sees_it_and_randomness_stays(tmp_path):
    sees = Sees()
    trainer = evaluated(tmp_path, markov_blocks(20), callbacks=[sees], max_steps=2, eval_steps=10)
    trainer.train()
    seen, before = sees.predictions, torch.get_rng_state()
    try_out(trainer, teacher=False)
    assert sees.predictions == seen
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("streamed", [False, True])
def test_data_of_the_library_datasets(tmp_path, streamed):
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": row["input_ids"].tolist(), "text": "is left out"} for row in markov_blocks(30)]
    data = datasets.Dataset.from_list(rows)
    trainer = evaluated(tmp_path, data.to_iterable_dataset() if streamed else data, max_steps=2)
    trainer.data_collator = lambda rows: {
        name: torch.stack([torch.as_tensor(row["input_ids"]) for row in rows]) for name in ("input_ids", "labels")
    }
    trainer.train()


def test_a_trial_writes_by_the_code_that_saves_all_but_weights(tmp_path):
    trainer, seen = trainer_for(tmp_path, max_steps=2), {}
    save = trainer._save

    def spied(folder, state_dict):
        save(folder, state_dict=state_dict)
        seen.update({path.name: path.stat().st_size for path in Path(folder).iterdir()})

    trainer._save = spied
    trainer.train()
    assert {"config.json", "generation_config.json", "training_args.bin"} <= seen.keys()
    assert not any(name.endswith(".safetensors") and size > 1000 for name, size in seen.items())
