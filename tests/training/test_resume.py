"""A run that is killed and resumed ends as the run that was not."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_training
import torch
from tiny_training import dense_llama, sparse_llama, trainer_for
from transformers import TrainerCallback

import lte
from lte.surgery.convert import install_routers_
from lte.training.checkpoints import newest_whole
from lte.training.compiling import Compilation
from lte.training.distiller import KEPT_IN, Distiller

SAVING = {"save_strategy": "steps", "save_steps": 2}


class Stop(Exception):
    pass


class StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run: dense up to step 3, soft up to 9, hard up to 12."""
    trainer = trainer_for(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def by_step(trainer, name: str) -> dict[int, float]:
    return {logs["step"]: logs[name] for logs in trainer.state.log_history if name in logs}


def assert_same(trainer, whole):
    expected = whole.model.state_dict()
    assert trainer.state.global_step == 12
    for name, value in trainer.model.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name
    assert trainer.training.eta == pytest.approx(float(whole.training.eta), rel=1e-5)
    assert trainer.training.controller.integral == pytest.approx(float(whole.training.controller.integral), rel=1e-5)
    assert by_step(trainer, "eta") == pytest.approx(by_step(whole, "eta"), rel=1e-4)
    assert by_step(trainer, "sparsity") == pytest.approx(by_step(whole, "sparsity"), abs=1e-4)


def interrupted(folder: Path, step: int) -> None:
    with pytest.raises(Stop):
        trainer_for(folder, callbacks=[StopAfter(step)], **SAVING).train()


def damage(folder: Path, step: int) -> None:
    """What a kill during the writing of a checkpoint leaves: it is the newest, and has no state."""
    found = newest_whole(folder)
    assert found is not None
    newest = folder / f"checkpoint-{step}"
    shutil.copytree(found, newest)
    (newest / "trainer_state.json").unlink()
    (newest / "optimizer.pt").write_bytes(b"half")


# 3 ends in the dense stage, 5 early in soft, 8 late in soft; 4, 9 resume one step after and at a change of stage
@pytest.mark.parametrize("step", [3, 4, 5, 8, 9, 11])
def test_resumed_in_every_stage(tmp_path, whole, step):
    interrupted(tmp_path, step)
    damage(tmp_path, step + 20)
    trainer = trainer_for(tmp_path, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert by_step(trainer, "loss").keys() == set(range(1, 13))
    assert_same(trainer, whole)


@pytest.mark.parametrize(("steps", "stage"), [(3, "dense"), (9, "soft")])
def test_resumed_where_a_stage_ends(tmp_path, whole, steps, stage):
    with pytest.raises(Stop):
        trainer_for(tmp_path, callbacks=[StopAfter(steps)], save_strategy="steps", save_steps=steps).train()
    state = json.loads((tmp_path / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["_Stages"]["attributes"]["stage"] == stage
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=steps)
    trainer.train(resume_from_checkpoint=True)
    assert_same(trainer, whole)


@pytest.mark.parametrize(("steps", "grouped_again"), [(2, True), (8, False)], ids=["dense", "soft"])
def test_a_model_that_is_not_grouped_yet_is_resumed(tmp_path, monkeypatch, steps, grouped_again):
    def ungrouped():
        return install_routers_(dense_llama(), lte.LTEConfig(expert_size=8))

    saving = {"save_strategy": "steps", "save_steps": steps}
    with pytest.raises(Stop):
        trainer_for(tmp_path, ungrouped(), callbacks=[StopAfter(steps)], **saving).train()
    called = []
    monkeypatch.setattr(
        lte.LTEConfig, "group", lambda *given, real=lte.LTEConfig.group: called.append(1) or real(*given)
    )
    trainer = trainer_for(tmp_path, ungrouped(), **saving)
    trainer.train(resume_from_checkpoint=True)
    assert bool(called) == grouped_again
    assert "grouped" not in trainer.model.config.lte


def test_resumed_with_gradient_accumulation_over_epochs(tmp_path):
    given = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "dense_fraction": 0.0}
    given["train_dataset"] = tiny_training.markov_blocks(84)
    trainer = trainer_for(tmp_path / "whole", **given)
    trainer.train()
    with pytest.raises(Stop):
        trainer_for(tmp_path / "cut", callbacks=[StopAfter(7)], **SAVING, **given).train()
    resumed = trainer_for(tmp_path / "cut", **SAVING, **given)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == trainer.state.global_step == 10
    for name, value in trainer.model.state_dict().items():
        assert torch.allclose(value, resumed.model.state_dict()[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("step", [7, 11])
def test_resumed_with_what_is_not_default(tmp_path, step):
    """The teacher of hidden states alone, and a ramp that has ended."""
    given = {"distillation_weight": 0.0, "feature_distillation_weight": 1.0, "ramp": 0.5}
    trainer = trainer_for(tmp_path / "whole", **given)
    trainer.train()
    with pytest.raises(Stop):
        trainer_for(tmp_path / "cut", callbacks=[StopAfter(step)], **SAVING, **given).train()
    resumed = trainer_for(tmp_path / "cut", **SAVING, **given)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, trainer)


@pytest.mark.slow
def test_a_process_that_was_killed(tmp_path, whole):
    command = [sys.executable, tiny_training.__file__, str(tmp_path), "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    trainer = trainer_for(tmp_path, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert_same(trainer, whole)


def test_nothing_to_resume_starts_afresh(tmp_path, whole, caplog):
    trainer = trainer_for(tmp_path / "new")
    trainer.train(resume_from_checkpoint=True)
    assert "training starts from the beginning" in caplog.text
    assert_same(trainer, whole)


def test_only_a_damaged_checkpoint_starts_afresh(tmp_path, whole):
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"global_step": 6, "log_hist')
    trainer = trainer_for(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert_same(trainer, whole)


def test_resuming_without_the_teacher_says_so(tmp_path):
    interrupted(tmp_path, 7)
    shutil.rmtree(tmp_path / "lte_teacher")
    with pytest.raises(ValueError, match="resuming needs the dense model"):
        trainer_for(tmp_path, **SAVING).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_teacher_is_named(tmp_path, name):
    model = sparse_llama()
    kept = tmp_path / KEPT_IN
    model.save_pretrained(kept)
    values = json.loads((kept / name).read_text())
    (kept / name).write_text(json.dumps({**values, "pad_token_id": [2, 2]}))
    args = tiny_training.arguments(tmp_path)
    with pytest.raises(ValueError, match=KEPT_IN):
        Distiller(model, args, Compilation(args, None), None).load(tmp_path, model)
