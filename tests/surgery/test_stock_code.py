"""What code without ``lte`` makes of a saved sparse model: it refuses, and never runs it densely."""

import os
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

import lte

PROLOGUE = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
folder = sys.argv[1]
inputs = torch.load(folder + "/inputs.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    model = lte.sparsify_(tiny_model("llama"), lte.LTEConfig(expert_size=8, grouping="random"))
    lte.set_mode_(model, "hard")
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    inputs = tiny_inputs("llama")
    torch.save(inputs, folder / "inputs.pt")
    with torch.no_grad():
        torch.save(model(**inputs).logits, folder / "logits.pt")
    return folder


def run(folder, tmp_path, code):
    """Run code in a process of its own, which has not imported ``lte``."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", PROLOGUE + code, str(folder)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_auto_classes_refuse_without_consent(folder, tmp_path):
    code = """
assert AutoTokenizer.from_pretrained(folder)("b")["input_ids"] == [2]
assert "lte" not in sys.modules
for load in (AutoModelForCausalLM, AutoConfig, LlamaForCausalLM):
    try:
        load.from_pretrained(folder)
    except ValueError as error:
        print()
        print(load.__name__, "trust_remote_code=True" in str(error), "pip install lte" in str(error))
    else:
        raise SystemExit("it was loaded")
assert "lte" not in sys.modules
"""
    result = run(folder, tmp_path, code)
    assert result.returncode == 0, result.stderr
    expected = ["AutoModelForCausalLM True False", "AutoConfig True False", "LlamaForCausalLM False True"]
    assert [line for line in result.stdout.splitlines() if line in expected] == expected, result.stdout


@pytest.mark.slow
def test_remote_code_runs_where_lte_is_installed(folder, tmp_path):
    code = """
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__name__ == "LTELlamaForCausalLM", type(model)
assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("b")["input_ids"] == [2]
with torch.no_grad():
    assert torch.equal(model.eval()(**inputs).logits, torch.load(folder + "/logits.pt"))
"""
    result = run(folder, tmp_path, code)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_after_import_lte_everything_is_as_ever(folder, tmp_path):
    code = """
import pickle
import lte
assert AutoTokenizer.from_pretrained(folder)("b")["input_ids"] == [2]
model = AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, torch.load(folder + "/logits.pt"))
with open(folder + "/model.pickle", "wb") as file:
    pickle.dump(model, file)
"""
    result = run(folder, tmp_path, code)
    assert result.returncode == 0, result.stderr
    unpickle = """
import pickle
with open(folder + "/model.pickle", "rb") as file:
    model = pickle.load(file)
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, torch.load(folder + "/logits.pt"))
"""
    result = run(folder, tmp_path, unpickle)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("stock", [LlamaForCausalLM, LlamaModel])
def test_a_stock_class_refuses_with_lte_imported(folder, stock):
    with pytest.raises(ValueError, match="pip install lte"):
        stock.from_pretrained(folder)


def test_a_stock_config_refuses_too(folder):
    config = LlamaConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="pip install lte"):
        LlamaForCausalLM.from_pretrained(folder, config=config)
