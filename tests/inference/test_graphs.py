"""CUDA graphs of single layers, which eager decoding replays, and of whole steps."""

import copy
import pickle

import pytest
import torch
from tiny_models import tiny_model

import lte
from lte.inference.graphs import Replays
from lte.modules.recording import sparse_layers

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_copies_and_pickles_are_empty():
    replays = Replays()
    replays._seen[1] = 5
    assert not copy.deepcopy(replays)._seen
    assert not pickle.loads(pickle.dumps(replays))._seen


@pytest.fixture
def model():
    shape = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 16}
    made = lte.sparsify_(tiny_model("llama", **shape), lte.LTEConfig(expert_size=16, grouping="random"))
    lte.set_mode_(made, "hard")
    return lte.optimize_(made.cuda())


@needs_cuda
@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 3, 64, 65])
def test_a_replayed_layer_gives_the_same_bits(model, tokens):
    layer = next(iter(sparse_layers(model).values()))
    inputs = [torch.randn(tokens, 1, 64, device="cuda") for _ in range(6)]
    for x in inputs:
        assert torch.equal(layer(x), layer._compute(x))
    assert len(layer.replays._kept) == (tokens <= 64)


@needs_cuda
@pytest.mark.gpu
@torch.no_grad()
def test_outputs_of_two_replays_are_two(model):
    layer = next(iter(sparse_layers(model).values()))
    inputs = [torch.randn(1, 1, 64, device="cuda") for _ in range(6)]
    found = [layer(x) for x in inputs]
    assert all(torch.equal(y, layer._compute(x)) for x, y in zip(inputs, found, strict=True))


@needs_cuda
@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict({name: 2 * one for name, one in model.state_dict().items()}, assign=True),
        lambda model: [setattr(layer, "tau", 0.2) for layer in sparse_layers(model).values()],
        lambda model: [layer.lte_router.bias.add_(0.3) for layer in sparse_layers(model).values()],
        lambda model: lte.optimize_(model, "reference"),
        lambda model: lte.set_mode_(model, "dense"),
    ],
)
def test_a_layer_that_has_changed_is_not_replayed_as_it_was(model, change):
    layer = next(iter(sparse_layers(model).values()))
    x = torch.randn(1, 1, 64, device="cuda")
    for _ in range(5):
        layer(x)
    change(model)
    twin = copy.deepcopy(layer)
    for _ in range(5):
        torch.testing.assert_close(layer(x), twin(x), rtol=0, atol=0)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_captured_step_gives_hugging_faces_tokens(model, compile):
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for batch in (1, 3):
        prompt = torch.randint(3, 40, (batch, 7), device="cuda")
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        for _ in range(2):
            assert torch.equal(lte.generate(model, prompt, compile=compile, tune=False, **options), expected)
