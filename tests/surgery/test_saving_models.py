"""Whoever saves a sparse model leaves the old one or the new one, in any of Hugging Face's ways to save."""

import os
import resource

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

import lte
from lte.files import NotWritten
from lte.saving import finish_saving
from lte.surgery.loading import load_model
from processes import each_kill, names


def sparse(seed=0):
    torch.manual_seed(seed)
    model = lte.sparsify_(tiny_model("llama"), lte.LTEConfig(expert_size=8, grouping="random", seed=seed))
    for parameter in model.parameters():
        parameter.data += 0.01 * (seed + 1)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(**tiny_inputs("llama")).logits


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "30KB"}, {"state_dict": True}])
def test_a_killed_save_pretrained_leaves_the_old_model_the_new_one_or_none(tmp_path, monkeypatch, options):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    folder, old, new = tmp_path / "model", sparse(0), sparse(1)
    before, after = logits(old), logits(new)
    assert not torch.equal(before, after)
    seen = set()

    def save():
        new.save_pretrained(folder, **options | ({"state_dict": new.state_dict()} if "state_dict" in options else {}))

    def prepare():
        finish_saving(folder)
        old.save_pretrained(folder, max_shard_size="20KB" if not options else "5GB")

    for step in each_kill(save, prepare):
        if not (folder / "config.json").exists():
            seen.add("none")
            with pytest.raises(ValueError, match=r"config\.json"):
                AutoModelForCausalLM.from_pretrained(folder)
        elif step % 5 == 0:
            found = logits(AutoModelForCausalLM.from_pretrained(folder))
            assert torch.equal(found, before) or torch.equal(found, after)
            seen.add("old" if torch.equal(found, before) else "new")
        if step % 5 == 0:
            found = logits(load_model(str(folder)))
            assert torch.equal(found, before) or torch.equal(found, after)
    assert {"old", "none"} <= seen
    assert torch.equal(logits(load_model(str(folder))), after)
    assert not [name for name in names(folder) if name.startswith(".lte")]


@pytest.fixture
def full_disk():
    """Files may not be larger than 10 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_model_and_says_so(tmp_path, request):
    old = sparse(0)
    old.save_pretrained(tmp_path)
    before = names(tmp_path)
    request.getfixturevalue("full_disk")
    with pytest.raises(NotWritten, match=rf"^{tmp_path} could not be written .File too large.: free some space"):
        sparse(1).save_pretrained(tmp_path)
    assert names(tmp_path) == before
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(old))


def test_another_process_of_a_run_writes_nothing(tmp_path):
    sparse().save_pretrained(tmp_path / "model", is_main_process=False)
    assert names(tmp_path) == ["model"]


def test_the_upload_is_of_what_was_saved(tmp_path, monkeypatch):
    done = []

    class Repo:
        repo_id = "me/model"

    def create(_, name, **options):
        done.append((name, options))
        return Repo()

    def upload(_, **options):
        done.append(options)

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "secret.txt").touch()
    sparse().save_pretrained(folder, push_to_hub=True, private=True, commit_message="Mine")
    made, sent = done
    assert made == ("model", {"private": True, "exist_ok": True})
    assert sent["repo_id"] == "me/model"
    assert sent["commit_message"] == "Mine"
    assert sorted(sent["allow_patterns"]) == [name for name in names(folder) if name != "secret.txt"]


def test_the_model_is_saved_though_its_upload_fails(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: type("Repo", (), {"repo_id": "a/b"}))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", fails)
    model = sparse()
    with pytest.raises(ConnectionError, match="no network"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
