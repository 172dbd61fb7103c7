"""Which checkpoints are resumed, and which are passed over."""

import json
import shutil

import pytest
import torch
from tiny_training import trainer_for

from lte.data.digest import digest_of_array, digest_of_file
from lte.training import saving_trainer
from lte.training.checkpoints import MANIFEST, RUN, check_whole, flaw_of, newest_whole, rotate

SAVING = {"save_strategy": "steps", "save_steps": 6}
OF_A_CHECKPOINT = ("model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
OF_A_CHECKPOINT += ("trainer_state.json", "training_args.bin", MANIFEST)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps with checkpoints at 6 and 12, and its trainer."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = trainer_for(folder, **SAVING)
    trainer.train()
    return folder, trainer


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, flip, lambda path: path.unlink()], ids=["cut", "flipped", "missing"])
@pytest.mark.parametrize("name", OF_A_CHECKPOINT)
def test_a_damaged_newest_checkpoint_is_passed_over(copied, caplog, name, harm):
    assert {*OF_A_CHECKPOINT} <= {path.name for path in (copied / "checkpoint-12").iterdir()}
    assert newest_whole(copied) == copied / "checkpoint-12"
    harm(copied / "checkpoint-12" / name)
    caplog.clear()
    assert newest_whole(copied) == copied / "checkpoint-6"
    assert "checkpoint-12 is passed over: it " in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"files": 1}',
        '{"files": {"optimizer.pt": {"bytes": 1}}}',
        "\xff",
        pytest.param("[" * 100_000, id="nested"),
    ],
)
def test_a_damaged_manifest(copied, content):
    (copied / "checkpoint-12" / MANIFEST).write_bytes(content.encode("latin1"))
    assert newest_whole(copied) == copied / "checkpoint-6"


def test_a_run_goes_on_from_the_older_one(finished, copied):
    flip(copied / "checkpoint-12" / "optimizer.pt")
    (copied / "checkpoint-12" / "left.txt").touch()
    trainer = trainer_for(copied, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    for name, value in finished[1].model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    assert flaw_of(copied / "checkpoint-12") is None
    assert not (copied / "checkpoint-12" / "left.txt").exists()


def test_a_damaged_one_is_refused_by_its_name(copied):
    flip(copied / "checkpoint-12" / "scheduler.pt")
    with pytest.raises(ValueError, match=r"checkpoint-12 cannot be resumed: it is damaged: scheduler\.pt"):
        trainer_for(copied, **SAVING).train(resume_from_checkpoint=str(copied / "checkpoint-12"))
    with pytest.raises(ValueError, match="no folder of a checkpoint"):
        check_whole(copied / "checkpoint-7")


def test_a_finished_run_trains_no_step_more(finished, copied, caplog):
    for steps in ({"lr_scheduler_type": "linear"}, {}):  # the default is linear
        trainer = trainer_for(copied, **SAVING, **steps)
        trainer.train(resume_from_checkpoint=True)
        assert "the run is finished" in caplog.text
        assert trainer.state.global_step == 12
        assert trainer.stage == "hard"
        assert float(trainer.training.eta) == float(finished[1].training.eta)
        for name, value in finished[1].model.state_dict().items():
            assert torch.equal(value, trainer.model.state_dict()[name]), name
    shutil.rmtree(copied / "lte_teacher")  # nothing is left to be learned from it
    trainer_for(copied, **SAVING).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("constant", [False, True])
def test_a_finished_run_of_epochs_trains_no_step_more(tmp_path, constant):
    given = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch", "per_device_train_batch_size": 16}
    given |= {"lr_scheduler_type": "constant"} if constant else {}
    first = trainer_for(tmp_path, **given)
    first.train()
    again = trainer_for(tmp_path, **given)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == first.state.global_step
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_checkpoints_without_optimizer_are_refused(tmp_path):
    given = {**SAVING, "save_only_model": True}
    trainer_for(tmp_path, **given).train()
    shutil.rmtree(tmp_path / "checkpoint-12")
    with pytest.raises(ValueError, match=r"checkpoint-6 cannot be resumed: it has no optimizer .* save_only_model"):
        trainer_for(tmp_path, **given).train(resume_from_checkpoint=True)


def test_a_whole_one_is_taken_before_a_newer_one_without_optimizer(copied, caplog):
    trainer_for(copied, **SAVING, save_only_model=True).train(resume_from_checkpoint=str(copied / "checkpoint-6"))
    assert newest_whole(copied) == copied / "checkpoint-6"
    assert "save_only_model" in caplog.text


def test_a_checkpoint_of_another_trainer_is_refused(copied):
    for checkpoint in copied.glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        state["stateful_callbacks"].pop("_Stages")
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="was not written by LTETrainer"):
        trainer_for(copied, **SAVING).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_before_there_were_manifests(copied, caplog):
    shutil.rmtree(copied / "checkpoint-12")
    old = copied / "checkpoint-6"
    state = json.loads((old / "trainer_state.json").read_text())
    memory = state["stateful_callbacks"]["_Stages"]["attributes"]
    del memory["manifest"]
    memory["options"] = {"learning_rate": 1e-3, "seed": 42}
    (old / "trainer_state.json").write_text(json.dumps(state))
    (old / MANIFEST).unlink()
    (old / RUN).unlink()
    with pytest.raises(ValueError, match=r"learning_rate 0\.001, and this one 0\.01"):
        trainer_for(copied, **SAVING, learning_rate=1e-2).train(resume_from_checkpoint=True)
    trainer_for(copied, **SAVING).train(resume_from_checkpoint=True)
    assert "is checked only in part" in caplog.text
    (old / "trainer_state.json").write_text("{")
    assert flaw_of(old).damaged


def test_the_oldest_are_deleted_once_the_newest_is_whole(tmp_path, monkeypatch):
    seen = []

    def sealed(folder, identity):
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        real(folder, identity)

    real = saving_trainer.seal
    monkeypatch.setattr(saving_trainer, "seal", sealed)
    trainer_for(tmp_path, save_strategy="steps", save_steps=4, save_total_limit=1).train()
    assert seen == [
        ["checkpoint-4"],
        ["checkpoint-4", "checkpoint-8"],
        ["checkpoint-12", "checkpoint-4", "checkpoint-8"],  # two stay until training is over
    ]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]


def test_what_is_deleted(tmp_path):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    rotate(tmp_path / "checkpoint-8", 3, str(tmp_path / "checkpoint-2"))
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{one}" for one in ("2", "8", "10", "old")}
    rotate(tmp_path / "checkpoint-8", None, None)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_fingerprint_is_of_every_byte(tmp_path):
    path, content = tmp_path / "large", bytearray(b"0123456789abcdef" * (3 << 20))  # three chunks
    path.write_bytes(content)
    array = torch.frombuffer(content, dtype=torch.uint8).numpy()
    before = digest_of_file(path)
    assert digest_of_array(array) == before
    content[len(content) - 1] ^= 1
    path.write_bytes(content)
    assert digest_of_file(path) == digest_of_array(array) != before
