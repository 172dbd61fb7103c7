"""What the report says of routers, against counting by hand and drawing every batch."""

import itertools
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lte
from byte_tokenizer import byte_tokenizer, with_bos
from lte.report.routing import BINS, histogram, routing_on, union_by_batch, union_sparsity
from lte.report.routing_view import token_data

torch.set_num_threads(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=1
    )
    model = LlamaForCausalLM(config).eval()
    lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="random"))
    for layer, bias in zip(model.model.layers, (-0.1, 0.1), strict=True):
        torch.nn.init.constant_(layer.mlp.router.bias, bias)
    lte.set_mode_(model, "hard")
    return model


def test_union_sparsity_is_the_mean_over_all_batches():
    active_TE = torch.rand(7, 5, generator=torch.Generator().manual_seed(0)) > 0.6
    for batch in range(1, 8):
        drawn = [
            active_TE[list(some)].any(0).logical_not().float().mean()
            for some in itertools.combinations(range(7), batch)
        ]
        assert union_sparsity(active_TE, batch) == pytest.approx(torch.stack(drawn).mean().item(), abs=1e-6)


def test_union_sparsity_by_hand():
    active_TE = torch.tensor([[1, 0], [0, 0], [0, 0], [0, 0]]).bool()
    assert union_sparsity(active_TE, 2) == pytest.approx((0.5 + 1) / 2)  # 3 of 6 pairs leave the first one out
    assert list(union_by_batch([active_TE])) == [1, 2]
    assert list(union_by_batch([active_TE[:1]])) == [1]


def test_histogram():
    shares = histogram(torch.tensor([[0.0, 0.01], [0.5, 1.0]]))
    assert len(shares) == BINS
    assert (shares[0], shares[BINS // 2], shares[-1]) == (0.5, 0.25, 0.25)
    assert sum(shares) == 1


def test_a_text_is_routed_as_the_model_does(model):
    text = "one\ntwo — three"
    found = routing_on(model, byte_tokenizer(), text, 512)
    assert "".join(found.pieces) == text
    with lte.track_sparsity(model) as meter:
        model(input_ids=torch.tensor([byte_tokenizer()(text)["input_ids"]]))
    assert found.sparsity == pytest.approx(meter.overall, abs=1e-6)
    assert 0 < found.sparsity < 1
    assert found.mode == "hard"
    assert [sum(shares) for shares in found.histogram] == pytest.approx([1, 1])
    assert len(routing_on(model, byte_tokenizer(), text, 4).pieces) == 4


def test_a_model_not_yet_trained_is_run_soft_and_left_as_it_was(model):
    lte.set_mode_(model, "dense")
    found = routing_on(model, byte_tokenizer(), "one two", 512)
    assert found.mode == "soft"
    assert found.histogram_overall[-1] < 0.5  # scores, not the ones of mode dense
    assert {layer.mlp.mode for layer in model.model.layers} == {"dense"}


def test_an_empty_text_is_refused(model):
    with pytest.raises(ValueError, match="empty"):
        routing_on(model, byte_tokenizer(), "", 512)


def test_what_the_page_gets_of_tokens(model):
    found = routing_on(model, byte_tokenizer(), "some text", 512)
    data = json.loads(json.dumps(token_data(found)))
    assert data["experts"] == [6, 6]
    for layer, active_TE in enumerate(found.active):
        for token, row in enumerate(active_TE.tolist()):
            digits = data["bits"][layer][token]
            assert [bool(int(digits[e // 4], 16) >> (3 - e % 4) & 1) for e in range(6)] == row
            assert data["counts"][layer][token] == sum(row)


def test_a_text_is_routed_behind_the_bos_of_its_tokenizer(model):
    """The model reads BOS, and the report shows the text alone."""
    tokenizer, text = with_bos(), "one\ntwo"
    read = []
    model.register_forward_pre_hook(lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True)
    found = routing_on(model, tokenizer, text, 512)
    assert read[0].tolist() == [[1, *byte_tokenizer()(text)["input_ids"]]]
    assert "".join(found.pieces) == text
    assert all(len(active) == len(text) for active in found.active)
    assert len(routing_on(model, tokenizer, text, 4).pieces) == 3  # as many tokens as were asked for, BOS counted
    assert read[1].shape == (1, 4)
