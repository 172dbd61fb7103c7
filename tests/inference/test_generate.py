import copy
import logging
import pickle
from contextlib import contextmanager

import pytest
import torch
from tiny_models import VOCABULARY, tiny_inputs, tiny_model
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import lte
from lte.inference import attention as attention_file
from lte.inference import decoder as decoder_file
from lte.inference import generate as generate_file
from lte.ops import slot_attention
from lte.surgery.families import known_families

GENERATING = ["llama", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "mpt", "falcon", "t5", "bart"]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
LENGTHS = (3, 7, 5)


def sparse(family="llama"):
    model = lte.sparsify_(tiny_model(family), lte.LTEConfig(expert_size=8, grouping="random"))
    lte.set_mode_(model, "hard")
    return model


@pytest.fixture(scope="module")
def llama():
    return lte.optimize_(sparse(), "reference")


def prompts():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def left_padded():
    rows, longest = prompts(), max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in LENGTHS])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", GENERATING)
def test_an_optimised_model_gives_the_same_tokens(family):
    model = sparse(family)
    inputs = {name: value for name, value in tiny_inputs(family).items() if name != "decoder_input_ids"}
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(lte.generate(model, inputs, **GREEDY), expected)
    lte.optimize_(model, "reference")
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert torch.equal(lte.generate(model, inputs, **GREEDY), expected)


@pytest.fixture
def loops(monkeypatch):
    """The calls of the decoding loop."""
    calls, right = [], generate_file._Loop.__call__

    def call(loop, *args, **options):
        calls.append(loop._how)
        return right(loop, *args, **options)

    monkeypatch.setattr(generate_file._Loop, "__call__", call)
    return calls


@pytest.mark.parametrize("asked", [{"do_sample": False}, {"do_sample": True, "top_k": 4}, {"generation_config": 1}])
def test_the_generate_of_a_packed_model_is_the_loop(asked, loops):
    model = sparse()
    options = {**GREEDY, **asked, "eos_token_id": None}
    if "generation_config" in asked:
        options["generation_config"] = GenerationConfig(repetition_penalty=1.3)
    for inputs in (left_padded(), {"inputs": prompts()[1][None]}):
        torch.manual_seed(0)
        expected = model.generate(**inputs, **options)
        assert not loops
        packed = lte.optimize_(copy.deepcopy(model), "reference")
        for one in (packed, pickle.loads(pickle.dumps(packed))):
            torch.manual_seed(0)
            assert torch.equal(one.generate(**inputs, **options), expected)
            assert len(loops) == 1
            assert loops.pop().compile is False


def test_the_generate_of_a_packed_model_has_all_of_hugging_face(llama, loops):
    model = sparse()
    right_padded = {
        "input_ids": left_padded()["input_ids"].flip(-1),
        "attention_mask": left_padded()["attention_mask"].flip(-1),
    }
    for inputs, asked in ((left_padded(), {"num_beams": 2}), (right_padded, {})):
        expected = model.generate(**inputs, **GREEDY, **asked)
        assert torch.equal(llama.generate(**inputs, **GREEDY, **asked), expected)
    assert llama.generate(**left_padded(), **GREEDY, custom_generate=lambda *_args, **_options: "mine") == "mine"


def test_without_memory_for_the_loop_hugging_face_decodes(llama, monkeypatch, caplog):
    generate_file._say_once.cache_clear()
    caplog.set_level(logging.INFO, "lte")
    expected = llama.generate(**left_padded(), **GREEDY)

    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decoder_file.Decoder, "prepare", full)
    assert torch.equal(llama.generate(**left_padded(), **GREEDY), expected)
    assert "its fixed memory for 3 texts of 15 tokens is not free" in caplog.text
    assert not llama._decoders._decoders


OTHERS = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "bart", "mbart", "pegasus", "marian"}
CAUSAL = [one for one in known_families() if one in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and one not in OTHERS]
LEFT_TO_HUGGING_FACE = {"bloom", "gpt_neo", "mpt"}
"""They count positions by themselves, or look at them on the host."""


def lively(family, **changes):
    """A tiny model whose tokens differ from each other."""
    model = tiny_model(family, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("options", [{"eos_token_id": None}, {"repetition_penalty": 1.3, "eos_token_id": [7, 8, 9]}])
def test_tokens_are_those_of_hugging_face(family, options, caplog):
    generate_file._say_once.cache_clear()
    caplog.set_level(logging.INFO, "lte")
    model = lively(family)
    options = {**GREEDY, "max_new_tokens": 16, **options}
    for inputs in (left_padded(), {"input_ids": prompts()[1][None]}):
        assert torch.equal(lte.generate(model, inputs, **options), model.generate(**inputs, **options))
    assert ("is decoded by Hugging Face's own generate" in caplog.text) == (family in LEFT_TO_HUGGING_FACE)


def test_an_eager_step_is_given_the_filled_slots_alone(monkeypatch):
    seen, right = [], torch.nn.functional.scaled_dot_product_attention

    def attend(query, key, *rest, **options):
        seen.append((key.shape[2], options["attn_mask"] is None))
        return right(query, key, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    model = lively("phi3", num_hidden_layers=1)
    options = {**GREEDY, "max_new_tokens": 4, "eos_token_id": None}
    lte.generate(model, prompts()[1][None], **options)
    assert seen[1:] == [(8, True), (9, True), (10, True)]
    seen.clear()
    lte.generate(model, left_padded(), **options)
    assert seen[1:] == [(8, False), (9, False), (10, False)]


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "olmo3", "cohere2", "ministral"])
@pytest.mark.parametrize("form", ["bool", "int64"])
def test_a_sliding_window_is_looked_through(family, form, monkeypatch):
    model = lively(family, sliding_window=4)
    if form == "int64":
        read_filled_slots_alone(monkeypatch)
    options = {**GREEDY, "eos_token_id": None}
    expected = model.generate(**left_padded(), **options)
    assert torch.equal(lte.generate(model, left_padded(), **options), expected)


def read_filled_slots_alone(monkeypatch):
    """As on a GPU: the attention that knows slots by number, here by its reference."""
    right = attention_file.mask_form
    monkeypatch.setattr(decoder_file, "mask_form", lambda model, graph: right(model, True))
    monkeypatch.setattr(attention_file, "missing", lambda name: None)
    monkeypatch.setattr(attention_file, "slot_attention", slot_attention.reference)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2", "phi3", "opt"])
def test_attention_over_filled_slots(family, monkeypatch):
    read_filled_slots_alone(monkeypatch)
    model = lively(family)
    options = {**GREEDY, "eos_token_id": None}
    expected = model.generate(**left_padded(), **options)
    implementation = model.config._attn_implementation
    assert torch.equal(lte.generate(model, left_padded(), **options), expected)
    assert model.config._attn_implementation == implementation


def test_a_soft_cap_keeps_its_own_attention():
    model = tiny_model("gemma2")
    assert attention_file.mask_form(model, graph=True) != torch.int64


SAMPLING = [
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.05},
    {"typical_p": 0.8},
    {"epsilon_cutoff": 0.01},
    {"renormalize_logits": True, "top_k": 7, "temperature": 0.6, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_samples_are_those_of_hugging_face(sampling, caplog):
    generate_file._say_once.cache_clear()
    caplog.set_level(logging.INFO, "lte")
    model = lively("llama")
    options = {
        "max_new_tokens": 12,
        "pad_token_id": 0,
        "do_sample": True,
        "eos_token_id": [7, 8],
        "top_k": 0,
        **sampling,
    }
    torch.manual_seed(4)
    expected = model.generate(**left_padded(), **options)
    assert torch.equal(lte.generate(model, left_padded(), seed=4, **options), expected)
    assert "is decoded by Hugging Face's own generate" not in caplog.text


@pytest.mark.parametrize("fewest", [{"min_new_tokens": 6}, {"min_length": 12}], ids=str)
def test_a_text_is_not_ended_early(fewest):
    model = lively("llama")
    ends = model.generate(**left_padded(), **GREEDY, eos_token_id=None)[:, max(LENGTHS)].unique().tolist()
    options = {**GREEDY, "eos_token_id": ends}
    assert lte.generate(model, left_padded(), **options).shape[1] < max(LENGTHS) + 5
    made = lte.generate(model, left_padded(), **options, **fewest)
    assert torch.equal(made, model.generate(**left_padded(), **options, **fewest))
    assert made.shape[1] >= max(LENGTHS) + 5


class Forbidding(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, 3:20] = -torch.inf
        return scores


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"num_beams": 2}, "beam search is neither greedy nor sampling"),
        ({"logits_processor": LogitsProcessorList([Forbidding()])}, "Forbidding looks at more than scores"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor looks at more than scores"),
        ({"cache_implementation": "static"}, "cache_implementation is given"),
        ({"use_cache": False}, "the options say to keep no keys and values"),
        ({"return_dict_in_generate": True}, "the options ask for more than tokens"),
    ],
)
def test_what_the_loop_does_not_do_is_left_to_hugging_face(asked, reason, caplog):
    generate_file._say_once.cache_clear()
    caplog.set_level(logging.INFO, "lte")
    model = lively("llama")
    options = {**GREEDY, "eos_token_id": None, **asked}
    found, expected = lte.generate(model, left_padded(), **options), model.generate(**left_padded(), **options)
    if asked.get("return_dict_in_generate"):
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)
    assert f"LlamaForCausalLM is decoded by Hugging Face's own generate: {reason}" in " ".join(caplog.text.split())
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", ["is_fsdp_managed_module", "is_deepspeed_zero3_enabled"])
def test_divided_weights_are_left_to_hugging_face(name, monkeypatch, caplog):
    generate_file._say_once.cache_clear()
    caplog.set_level(logging.INFO, "lte")
    model = lively("llama")
    expected = model.generate(**left_padded(), **GREEDY)
    monkeypatch.setattr(generate_file, name, lambda *_: True)
    assert torch.equal(lte.generate(model, left_padded(), **GREEDY), expected)
    assert "its weights are divided among processes" in caplog.text


def test_time_that_is_over_ends_the_texts():
    made = lte.generate(
        lively("llama"), left_padded(), **{**GREEDY, "max_new_tokens": 40}, eos_token_id=None, max_time=0
    )
    assert made.shape[1] == max(LENGTHS) + 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("steps", [{}, {"cache_implementation": "static"}])
def test_padded_rows_give_the_tokens_of_each_prompt_alone(family, steps):
    model = lte.optimize_(sparse(family), "reference")
    options = {**GREEDY, "eos_token_id": None, **steps}
    together = lte.generate(model, left_padded(), **options)
    for row, prompt in zip(together, prompts(), strict=True):
        alone = lte.generate(model, prompt[None], **options)[0, len(prompt) :]
        assert torch.equal(row[max(LENGTHS) :], alone)


def test_padding_is_left_out_of_the_sparsity(llama):
    options = {**GREEDY, "eos_token_id": None}
    with lte.track_sparsity(llama) as together:
        lte.generate(llama, left_padded(), **options)
    with lte.track_sparsity(llama) as alone:
        for prompt in prompts():
            lte.generate(llama, prompt[None], **options)
    assert together.by_layer == pytest.approx(alone.by_layer, abs=1e-6)


@pytest.fixture
def compiled_by(monkeypatch):
    """Steps are compiled by another compiler than inductor, which takes seconds."""

    def use(backend="eager"):
        torch._dynamo.reset()
        right = torch.compile
        monkeypatch.setattr(torch, "compile", lambda step, options, **how: right(step, backend=backend, **how))

    return use


def prepared_by(model, inputs, **options):
    """The tokens, and what was prepared on the way."""
    seen = []

    @contextmanager
    def preparing(what):
        seen.append(what)
        yield

    return lte.generate(model, inputs, preparing=preparing, **options), seen


def test_compiled_steps_give_the_same_tokens_and_are_kept(compiled_by):
    compiled_by()
    model = lte.optimize_(sparse(), "auto")
    options = {**GREEDY, "eos_token_id": None}
    expected = lte.generate(model, left_padded(), **options)
    found, prepared = prepared_by(model, left_padded(), compile=True, **options)
    assert torch.equal(found, expected)
    assert prepared == ["compiling the decoding step: batch 4, 256 tokens"]
    shorter = {name: value[:, 2:] for name, value in left_padded().items()}
    for inputs in (left_padded(), shorter):  # other lengths, the same step
        found, prepared = prepared_by(model, inputs, compile=True, **options)
        assert torch.equal(found, lte.generate(model, inputs, **options))
        assert not prepared
    alone, prepared = prepared_by(model, prompts()[1][None], compile=True, **options)
    assert torch.equal(alone, lte.generate(model, prompts()[1][None], **options))
    assert prepared == ["compiling the decoding step: batch 1, 256 tokens"]
    with lte.track_sparsity(model) as meter:
        assert torch.equal(lte.generate(model, left_padded(), **options), expected)
    assert 0.1 < meter.overall < 0.9


@pytest.mark.parametrize(
    "change",
    [
        lambda model: lte.set_mode_(model, "dense"),
        lambda model: lte.optimize_(model, "reference"),
        lambda model: model.load_state_dict(
            {name: one.clone() for name, one in model.state_dict().items()}, assign=True
        ),
        lambda model: model.model.layers[0].register_forward_hook(lambda *_: None),
        lambda model: model.double(),
    ],
)
def test_a_model_that_has_changed_is_compiled_anew(change, compiled_by):
    compiled_by()
    model = lte.optimize_(sparse(), "auto")
    options = {**GREEDY, "eos_token_id": None}
    prepared_by(model, left_padded(), compile=True, **options)
    change(model)
    found, prepared = prepared_by(model, left_padded(), compile=True, **options)
    assert prepared
    assert torch.equal(found, lte.generate(model, left_padded(), **options))


def test_what_is_kept_goes_neither_into_copies_nor_into_files(compiled_by, tmp_path):
    compiled_by()
    model = lte.optimize_(sparse(), "auto")
    options = {**GREEDY, "eos_token_id": None}
    expected = lte.generate(model, left_padded(), compile=True, **options)
    twin = copy.deepcopy(model)
    assert not twin._decoders._decoders
    assert torch.equal(lte.generate(twin, left_padded(), **options), expected)
    torch.save(model, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(lte.generate(read, left_padded(), **options), expected)
    model.save_pretrained(tmp_path / "saved")
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} <= {".json", ".safetensors", ".py"}


def test_prompts_are_not_read_for_a_step_that_cannot_be_captured(compiled_by, monkeypatch):
    compiled_by()
    model = tiny_model("llama")
    options = {**GREEDY, "eos_token_id": None}
    expected = lte.generate(model, left_padded(), compile=True, **options)
    model._decoders.refused = "its step copies from the host"
    monkeypatch.setattr(decoder_file.Prompts, "read", None)
    monkeypatch.setattr(generate_file, "_hugging_face_steps", lambda *_: {"disable_compile": True})
    assert torch.equal(lte.generate(model, left_padded(), compile=True, **options), expected)


def test_few_decoders_are_kept(compiled_by):
    compiled_by()
    model = tiny_model("llama")
    for batch in (1, 2, 4, 8, 16, 1):
        lte.generate(model, prompts()[0][None].expand(batch, -1), compile=True, **GREEDY)
    assert [key[0][0] for key in model._decoders._decoders] == [4, 8, 16, 1]


def test_compile_is_refused_while_recording(llama):
    with lte.track_sparsity(llama), pytest.raises(ValueError, match="cannot record scores"):
        lte.generate(llama, prompts()[0][None], compile=True, **GREEDY)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
def test_a_step_that_does_not_compile_is_refused_with_the_cure(compiled_by):
    def broken(graph, inputs):
        raise RuntimeError("no C++\ncompiler")

    compiled_by(broken)
    model = lte.optimize_(sparse(), "reference")
    with pytest.raises(ValueError, match=r"does not compile here: .*no C\+\+ compiler.*; leave --compile out"):
        lte.generate(model, prompts()[0][None], compile=True, **GREEDY)


@pytest.mark.parametrize("compile", [True, False])
def test_other_errors_stay_what_they_are(llama, monkeypatch, compile):
    def fail(**_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generate_file, "hugging_face_generate", lambda _model: fail)
    with pytest.raises(torch.OutOfMemoryError):
        lte.generate(llama, prompts()[0][None], compile=compile, **GREEDY)


def test_padding_on_the_right_is_refused(llama):
    inputs = {name: value.flip(-1) for name, value in left_padded().items()}
    with pytest.raises(ValueError, match='padding_side="left"'):
        lte.generate(llama, inputs, **GREEDY)


def test_a_seed_repeats_and_leaves_the_random_state_alone(llama):
    options = {**GREEDY, "do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 12}
    prompt = prompts()[1][None]
    state = torch.get_rng_state()
    first = lte.generate(llama, prompt, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(lte.generate(llama, prompt, seed=1, **options), first)
    assert not torch.equal(lte.generate(llama, prompt, seed=2, **options), first)
    torch.manual_seed(1)
    assert torch.equal(llama.generate(prompt, **options), first)


def test_tokens_stream_as_they_come(llama):
    class Keep(BaseStreamer):
        seen = ()

        def put(self, value):
            self.seen = (*self.seen, *value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Keep()
    tokens = lte.generate(llama, prompts()[0][None], streamer=streamer, **GREEDY)
    assert streamer.ended
    assert list(streamer.seen) == tokens[0].tolist()


def test_a_dense_model():
    model = tiny_model("llama")
    prompt = prompts()[0][None]
    assert torch.equal(lte.generate(model, prompt, **GREEDY), model.generate(prompt, **GREEDY))
