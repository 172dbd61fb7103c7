"""What is refused when a model is loaded, in one line that names the file; and what is not."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    BertForPreTraining,
    Gemma3Config,
    GenerationConfig,
    MixtralConfig,
    RobertaForMaskedLM,
)

import lte
from byte_tokenizer import byte_tokenizer
from lte.surgery.families import check_family
from lte.surgery.folder import check_config, check_generation
from lte.surgery.loading import load_config, load_model, load_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tiny models: llama, bert without a head, t5, and a sparse llama with compensation, in mode hard."""
    folder = tmp_path_factory.mktemp("saved")
    sparse = lte.sparsify_(tiny_model("llama"), lte.LTEConfig(expert_size=8, grouping="random", compensation_rank=2))
    lte.set_mode_(sparse, "hard")
    models = {"llama": tiny_model("llama"), "t5": tiny_model("t5"), "sparse": sparse, "tied": tied()}
    models["bert"] = AutoModel.from_config(tiny_config("bert"))
    for name, model in models.items():
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def tied():
    return tiny_model("llama", tie_word_embeddings=True)


@pytest.fixture
def copy_of(saved, tmp_path):
    """A copy of a saved folder, with its weights or config.json changed."""

    def make(name, weights=None, config=None):
        folder = tmp_path / name
        shutil.copytree(saved / name, folder)
        if weights is not None:
            path = folder / "model.safetensors"
            changed = {key: value.clone() for key, value in weights(load_file(path)).items()}
            save_file(changed, path, metadata={"format": "pt"})
        if config is not None:
            path = folder / "config.json"
            values = json.loads(path.read_text())
            config(values)
            path.write_text(json.dumps(values))
        return folder

    return make


def refused(folder, *said, load=load_model, **kwargs):
    with pytest.raises(ValueError) as error:
        load(str(folder), **kwargs)
    line = str(error.value)
    assert "\n" not in line
    assert str(folder) in line
    for one in said:
        assert one in line
    return line


def without(part):
    return lambda weights: {key: value for key, value in weights.items() if part not in key}


@pytest.mark.parametrize("name", ["llama", "sparse"])
@pytest.mark.parametrize("part", ["layers.1.", "embed_tokens", "lm_head", "layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("new_head", [False, True])
def test_weights_that_are_missing_are_never_made_up(copy_of, name, part, new_head):
    refused(copy_of(name, without(part)), "weights are missing, first ", part, new_head=new_head)


def test_a_checkpoint_of_one_task_lacks_only_what_another_makes_new(copy_of):
    folder = copy_of("bert")
    model = load_model(str(folder), "classification", num_labels=3)
    assert model.classifier.weight.shape[0] == 3
    refused(folder, "has no head for classification", head="classification", new_head=False)
    model.save_pretrained(folder)
    assert load_model(str(folder), "classification", num_labels=5).classifier.weight.shape[0] == 5
    shutil.rmtree(folder)
    folder = copy_of("bert", without("layer.1.attention.self.query.weight"))
    refused(folder, "1 weights are missing", "attention.self.query", head="classification", num_labels=3)


def test_a_head_of_other_labels_takes_no_other_shape_with_it(copy_of):
    folder = copy_of("bert")
    load_model(str(folder), "classification", num_labels=3).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    key = "bert.encoder.layer.0.output.dense.weight"
    save_file({**weights, key: weights[key][:, :-1].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "1 weights have the wrong shape", key, head="classification", num_labels=5)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llama", lambda values: values.update(num_hidden_layers=1)),
        ("sparse", lambda values: values.update(num_hidden_layers=1)),
        ("sparse", lambda values: values["lte"].pop("compensation_rank")),
    ],
)
def test_weights_that_are_left_over_are_refused(copy_of, name, changed):
    refused(copy_of(name, config=changed), "weights have no place in the model", "first model.layers.")


@pytest.mark.parametrize("option", ["mode", "tau", "expert_size", "grouping", "seed"])
def test_what_every_saved_model_says_must_be_there(copy_of, option):
    folder = copy_of("sparse", config=lambda values: values["lte"].pop(option))
    refused(folder, f"lacks {option} in its section lte", load=load_config)
    with pytest.raises(ValueError, match=f"lacks {option}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_early_model_says_nothing_of_compensation(saved, tmp_path):
    lte.sparsify_(tiny_model("llama"), lte.LTEConfig(expert_size=8)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["lte"]["compensation_rank"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_model(str(tmp_path)).config.lte["mode"] == "dense"


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_a_wrapper_in_all_names_is_called_by_its_name(copy_of, prefix):
    folder = copy_of("llama", lambda weights: {f"{prefix}{key}": value for key, value in weights.items()})
    refused(folder, f"begin with {prefix}", f"save model.{prefix[:-1]} instead")


def test_what_transformers_ignores_is_fine(saved):
    assert load_model(str(saved / "tied")).lm_head.weight.shape == (48, 32)
    load_model(str(saved / "t5"), "seq2seq", new_head=False)


def test_heads_of_other_tasks_may_be_left_out(tmp_path):
    AutoModelForPreTraining.from_config(tiny_config("bert")).save_pretrained(tmp_path / "bert")
    assert type(load_model(str(tmp_path / "bert"), "own")).__name__ == "BertForMaskedLM"
    load_model(str(tmp_path / "bert"), "classification")
    model = BertForPreTraining.from_pretrained(tmp_path / "bert")
    model.config.architectures = None
    (tmp_path / "bert" / "config.json").write_text(model.config.to_json_string())
    assert type(load_model(str(tmp_path / "bert"), "own")).__name__ == "BertModel"
    roberta = RobertaForMaskedLM(tiny_config("roberta"))
    roberta.save_pretrained(tmp_path / "roberta")  # many have a pooler, which neither head uses
    path = tmp_path / "roberta" / "model.safetensors"
    pooler = {
        f"roberta.pooler.dense.{name}": torch.ones(32, *more) for name, more in {"weight": [32], "bias": []}.items()
    }
    save_file({**load_file(path), **pooler}, path, metadata={"format": "pt"})
    load_model(str(tmp_path / "roberta"), "classification")


@pytest.mark.parametrize("name", ["llama", "sparse"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(copy_of, name, number):
    key = "model.layers.1.mlp." + ("router.bias" if name == "sparse" else "up_proj.weight")

    def spoil(weights):
        weights[key].view(-1)[-1] = number
        return weights

    refused(copy_of(name, spoil), "1 weights are NaN or infinite", key)


def test_a_config_far_too_large_takes_no_memory(copy_of):
    folder = copy_of("llama", config=lambda values: values.update(intermediate_size=10**9))
    refused(folder, "config.json describes a model of", "do not belong together")
    values = json.loads((folder / "config.json").read_text())
    for key in ("num_hidden_layers", "num_labels"):
        (folder / "config.json").write_text(json.dumps({**values, key: 10**9}))
        refused(folder, f"{key} 1000000000", load=load_config)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "cannot be read as JSON"),
        ("config.json", b"[1]", "holds a list"),
        ("config.json", b'{"model_type": "\xff"}', "cannot be read as JSON"),
        ("config.json", b"[" * 100_000, "cannot be read as JSON"),
        ("config.json", b'{"model_type": 3}', "does not recognize this architecture"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "x"}', "hidden_size"),
        ("model.safetensors", POINTER, "git lfs pull"),
        ("model.safetensors", b"", "is empty"),
        ("model.safetensors", b"\xff" * 100, "cut short or damaged"),
        ("model.safetensors", None, "has no weights"),
        ("generation_config.json", b"{", "cannot be read as JSON"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id 'x'"),
        ("tokenizer.json", POINTER, "git lfs pull"),
        ("tokenizer.json", b"{}", "its tokenizer cannot be read"),
        ("tokenizer.json", None, "tokenizer"),
        ("tokenizer_config.json", b"[]", "holds a list"),
        ("tokenizer_config.json", b'{"model_max_length": {}}', "model_max_length"),
    ],
)
def test_damaged_files_are_named(copy_of, name, content, said):
    folder = copy_of("llama")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)

    def load(path):
        load_config(path)
        load_tokenizer(path)
        load_model(path)

    refused(folder, said, load=load)


def test_a_shard_that_is_missing_or_elsewhere_is_named(saved, tmp_path):
    load_model(str(saved / "llama")).save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / "model.safetensors.index.json"
    shard = sorted(tmp_path.glob("model-*"))[1]
    kept = shard.read_bytes()
    shard.unlink()
    refused(tmp_path, f"{shard} is missing")
    shard.write_bytes(kept[:-9])
    refused(tmp_path, f"{shard} is cut short or damaged")
    values = json.loads(index.read_text())
    values["weight_map"]["lm_head.weight"] = "../model.safetensors"
    index.write_text(json.dumps(values))
    refused(tmp_path, "names ../model.safetensors")
    index.write_text("{}")
    refused(tmp_path, "has no weight_map")


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_of_a_folder_is_run_on_consent_only(copy_of, tmp_path, monkeypatch, where):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = copy_of("llama")
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Made: ...\n")
    values = json.loads((folder / where).read_text())
    if where == "config.json":
        values |= {"model_type": "made", "auto_map": {"AutoConfig": "code.Made", "AutoModelForCausalLM": "code.Made"}}
    else:
        values |= {"tokenizer_class": "Made", "auto_map": {"AutoTokenizer": [None, "code.Made"]}}
    (folder / where).write_text(json.dumps(values))
    load = load_config if where == "config.json" else load_tokenizer
    refused(folder, "brings code of its own", "give trust_remote_code=True", load=load)
    assert not ran.exists()


def test_a_sparse_models_own_map_needs_no_consent(saved):
    assert "auto_map" in json.loads((saved / "sparse" / "config.json").read_text())
    load_tokenizer(str(saved / "sparse"))
    assert load_model(str(saved / "sparse")).config.lte["mode"] == "hard"


def test_a_class_of_foreign_code_is_not_made_sparse():
    model = tiny_model("llama")
    foreign = type("LlamaForCausalLM", (type(model),), {"__module__": "transformers_modules.made.code"})
    model.__class__ = foreign
    with pytest.raises(ValueError, match="is code of its checkpoint"):
        lte.sparsify_(model, lte.LTEConfig(expert_size=8))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_quantised_checkpoints(copy_of, method):
    folder = copy_of("llama", config=lambda values: values.update(quantization_config={"quant_method": method}))
    refused(folder, f"is quantised by {method}", ".gguf file", load=load_config)


def test_an_adapter_is_to_be_merged(copy_of):
    folder = copy_of("llama")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base", "peft_type": "LORA"}')
    for load in (load_config, load_tokenizer, load_model):
        refused(folder, "holds an adapter of some/base", "merge_and_unload", load=load)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MixtralConfig(), "mixture of experts already"),
        (Gemma3Config(), "language model alone (of type gemma3_text"),
        (AlbertConfig(), "shares one FFN"),
    ],
)
def test_families_that_no_row_can_describe(config, said):
    with pytest.raises(ValueError) as error:
        check_family(config)
    assert said in str(error.value)
    assert "register_family" not in str(error.value)


def test_an_encoder_without_a_head_is_converted_and_comes_back(saved, tmp_path):
    model = load_model(str(saved / "bert"), "own")
    assert type(model).__name__ == "BertModel"
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="random"))
        model.save_pretrained(tmp_path)
        again = load_model(str(tmp_path), "own", new_head=False)
        assert type(again).__name__ == "LTEBertModel"
        assert torch.allclose(again(ids).last_hidden_state, expected, atol=1e-5)


def test_a_masked_language_model_keeps_its_head(tmp_path):
    AutoModelForMaskedLM.from_config(tiny_config("bert")).save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path), "own")).__name__ == "BertForMaskedLM"


def test_options_of_generation_that_are_in_order(saved, tmp_path):
    model = load_model(str(saved / "llama"))
    model.generation_config = GenerationConfig(eos_token_id=[1, 2], temperature=1, top_p=0.9, do_sample=True)
    model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).generation_config.eos_token_id == [1, 2]


@pytest.mark.parametrize(
    "option",
    [
        {"output_hidden_states": 0.5},
        {"do_sample": "no"},
        {"pad_token_id": [2, 2]},
        {"bos_token_id": 10**30},
        {"temperature": "hot"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_of_generation_have_their_types(option):
    check_generation("m", {"do_sample": True, "pad_token_id": 2, "eos_token_id": [1, 2], "temperature": 0.7})
    with pytest.raises(ValueError, match=f"m: its generation_config.json has {next(iter(option))} .* wrong type"):
        check_generation("m", option)


@pytest.mark.parametrize("label", [["no"], False, None])
def test_labels_are_texts(label):
    check_config("m", {"id2label": {"0": "no", "1": "yes"}})
    with pytest.raises(ValueError, match=r"m: config.json has id2label .* each label has to be a text"):
        check_config("m", {"id2label": {"0": label, "1": "yes"}})
