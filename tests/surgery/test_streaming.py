"""A checkpoint that is converted block by block is the one that is converted as a whole."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_inputs, tiny_model

import lte
from lte.files import kept_folder
from lte.surgery.convert import sparsify_
from lte.surgery.heads import own_auto_class
from lte.surgery.loading import load_config, load_model
from lte.surgery.shards import UNFINISHED, Shards
from lte.surgery.streaming import streaming

CPU = torch.device("cpu")
LTE = lte.LTEConfig(expert_size=8)
MODELS = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "fused": ("phi3", {}),
    "conv1d": ("gpt2", {}),
    "no gate": ("gpt_neox", {}),
    "activation": ("opt", {}),
    "encoder-decoder": ("t5", {}),
}


@pytest.fixture
def dense(tmp_path):
    return tmp_path / "dense"


def stream(name, folder, conversion=LTE, **more):
    with streaming(str(name), conversion, folder, CPU, **more):
        pass


def whole(name, folder, conversion=LTE, dtype="auto"):
    sparsify_(load_model(str(name), "own", dtype), conversion).save_pretrained(folder)


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def others(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if "safetensors" not in path.name}


def assert_equal(streamed, expected):
    found, wanted = weights(streamed), weights(expected)
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted)
    assert others(streamed) == others(expected)


@pytest.mark.parametrize("kind", MODELS)
def test_equal_bits(tmp_path, dense, kind):
    family, options = MODELS[kind]
    tiny_model(family, **options).save_pretrained(dense)
    stream(dense, tmp_path / "streamed")
    whole(dense, tmp_path / "whole")
    assert_equal(tmp_path / "streamed", tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "streamed").glob(".*")) == []
    auto = own_auto_class(load_config(str(dense)))
    with torch.no_grad():
        models = [auto.from_pretrained(tmp_path / one).eval() for one in ("dense", "streamed")]
        before, after = (model(**tiny_inputs(family)).logits for model in models)
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize(
    "conversion",
    [
        lte.LTEConfig(expert_size=8, seed=3, grouping="random", compensation_rank=4, attention_sparsity=0.25),
        lte.TopKMoEConfig(expert_size=8),
        lte.NoisyTopKConfig(expert_size=8),
        lte.SigmaMoEConfig(expert_size=8),
    ],
)
def test_methods_in_half_precision_from_shards(tmp_path, dense, conversion):
    tiny_model("llama").save_pretrained(dense, max_shard_size="20KB")
    assert len([*dense.glob("*.safetensors")]) > 2
    stream(dense, tmp_path / "streamed", conversion, dtype=torch.bfloat16)
    whole(dense, tmp_path / "whole", conversion, torch.bfloat16)
    assert_equal(tmp_path / "streamed", tmp_path / "whole")


def test_published_names(tmp_path, dense):
    """GPT-2 is published without the prefix of its base model, and GPT-NeoX with another name of its head."""
    tiny_model("gpt2").save_pretrained(dense)
    path = dense / "model.safetensors"
    save_file({name.removeprefix("transformer."): value for name, value in load_file(path).items()}, path)
    stream(dense, tmp_path / "streamed")
    whole(dense, tmp_path / "whole")
    assert_equal(tmp_path / "streamed", tmp_path / "whole")


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_tied_and_stored(tmp_path, dense, equal):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(dense)
    path = dense / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file({**tensors, "lm_head.weight": head}, path, metadata={"format": "pt"})
    stream(dense, tmp_path / "streamed")
    whole(dense, tmp_path / "whole")
    assert_equal(tmp_path / "streamed", tmp_path / "whole")
    assert ("lm_head.weight" in weights(tmp_path / "streamed")) is not equal


def interrupted(monkeypatch, after):
    """Let the process end, as by a signal, when weight file number ``after`` is to be written."""
    write = Shards.write

    def ends(self, number, tensors):
        if number == after:
            raise KeyboardInterrupt
        write(self, number, tensors)

    monkeypatch.setattr(Shards, "write", ends)


def test_an_interrupted_conversion_goes_on(tmp_path, dense, monkeypatch):
    tiny_model("llama", num_hidden_layers=4).save_pretrained(dense)
    whole(dense, tmp_path / "whole")
    out = tmp_path / "streamed"
    with monkeypatch.context() as patch:
        interrupted(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            stream(dense, out)
    assert not (out / "config.json").exists()
    first, damaged, _ = sorted((out / UNFINISHED).glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    kept, made, real = first.stat().st_ino, [], Shards.write
    monkeypatch.setattr(
        Shards, "write", lambda self, number, tensors: (made.append(number), real(self, number, tensors))
    )
    with pytest.raises(ValueError, match="unfinished work of another command, model or version: repeat that command"):
        stream(dense, out, lte.LTEConfig(expert_size=16))
    assert made == []
    stream(dense, out)
    assert 0 not in made
    assert made[:3] == [1, 3, 4]
    assert (out / first.name).stat().st_ino == kept
    assert_equal(out, tmp_path / "whole")
    assert not [*out.glob(".*")]


def test_two_processes_do_not_write_to_one_folder(tmp_path, dense):
    tiny_model("llama").save_pretrained(dense)
    with kept_folder_of(tmp_path / "out"), pytest.raises(ValueError, match="in use by another process"):
        stream(dense, tmp_path / "out")
    stream(dense, tmp_path / "out")


def kept_folder_of(folder):
    folder.mkdir()
    return kept_folder(folder / UNFINISHED)


@pytest.mark.parametrize(
    ("conversion", "message"),
    [
        (lte.LTEConfig(expert_size=8, grouping="coactivation"), "lte with these options needs data: leave --stream"),
        (lte.CATSConfig(), "cats with these options needs data"),
        (lte.TEALConfig(), "with routers, not by teal: leave --stream out"),
        (lte.LTEConfig(expert_size=7), "expert_size 7 does not divide d_ff 64"),
    ],
)
def test_refused_conversions(tmp_path, dense, conversion, message):
    tiny_model("llama").save_pretrained(dense)
    with pytest.raises(ValueError, match=message) as error:
        stream(dense, tmp_path / "out", conversion)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


def as_pickle(path):
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def without_a_weight(path):
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def with_nan(path):
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "model.safetensors is cut short or damaged .*: copy it again"),
        (as_pickle, "has no safetensors files: save it with save_pretrained"),
        (without_a_weight, "1 weights are missing, first model.layers.1.mlp.up_proj.weight"),
        (with_nan, "1 weights are NaN or infinite, first model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_refused_checkpoints(tmp_path, dense, damage, message):
    tiny_model("llama").save_pretrained(dense)
    damage(dense / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        stream(dense, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
