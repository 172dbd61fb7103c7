import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import relative_rms, tiny_config, tiny_inputs, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lte
from lte.modules.recording import sparse_layers
from lte.surgery import architectures

ROUTER = "model.layers.1.mlp.router.weight"


def sparse(family="llama", mode="hard", **overrides):
    model = lte.sparsify_(tiny_model(family, **overrides), lte.LTEConfig(expert_size=8, grouping="random"))
    lte.set_mode_(model, mode)
    return model


@pytest.fixture(scope="module")
def original():
    return sparse()


@pytest.fixture
def folder(original, tmp_path):
    original.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def logits(model, family="llama"):
    return model(**tiny_inputs(family)).logits


def edit_config(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_what_is_on_disk_and_in_memory(original, folder):
    on_disk = json.loads((folder / "config.json").read_text())
    assert on_disk["model_type"] == "lte"
    assert on_disk["base_model_type"] == "llama"
    assert on_disk["architectures"] == ["LTELlamaForCausalLM"]
    method = {"method": "lte", "expert_size": 8, "tau": 0.5, "seed": 0, "grouping": "random"}
    assert method.items() <= on_disk["lte"].items()
    assert on_disk["lte"]["mode"] == "hard"

    config = AutoConfig.from_pretrained(folder)
    for one in (
        original.config,
        config,
        type(config).from_pretrained(folder),
        type(config).from_dict(config.to_dict()),
    ):
        assert isinstance(one, LlamaConfig)
        assert one.model_type == "llama"
        assert one.lte == on_disk["lte"]
        assert not {"transformers_weights", "base_model_type"} & one.to_dict().keys()
    assert config.auto_map["AutoModelForCausalLM"] == "modeling_lte.LTELlamaForCausalLM"


def test_own_class_and_output_loading_info(original, folder):
    cls = type(original)
    assert torch.equal(logits(cls.from_pretrained(folder)), logits(original))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(model), logits(original))


def test_a_second_generation_is_still_the_same(original, folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(original))
    assert (tmp_path / "again" / "config.json").read_text() == (folder / "config.json").read_text()


def test_sharded(original, tmp_path):
    original.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(original))
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llama", "t5", "opt"])
def test_bf16(family, tmp_path):
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    tiny_model(family).save_pretrained(tmp_path)
    dense = auto.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = lte.sparsify_(dense, lte.LTEConfig(expert_size=8, grouping="random"))
    lte.set_mode_(model, "hard")
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert {layer.router.weight.dtype for layer in sparse_layers(loaded).values()} == {torch.bfloat16}
    assert torch.equal(logits(loaded, family), logits(model, family))
    in_fp32 = auto.from_pretrained(tmp_path, dtype=torch.float32)
    assert in_fp32.dtype == torch.float32
    assert 0 < relative_rms(logits(in_fp32, family), logits(loaded, family).float()) < 0.1


def test_tied_embeddings_stay_tied(tmp_path):
    model = sparse(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for length in (len(content) - 1000, 100, 4, 0):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut short or damaged"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_deleted_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", [ROUTER, ROUTER.replace("weight", "temperature"), "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification])
def test_a_missing_weight(folder, name, auto):
    edit_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match="1 weights are missing, first .*" + name.removeprefix("model.")) as error:
        auto.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_weight_missing_outside_the_layers(folder):
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"first lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("ignore", [False, True])
def test_a_router_of_another_shape(folder, ignore):
    edit_weights(folder, lambda weights: weights.update({ROUTER: weights[ROUTER][:-1].clone()}))
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.router\.weight with \(7, 32\).* asks for \(8, 32\)"
    ) as error:
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=ignore)
    assert "\n" not in str(error.value)


def test_a_config_of_another_expert_size(folder):
    edit_config(folder, lambda values: values["lte"].update(expert_size=16))
    with pytest.raises(ValueError, match=r"6 weights|4 weights"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("lte"), "section lte is missing"),
        (lambda values: values.update(lte=None), "section lte is missing or damaged"),
        (lambda values: values.pop("base_model_type"), "section base_model_type is missing"),
        (lambda values: values.update(base_model_type="mine"), "'mine', which transformers does not know"),
        (lambda values: values["lte"].update(expert_count=3), "unknown option expert_count for method 'lte'"),
        (lambda values: values["lte"].update(method="magic"), "unknown method 'magic'"),
        (lambda values: values["lte"].pop("method"), "unknown method None"),
        (lambda values: values["lte"].update(expert_size="8"), "option of the wrong type: expert_size '8'"),
        (lambda values: values["lte"].update(seed=[42, 42]), "option of the wrong type"),
        (lambda values: values["lte"].update(tau=True), "option of the wrong type"),
        (lambda values: values["lte"].update(mode="fast"), "mode is 'fast'"),
        (lambda values: values["lte"].update(tau=2), "tau is 2"),
        (lambda values: values["lte"].update(expert_size=7), "does not divide"),
    ],
)
def test_damaged_configs(folder, change, message):
    edit_config(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_another_head(original, folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert type(model).__name__ == "LTELlamaForSequenceClassification"
    assert model.score.weight.shape == (3, 32)
    with torch.no_grad():
        hidden = model.model(**tiny_inputs("llama")).last_hidden_state
        assert torch.equal(hidden, original.model(**tiny_inputs("llama")).last_hidden_state)
    model.save_pretrained(folder / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(folder / "classifier")
    assert torch.equal(again.score.weight, model.score.weight)
    with pytest.raises(ValueError, match=r"weights have the wrong shape, first score\.weight"):
        AutoModelForSequenceClassification.from_pretrained(folder / "classifier", num_labels=4)
    other = AutoModelForSequenceClassification.from_pretrained(
        folder / "classifier", num_labels=4, ignore_mismatched_sizes=True
    )
    assert other.score.weight.shape == (4, 32)


def test_another_head_on_an_encoder(tmp_path):
    sparse("bert").save_pretrained(tmp_path)  # has neither a pooler nor a classifier
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    with torch.no_grad():
        assert model(**tiny_inputs("bert")).logits.shape == (2, 3)


def test_from_config_makes_a_sparse_model(original):
    model = AutoModelForCausalLM.from_config(original.config)
    assert type(model) is type(original)
    assert len(sparse_layers(model)) == 2


def test_tokenizer(folder):
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("b")["input_ids"] == [2]


def test_classes_have_names():
    assert architectures.LTELlamaForCausalLM is architectures.lte_model_class(LlamaForCausalLM)
    assert architectures.LTELlamaConfig is architectures.LTELlamaForCausalLM.config_class
    with pytest.raises(AttributeError, match="LTENothing"):
        _ = architectures.LTENothing


def test_a_class_without_a_section_lte():
    with pytest.raises(ValueError, match="sparsify_"):
        architectures.LTELlamaForCausalLM(tiny_config("llama"))
