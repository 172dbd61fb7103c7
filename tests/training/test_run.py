"""``lte.train``: a folder and a text in, a sparse model that others can load out. It is what ``lte train`` runs."""

import json

import pytest
import torch
from tiny_training import dense_llama
from transformers import AutoModelForCausalLM

import lte
from byte_tokenizer import byte_tokenizer
from lte.modules.recording import sparse_layers

STEPS = {"max_steps": 8, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    dense_llama(vocab_size=258).save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text("".join(f"{n} and {n + 1} make {2 * n + 1}.\n" for n in range(300)))
    return folder


def trained(given, folder, method=None, **options):
    config = lte.DataConfig(sequence_length=32)
    source = str(given / "text.txt")
    return lte.train(str(given / "dense"), method, source, str(folder), data_config=config, **STEPS | options)


@pytest.mark.parametrize(
    ("method", "options", "target"),
    [
        (lte.LTEConfig(expert_size=8, target_sparsity=0.5), {}, 0.5),
        (lte.LTEConfig(expert_size=8, target_sparsity=0.5), {"target_sparsity": 0.75}, 0.75),
        (lte.LTEConfig(expert_size=8), {"target_sparsity": 0.5, "dense_fraction": 0.0}, 0.5),
        (lte.LTEConfig(expert_size=8), {"schedule": "paper", "eta": 0.5}, None),
        (lte.CATSConfig(target_sparsity=0.5), {}, 0.5),
        (lte.TopKMoEConfig(expert_size=8, target_sparsity=0.5), {}, 0.5),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_model_that_others_load(given, tmp_path, method, options, target):
    made = trained(given, tmp_path, method, **options)
    summary = json.loads((tmp_path / "lte_training.json").read_text())
    assert summary == json.loads(json.dumps(made.summary))
    assert summary["target_sparsity"] == target
    assert summary["method"]["target_sparsity"] == made.model.config.lte["target_sparsity"] == target
    assert summary["evaluation"]["sparsity"] == made.evaluation.sparsity
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, made.model.eval()(ids).logits)
    assert {layer.mode for layer in sparse_layers(loaded).values()} == {"hard"}


def test_a_dense_run_leaves_a_plain_model(given, tmp_path):
    made = trained(given, tmp_path, schedule="dense")
    assert made.summary["target_sparsity"] is None
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "target_sparsity is None, but the default schedule needs a fraction"),
        ({"method": lte.LTEConfig(target_sparsity=0.5), "args": object()}, "inside args"),
        ({"method": lte.CATSConfig(target_sparsity=0.5), "target_sparsity": 0.6}, "made for target_sparsity 0.5"),
        ({"method": lte.CATSConfig(), "schedule": "paper", "eta": 1.0}, "not those of cats"),
    ],
)
def test_what_is_refused_before_the_model_is_read(given, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        lte.train("no/such/folder", data="none.txt", output_dir=str(tmp_path), **STEPS | options)


def test_the_target_is_saved_and_calibrating_moves_it(given, tmp_path):
    made = trained(given, tmp_path, lte.LTEConfig(expert_size=8, target_sparsity=0.5))
    lte.calibrate_(made.model, [{"input_ids": torch.arange(200).view(4, 50)}], 0.4)
    assert made.model.config.lte["target_sparsity"] == 0.4
