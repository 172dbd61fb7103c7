"""ROUGE and BLEU by hand, and evaluate_generation() against decoding one prompt at a time."""

import json
import math
import sys

import pytest
import torch
from tokenizers import decoders, processors
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import lte
from byte_tokenizer import byte_tokenizer
from lte.data.tasks import DataConfig, generation_rows
from lte.evaluation import generation
from lte.evaluation.generation import _encode, evaluate_generation, group_references
from lte.evaluation.text_metrics import TextMetrics

torch.set_num_threads(1)
REFERENCES = {"a": ["one", "two"], "what is it?": ["this"], "name[x]\n": ["x is a pub", "there is x", "x"]}
NEW = 9


def make_tokenizer(**special: str):
    """A token a byte, each with a letter of its own in decoded text: random bytes would seldom be UTF-8."""
    tokenizer = byte_tokenizer(**special)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


def model_of(kind: str):
    torch.manual_seed(3)
    if kind == "t5":
        config = T5Config(
            vocab_size=258, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, initializer_factor=3.0
        )
        config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 1, 0, 1
        model = T5ForConditionalGeneration(config)
    else:
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        ids = {"vocab_size": 258, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": None}
        model = LlamaForCausalLM(LlamaConfig(**shape, **ids, max_position_embeddings=64, initializer_range=0.3))
    if kind != "dense":
        lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="random"))
        lte.set_mode_(model, "hard")
    return model.eval()


def alone(model, prompt: str, **options) -> torch.Tensor:
    """Generated tokens of one prompt, up to EOS, by Hugging Face; with an encoder-decoder's start token."""
    inputs = make_tokenizer()(prompt, return_tensors="pt", return_token_type_ids=False)
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)[0, start:]


def text_of(tokens) -> str:
    return make_tokenizer().decode(tokens, skip_special_tokens=True).strip()


def test_rouge_by_hand():
    found = TextMetrics()([" the cat sat on the mat\n"], [["the cat sat on a mat"]])
    assert found["rouge1"] == pytest.approx(100 * 5 / 6)
    assert found["rouge2"] == pytest.approx(100 * 3 / 5)
    assert found["rougeL"] == pytest.approx(100 * 5 / 6)
    stemmed = TextMetrics()(["a dog runs"], [["dogs run"]])  # precision 2/3, recall 1
    assert stemmed["rouge1"] == pytest.approx(80)


def test_rouge_is_the_best_of_the_references_and_the_mean_of_the_texts():
    texts, references = ["the cat sat on the mat", "", "quite wrong"], [["a dog", "the cat sat on a mat"], ["x"], ["y"]]
    found = TextMetrics()(texts, references)
    assert found["rougeL"] == pytest.approx(100 * 5 / 6 / 3)
    assert found["rouge2"] == pytest.approx(100 * 3 / 5 / 3)


def test_bleu_by_hand():
    """1-grams 8 of 8, 2-grams 6 of 6, 3-grams 3 of 4, 4-grams 1 of 3; 8 tokens against 6 + 3."""
    texts = ["the cat sat on the mat", "a dog"]
    references = [["the cat sat on a mat", " the cat lay on the mat "], ["a dog runs"]]
    assert TextMetrics()(texts, references)["bleu"] == pytest.approx(100 * math.exp(1 - 9 / 8) * (3 / 4 / 3) ** 0.25)


@pytest.mark.parametrize("module", ["rouge_score.rouge_scorer", "sacrebleu"])
def test_a_missing_package_names_the_extra(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "lte\[eval\]"'):
        evaluate_generation(model_of("dense"), REFERENCES, make_tokenizer())


def test_references_are_grouped_by_prompt_in_order():
    found = group_references(["b", "a", "b", "b"], ["1", "2", "3", "1"])
    assert json.dumps(found) == '{"b": ["1", "3", "1"], "a": ["2"]}'


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("kind", ["llama", "dense", "t5"])
def test_each_prompt_is_completed_as_it_is_alone(kind, batch_size):
    model = model_of(kind)
    rows = [alone(model, prompt) for prompt in REFERENCES]
    found = evaluate_generation(
        model, REFERENCES, make_tokenizer(), batch_size=batch_size, max_new_tokens=NEW, sequence_length=64
    )
    assert found.predictions == [text_of(row) for row in rows]
    assert len(set(found.predictions)) == 3
    assert found.num_tokens == sum(len(row) - (kind == "t5") for row in rows)
    assert (found.num_prompts, found.num_references) == (3, 6)
    assert found.ended == sum(int(row[-1] == 0) for row in rows) / 3
    scores = TextMetrics()(found.predictions, list(REFERENCES.values()))
    assert {name: getattr(found, name) for name in scores} == scores


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_sparsity_and_cost_leave_padding_out(kind):
    """Of unequal prompts, and of texts of unequal length, without a token of padding."""
    model = model_of(kind)
    stop = int(alone(model, "name[x]\n")[3])
    model.generation_config.eos_token_id = [0, stop]
    rows = {prompt: alone(model, prompt) for prompt in REFERENCES}
    assert len({len(row) for row in rows.values()}) > 1
    with lte.track_sparsity(model) as meter:
        for prompt, row in rows.items():
            ids = torch.tensor([list(make_tokenizer()(prompt)["input_ids"])])
            if kind == "t5":
                model(input_ids=ids, decoder_input_ids=row[None])
            else:
                model(input_ids=torch.cat([ids, row[None]], dim=1))
    found = evaluate_generation(model, REFERENCES, make_tokenizer(), max_new_tokens=NEW, sequence_length=64)
    assert found.sparsity == pytest.approx(meter.overall, abs=1e-6)
    assert found.layer_sparsity == pytest.approx(meter.by_layer, abs=1e-6)
    assert 0.1 < found.sparsity < 0.9
    assert found.gflops_per_token == lte.cost_per_token(model, found.layer_sparsity).gflops
    assert found.gflops_per_token_dense == lte.cost_per_token(model, 0.0).gflops
    assert found.mode == "hard"


def test_a_dense_model_has_no_sparsity():
    found = evaluate_generation(model_of("dense"), REFERENCES, make_tokenizer(), max_new_tokens=1, sequence_length=64)
    assert (found.sparsity, found.layer_sparsity, found.mode) == (0.0, [], "dense")
    assert found.gflops_per_token == found.gflops_per_token_dense


@pytest.mark.parametrize("where", ["model", "tokenizer"])
def test_text_stops_at_the_models_end_and_at_the_one_that_training_appends(where):
    model, tokenizer = model_of("llama"), make_tokenizer()
    row = alone(model, "a")
    stop = int(row[4])
    kept = row[: row.tolist().index(stop) + 1]
    if where == "model":
        model.generation_config.eos_token_id = [0, stop]
    else:
        tokenizer = make_tokenizer(eos_token=tokenizer.convert_ids_to_tokens(stop))
        model.generation_config.eos_token_id = None
    found = evaluate_generation(model, {"a": ["b"]}, tokenizer, max_new_tokens=NEW, sequence_length=64)
    assert (found.num_tokens, found.ended) == (len(kept), 1)
    assert found.predictions == [tokenizer.decode(kept, skip_special_tokens=True).strip()]


def test_references_lose_the_tokens_that_decoding_leaves_out(monkeypatch):
    tokenizer = make_tokenizer(additional_special_tokens=["<end>"])
    model = model_of("dense")
    model.resize_token_embeddings(len(tokenizer))
    seen = []

    def metrics(_texts, references):
        seen.append(references)
        return dict.fromkeys(("rouge1", "rouge2", "rougeL", "bleu"), 0.0)

    monkeypatch.setattr("lte.evaluation.generation.TextMetrics", lambda: metrics)
    given = {"a": ["one<end>\n", "two"], "b": ["x<end>y<eos>"]}
    evaluate_generation(model, given, tokenizer, max_new_tokens=NEW, sequence_length=64)
    assert seen == [[["one\n", "two"], ["xy"]]]


def test_greedy_and_beams_whatever_the_model_says():
    model = model_of("llama")
    greedy = evaluate_generation(model, REFERENCES, make_tokenizer(), max_new_tokens=NEW, sequence_length=64)
    beams = [text_of(alone(model, prompt, num_beams=4)) for prompt in REFERENCES]
    model.generation_config.update(do_sample=True, temperature=3.0, top_k=5, num_beams=2)
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, forced_eos_token_id=0)
    options = {"max_new_tokens": NEW, "sequence_length": 64}
    assert evaluate_generation(model, REFERENCES, make_tokenizer(), **options) == greedy
    found = evaluate_generation(model, REFERENCES, make_tokenizer(), num_beams=4, **options)
    assert found.predictions == beams
    assert beams != greedy.predictions


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_prompts_have_the_tokens_of_training(encoder_decoder, caplog):
    tokenizer = make_tokenizer(bos_token="<pad>")
    parts = {"single": "<pad> $A <eos>", "special_tokens": [("<pad>", 1), ("<eos>", 0)]}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(**parts)
    prompts, answer, size = ["0123456789", "abc"], "xyz", 12
    rows = generation_rows(prompts, [answer] * 2, tokenizer, DataConfig(sequence_length=size), encoder_decoder, 258)
    found = _encode(prompts, tokenizer, size, len(answer) + 1, encoder_decoder)  # EOS is new as well
    for row, ids in zip(rows, found, strict=True):
        context = row["input_ids"] if encoder_decoder else row["input_ids"][row["labels"] == -100]
        assert ids.tolist() == context.tolist()
    assert [len(ids) for ids in found] == ([12, 5] if encoder_decoder else [8, 4])
    assert ("1 of 2 prompts cut" in caplog.text) is not encoder_decoder


@pytest.mark.parametrize(
    ("asked", "new_tokens", "done"), [(None, 2000, False), (None, 2048, None), (True, 2000, True), (False, 2048, False)]
)
def test_steps_are_compiled_where_there_are_many(monkeypatch, asked, new_tokens, done):
    seen = []

    def complete(model, inputs, stops, compile, **_):
        seen.append(compile)
        new = torch.zeros(1, dtype=torch.long)
        return [generation.Completion(row, row[:0], new, ended=True) for row in inputs["input_ids"]]

    monkeypatch.setattr(generation, "complete", complete)
    options = {"batch_size": 2, "max_new_tokens": new_tokens, "sequence_length": 4096, "compile": asked}
    model = model_of("dense")
    model.config.max_position_embeddings = 4096
    evaluate_generation(model, REFERENCES, make_tokenizer(), **options)
    assert seen == [done, done]  # two batches: 4000 and 4096 steps


def test_the_model_is_left_as_it_was():
    model = model_of("llama").train()
    evaluate_generation(model, REFERENCES, make_tokenizer(), max_new_tokens=1, sequence_length=64)
    assert model.training
    assert all(not layer.kept_in for layer in model.modules() if hasattr(layer, "kept_in"))


@pytest.mark.parametrize(
    ("references", "options", "message"),
    [
        ({}, {}, "no prompt"),
        ({"": ["a"]}, {}, "a prompt is empty"),
        ({"a": ["b"]}, {"max_new_tokens": 64}, "max_new_tokens 64 of a sequence_length of 64 leave no room"),
    ],
)
def test_what_is_refused(references, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_generation(model_of("dense"), references, make_tokenizer(), **{"max_new_tokens": NEW, **options})
