"""A run is resumed with its own model, data and options, or not at all."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import arguments, dense_llama, markov_blocks, sparse_llama, trainer_for
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, TrainingArguments

import lte
from lte.data.batches import PackedBlocks, PaddedRows, PaddingCollator
from lte.data.content import content_of
from lte.modules.recording import sparse_layers
from lte.surgery.convert import install_routers_
from lte.surgery.loading import load_model
from lte.training.arguments import LTETrainingArguments
from lte.training.checkpoints import RUN, newest_whole
from lte.training.identity import CHOOSE, MAY_CHANGE, differences, model_identity, options_of

SAVING = {"save_strategy": "steps", "save_steps": 6}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that was cut short: its checkpoint is at step 6 of 12. Nothing changes it."""
    folder = tmp_path_factory.mktemp("begun")
    trainer_for(folder, **SAVING).train()
    shutil.rmtree(folder / "checkpoint-12")
    return folder


def state_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def sparse(dense: LlamaForCausalLM | None = None, **options):
    return lte.sparsify_(dense or dense_llama(), lte.LTEConfig(**{"expert_size": 8, "grouping": "random", **options}))


def changed_weight():
    model = sparse_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 5] += 1e-6
    return model


def other_ids():
    blocks = markov_blocks(200)
    blocks.ids[1234] += 1
    return blocks


MODELS = {
    "model.weights": changed_weight,
    "model.weights ": lambda: sparse(dense_llama(seed=1)),
    "model.dtype": lambda: sparse(dense_llama().to(torch.bfloat16)),
    "model.config.num_hidden_layers": lambda: sparse(dense_llama(num_hidden_layers=3)),
    "model.config.rms_norm_eps": lambda: sparse(dense_llama(rms_norm_eps=1e-5)),
    "method.tau": lambda: sparse(tau=0.4),
    "method.expert_size": lambda: sparse(expert_size=16),
    "method.grouping": lambda: sparse(grouping="kmeans"),
    "method.seed": lambda: sparse(seed=3),
    "method.compensation_rank": lambda: sparse(compensation_rank=4),
    "method.method": lambda: install_routers_(dense_llama(), lte.CATSConfig(target_sparsity=0.5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_another_model_is_refused(begun, name):
    before = state_of(begun)
    with pytest.raises(ValueError, match=rf"the checkpoint's run has .*{name.strip()} .*: resume with the same"):
        trainer_for(begun, MODELS[name](), **SAVING).train(resume_from_checkpoint=True)
    assert state_of(begun) == before


DATASETS = {
    "content": other_ids,
    "content ": lambda: markov_blocks(200, seed=5),
    "rows": lambda: markov_blocks(240),
    "sequence_length": lambda: markov_blocks(400, length=8),
    "bos": lambda: PackedBlocks(markov_blocks(200).ids, 16, bos=(1,)),
}


@pytest.mark.parametrize("name", DATASETS)
def test_other_data_is_refused(begun, name):
    with pytest.raises(ValueError, match=rf"train_dataset\.{name.strip()} "):
        trainer_for(begun, train_dataset=DATASETS[name](), **SAVING).train(resume_from_checkpoint=True)


OPTIONS = {
    "max_steps": 24,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "optim": "sgd",
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "label_smoothing_factor": 0.1,
    "bf16": True,
    "neftune_noise_alpha": 5.0,
    "seed": 1,
    "data_seed": 1,
    "dataloader_drop_last": True,
    "train_sampling_strategy": "sequential",
    "average_tokens_across_devices": False,
    "accelerator_config": {"split_batches": True},
    "target_sparsity": 0.6,
    "dense_fraction": 0.5,
    "hard_fraction": 0.2,
    "separability_weight": 0.5,
    "separability_floor": 1e-3,
    "router_learning_rate": 1e-3,
    "router_weight_decay": 0.1,
    "router_bias": 2.0,
    "router_start": "random",
    "temperature": 4.0,
    "ramp": 0.25,
    "sparsity_ramp": 0.5,
    "dense_learning_rate": 1e-4,
    "calibration_rows": 4,
    "restart_hard": True,
    "distillation_weight": 0.5,
    "feature_distillation_weight": 0.5,
    "lora_rank": 4,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_another_option_is_refused(begun, name):
    with pytest.raises(ValueError, match=rf"the checkpoint's run has .*{name}"):
        trainer_for(begun, **SAVING, **{name: OPTIONS[name]}).train(resume_from_checkpoint=True)


def test_another_schedule_is_refused(begun):
    with pytest.raises(ValueError, match="recipe default, and this one paper"):
        trainer_for(begun, **SAVING, schedule="paper", eta=0.5).train(resume_from_checkpoint=True)


def test_options_of_lte_all_count():
    ours = {one.name for one in fields(LTETrainingArguments)} - {one.name for one in fields(TrainingArguments)}
    assert ours - {*OPTIONS} == {
        "schedule",
        "recipe",
        "eta",
        "overwrite",
        "lora_targets",
        "save_adapter",
        "loss_in_pieces",
    }
    assert ours & MAY_CHANGE == {"overwrite", "save_adapter", "loss_in_pieces"}


def test_the_table_names_options_that_there_are():
    there_are = {one.name for one in fields(LTETrainingArguments)} | {"accelerator_config.non_blocking"}
    assert {*MAY_CHANGE} <= there_are
    assert {*CHOOSE} <= MAY_CHANGE


def test_what_may_change(begun, tmp_path):
    whole = trainer_for(tmp_path / "whole")
    whole.train()
    folder = shutil.copytree(begun, tmp_path / "moved")
    changed = {"logging_steps": 3, "save_steps": 4, "save_total_limit": 1, "run_name": "another", "report_to": []}
    changed |= {"dataloader_num_workers": 1, "per_device_eval_batch_size": 2, "gradient_checkpointing": True}
    trainer = trainer_for(folder, **SAVING | changed)
    trainer.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, trainer.model.state_dict()[name], atol=1e-6), name


def test_what_chooses_the_best_model_may_not(tmp_path):
    given = {"schedule": "dense", "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}
    assert "eval_steps" not in options_of(arguments(tmp_path, **given))
    assert options_of(arguments(tmp_path, **given, load_best_model_at_end=True))["eval_steps"] == 2


def test_the_same_weights_in_another_order_are_the_same_model():
    found = [model_identity(sparse(grouping=one)) for one in ("random", "kmeans")]
    assert differences(*found) == ["method.grouping random, and this one kmeans"]
    heads = sparse_llama()
    torch.nn.init.normal_(heads.lm_head.weight)
    for layer in sparse_layers(heads).values():
        torch.nn.init.normal_(layer.router.weight)
    assert differences(model_identity(heads), model_identity(sparse_llama())) == []


def test_a_model_from_another_folder_is_the_same(begun, tmp_path):
    dense_llama().save_pretrained(tmp_path / "saved")
    model = sparse(load_model(str(tmp_path / "saved")))
    folder = shutil.copytree(begun, tmp_path / "run")
    trainer_for(folder, model, **SAVING).train(resume_from_checkpoint=True)


def test_the_identity_is_written_at_the_start_and_in_checkpoints(begun, tmp_path):
    one, other = (json.loads((folder / RUN).read_text()) for folder in (begun, begun / "checkpoint-6"))
    assert one == other
    assert one["method.tau"] == 0.5
    assert "hub_token" not in one
    trainer = trainer_for(tmp_path)
    trainer.stages.begin_step = lambda step: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert json.loads((tmp_path / RUN).read_text()) == one


def test_an_entry_that_is_taken_out_is_not_compared(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "run")
    path = folder / "checkpoint-6" / RUN
    identity = json.loads(path.read_text())
    del identity["model.weights"]
    path.write_text(json.dumps(identity))
    trainer_for(folder, changed_weight(), **SAVING).train(resume_from_checkpoint=True)


def test_another_number_of_ranks_is_refused(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "run")
    path = folder / "checkpoint-6" / RUN
    path.write_text(json.dumps({**json.loads(path.read_text()), "ranks": 2}))
    with pytest.raises(ValueError, match="ranks 2, and this one 1"):
        trainer_for(folder, **SAVING).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("content", ["", "[]", '{"seed": 1', '"text"'])
def test_a_damaged_identity_is_refused(begun, tmp_path, content):
    folder = shutil.copytree(begun, tmp_path / "run")
    (folder / "checkpoint-6" / RUN).write_text(content)
    with pytest.raises(
        ValueError, match=r"lte_run\.json (is empty|holds a|cannot be read).*, or resume from another checkpoint"
    ):
        trainer_for(folder, **SAVING).train(resume_from_checkpoint=True)


def test_the_same_trainer_goes_on_with_the_weights_it_has_trained(begun, tmp_path):
    trainer = trainer_for(tmp_path, **SAVING)
    trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12


# ---- a fresh start


def test_a_fresh_start_among_checkpoints_is_refused(begun):
    before = state_of(begun)
    with pytest.raises(ValueError, match=r"holds checkpoints of a run \(checkpoint-6\): .*overwrite"):
        trainer_for(begun, sparse(tau=0.4), **SAVING).train()
    assert state_of(begun) == before


def test_overwriting_deletes_what_the_run_before_left(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "run")
    (folder / "mine.txt").write_text("kept")
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-99")
    trainer = trainer_for(folder, sparse(tau=0.4), overwrite=True, max_steps=8, save_strategy="no")
    trainer.train()
    assert newest_whole(folder) is None
    assert {path.name for path in folder.iterdir()} == {"mine.txt", RUN, "lte_teacher"}
    assert json.loads((folder / RUN).read_text())["method.tau"] == 0.4


def test_overwriting_what_is_resumed_is_refused(begun):
    with pytest.raises(ValueError, match="give one of the two"):
        trainer_for(begun, overwrite=True, **SAVING).train(resume_from_checkpoint=True)


def test_overwriting_the_model_itself_is_refused(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "run")
    model = load_model(str(folder / "checkpoint-6"))
    with pytest.raises(ValueError, match="which overwrite would delete"):
        trainer_for(folder, model, overwrite=True).train()
    assert newest_whole(folder) is not None


def test_a_checkpoint_from_elsewhere_among_others_is_refused(begun, tmp_path):
    folder = shutil.copytree(begun, tmp_path / "run")
    with pytest.raises(ValueError, match="holds checkpoints of a run"):
        trainer_for(folder, **SAVING).train(resume_from_checkpoint=str(begun / "checkpoint-6"))


# ---- content of data


class Rows(Dataset):
    def __init__(self, values, make=torch.tensor):
        self.values, self.make = values, make

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"input_ids": self.make(self.values[index]), "text": "a", "other": [1.5, None, object()]}


@pytest.mark.parametrize("make", [torch.tensor, np.asarray, list, tuple])
def test_rows_of_any_dataset(make):
    values = np.arange(3000).reshape(1000, 3).tolist()
    found = content_of(Rows(values, make))
    assert found == content_of(Rows(values, make))
    assert found["rows"] == 1000
    assert found != content_of(Rows([[5, 5, 5], *values[1:]], make))
    assert found != content_of(Rows([*values[:-1], [5, 5, 5]], make))


def test_rows_that_are_random_have_no_content():
    state = torch.get_rng_state()
    assert content_of(Rows([[1]] * 9, lambda _: torch.randn(3))) == {"rows": 9, "content": None}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stream_is_not_read():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            raise AssertionError("read")

    assert content_of(Stream()) is None
    assert content_of(None) is None
    assert content_of(Rows([])) == {"rows": 0, "content": content_of(Rows([]))["content"]}


def test_padded_rows():
    def content(ids, labels, names=("no", "yes")):
        return content_of(PaddedRows({"input_ids": ids, "labels": labels}, PaddingCollator(0), names))

    found = content([[1, 2], [3]], [0, 1])
    assert found == content([[1, 2], [3]], [0, 1])
    for other in (content([[1], [2, 3]], [0, 1]), content([[1, 2], [3]], [1, 1])):
        assert other["content"] != found["content"]
    assert content([[1, 2], [3]], [0, 1], ("yes", "no")) != found
    assert content([[1, 2], [3]], [0.0, 1.0])["content"] != found["content"]


def test_a_mapped_file_is_as_its_content(tmp_path):
    blocks = markov_blocks(20)
    np.save(tmp_path / "ids.npy", blocks.ids)
    mapped = PackedBlocks(np.load(tmp_path / "ids.npy", mmap_mode="r"), blocks.sequence_length)
    assert content_of(mapped) == content_of(blocks)


def test_what_is_a_label_counts():
    ids = np.tile(np.arange(3, 10, dtype=np.uint16), 20)
    ids[::7] = 1
    one, other = (content_of(PackedBlocks(ids, 8, bos=(1,), eos=eos)) for eos in (None, 1))
    assert one["content"] != other["content"]
