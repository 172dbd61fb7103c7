from functools import partial

import pytest
import torch
from tiny_models import VOCABULARY, tiny_inputs, tiny_model
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

import lte
from lte.inference import generate as generate_file

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


def test_compiled_steps_give_the_same_tokens(monkeypatch):
    monkeypatch.setattr(generate_file, "CompileConfig", partial(CompileConfig, backend="eager"))
    model = lte.optimize_(sparse(), "auto")
    options = {**GREEDY, "eos_token_id": None}
    expected = lte.generate(model, left_padded(), **options)
    assert not hasattr(model, "_compiled_call")
    assert torch.equal(lte.generate(model, left_padded(), compile=True, **options), expected)
    assert model._last_compile_config.fullgraph
    with lte.track_sparsity(model) as meter:  # not compiled, though the model can be
        assert torch.equal(lte.generate(model, left_padded(), **options), expected)
    assert 0.1 < meter.overall < 0.9


def test_compile_is_refused_while_recording(llama):
    with lte.track_sparsity(llama), pytest.raises(ValueError, match="being recorded"):
        lte.generate(llama, prompts()[0][None], compile=True, **GREEDY)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
def test_a_step_that_does_not_compile_is_refused_with_the_cure(monkeypatch):
    def broken(error, graph, inputs):
        raise error

    def compiled_by(error):
        backend = partial(broken, error)
        monkeypatch.setattr(generate_file, "CompileConfig", partial(CompileConfig, backend=backend))

    torch._dynamo.reset()
    model = lte.optimize_(sparse(), "reference")
    compiled_by(RuntimeError("no C++\ncompiler"))
    with pytest.raises(ValueError, match=r"does not compile here: .*no C\+\+ compiler.*; leave --compile out"):
        lte.generate(model, prompts()[0][None], compile=True, **GREEDY)


@pytest.mark.parametrize("compile", [True, False])
def test_other_errors_stay_what_they_are(llama, monkeypatch, compile):
    def fail(**_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(llama, "generate", fail)
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
