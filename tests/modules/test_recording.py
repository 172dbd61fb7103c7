import pytest
import torch
from torch.utils.data import default_collate
from transformers import BartConfig, BartForSequenceClassification, BertConfig, BertForSequenceClassification

import lte
from lte.modules.recording import sparse_layers
from lte.modules.token_masks import TokenMasks

LENGTHS = (9, 4, 6)
EXPERTS = 8


def rows(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 48, (length,), generator=generator) for length in lengths]


def padded(side, lengths=LENGTHS):
    longest = max(lengths)
    batch = []
    for row in rows(lengths):
        padding = torch.zeros(longest - len(row), dtype=torch.long)
        real = torch.ones_like(row)
        parts = [(row, real), (padding, padding)]
        parts = parts if side == "right" else parts[::-1]
        ids, mask = (torch.cat(values) for values in zip(*parts, strict=True))
        batch.append({"input_ids": ids, "attention_mask": mask})
    batch = default_collate(batch)
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    return batch


def test_scores_of_the_last_forward_pass_with_gradient(llama):
    lte.set_mode_(llama, "soft")
    with lte.record_scores(llama) as recording:
        llama(rows()[0][None])
        llama(rows()[1][None])
    assert list(recording.scores) == [f"model.layers.{i}.mlp" for i in range(3)]
    for name, scores in recording.scores.items():
        assert scores.shape == (1, 4, EXPERTS)
        assert scores.requires_grad
        assert recording.mask(name) is None
    llama(rows()[0][None])
    assert recording.scores[name].shape == (1, 4, EXPERTS)
    assert all(not layer.kept_in for layer in sparse_layers(llama).values())


def test_dense_mode_records_ones(llama):
    with lte.record_scores(llama) as recording, lte.track_sparsity(llama) as meter:
        llama(rows()[0][None])
    assert all((scores == 1).all() for scores in recording.scores.values())
    assert meter.overall == 0


def test_positional_arguments_are_understood(llama):
    batch = padded("right")
    with lte.record_scores(llama) as recording:
        llama(batch["input_ids"], batch["attention_mask"])
    assert torch.equal(recording.mask("model.layers.0.mlp"), batch["attention_mask"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["dense", "soft", "hard"])
def test_a_padded_batch_measures_what_its_rows_do_one_by_one(llama, mode, side):
    lte.set_mode_(llama, mode)
    with torch.no_grad(), lte.track_sparsity(llama) as together:
        llama(**padded(side))
    with torch.no_grad(), lte.track_sparsity(llama) as apart:
        for row in rows():
            llama(row[None])
    assert together.by_layer == pytest.approx(apart.by_layer, abs=1e-6)
    assert together.overall == pytest.approx(sum(together.by_layer) / 3, abs=1e-6)
    if mode == "dense":
        assert together.overall == 0
    else:
        assert 0.2 < together.overall < 0.8


def test_the_losses_of_a_padded_batch_are_those_of_its_rows(llama):
    lte.set_mode_(llama, "soft")
    name = "model.layers.1.mlp"
    with torch.no_grad(), lte.record_scores(llama) as recording:
        llama(**padded("left"))
        together = lte.efficiency_loss(recording.scores[name], recording.mask(name))
        apart = 0
        for row in rows():
            llama(row[None])
            apart += lte.efficiency_loss(recording.scores[name]) * len(row) / sum(LENGTHS)
    torch.testing.assert_close(together, apart)


def test_tokens_put_in_front_of_the_mask_count(llama):
    masks = TokenMasks(llama)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    masks.see(llama, (), {"attention_mask": mask})
    expected = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    assert torch.equal(masks.of("model.layers.0.mlp", torch.Size([2, 5])), expected)
    assert torch.equal(masks.of("model.layers.0.mlp", torch.Size([10])), expected.flatten())
    assert torch.equal(masks.of("model.layers.0.mlp", torch.Size([2, 1])), mask[:, -1:])


def test_sparsity_is_a_count_of_scores_up_to_tau(llama):
    lte.set_mode_(llama, "hard")
    with torch.no_grad(), lte.record_scores(llama) as recording, lte.track_sparsity(llama) as meter:
        llama(**padded("right"))
        mask = padded("right")["attention_mask"].bool()
        by_hand = [(scores[mask] <= 0.5).float().mean().item() for scores in recording.scores.values()]
    assert meter.by_layer == pytest.approx(by_hand)


def test_meter_before_any_forward_pass(llama):
    with lte.track_sparsity(llama) as meter:
        pass
    assert meter.by_layer == []
    assert meter.overall != meter.overall


def test_a_meter_takes_in_another_one(llama):
    lte.set_mode_(llama, "hard")
    first, second, third = rows()
    with torch.no_grad(), lte.track_sparsity(llama) as one:
        llama(first[None])
        llama(third[None])
    with torch.no_grad(), lte.track_sparsity(llama) as other:
        llama(second[None])
    with torch.no_grad(), lte.track_sparsity(llama) as together:
        for row in (first, second, third):
            llama(row[None])
    one.include(other)
    assert one.by_layer == pytest.approx(together.by_layer, abs=1e-7)
    assert one.overall == pytest.approx(together.overall, abs=1e-7)


def test_nested_recordings_all_see_everything(llama):
    lte.set_mode_(llama, "hard")
    with lte.record_scores(llama) as outer:
        with lte.track_sparsity(llama) as first, lte.record_scores(llama) as inner:
            llama(rows()[0][None])
            assert all(outer.scores[name] is inner.scores[name] for name in outer.scores)
        llama(rows()[1][None])
    assert outer.scores["model.layers.0.mlp"].shape[1] == 4
    assert inner.scores["model.layers.0.mlp"].shape[1] == 9
    assert 0 < first.overall < 1


def test_a_forward_pass_that_fails_is_not_counted(llama):
    lte.set_mode_(llama, "hard")
    with lte.track_sparsity(llama) as meter:
        handle = llama.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama(rows()[0][None])
        assert meter.by_layer == []
        handle.remove()
        llama(rows()[0][None])
    assert len(meter.by_layer) == 3


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_gradient_checkpointing_gives_the_same_gradients(llama, mode):
    lte.set_mode_(llama, mode)
    llama.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(llama, "activation_checkpointing_enable", llama.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            assert llama.model.layers[0].gradient_checkpointing
        llama.zero_grad()
        batch = padded("right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with lte.record_scores(llama) as recording:
            loss = llama(**batch, labels=labels, use_cache=False).loss
            masks = [recording.mask(name) for name in recording.scores]
            scores = list(recording.scores.values())
            loss = loss + lte.efficiency_loss(scores, masks[0]) + lte.separability_loss(scores, 0.5, 1e-2, masks[0])
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in llama.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert any("router.weight" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_generation_with_a_cache_counts_every_step(llama):
    lte.set_mode_(llama, "hard")
    batch = padded("left")
    batch.pop("position_ids")
    with lte.track_sparsity(llama) as cached:
        generated = llama.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert generated.shape == (3, 9 + 4)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 3, dtype=torch.long)], dim=-1)
    with torch.no_grad(), lte.track_sparsity(llama) as at_once:
        llama(generated[:, :-1], attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    assert cached.by_layer == pytest.approx(at_once.by_layer, abs=1e-6)


def test_left_padded_generation_equals_each_prompt_alone(llama):
    lte.set_mode_(llama, "hard")
    batch = padded("left")
    batch.pop("position_ids")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = llama.generate(**batch, **options)[:, -8:]
    for row, found in zip(rows(), together, strict=True):
        alone = llama.generate(row[None], attention_mask=torch.ones(1, len(row)), **options)[0, -8:]
        assert found.tolist() == alone.tolist()


def test_encoder_and_decoder_have_their_own_masks(t5):
    lte.set_mode_(t5, "hard")
    source, target = padded("right"), padded("right", (3, 8, 5))
    labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    encoder = {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"]}
    with torch.no_grad(), lte.record_scores(t5) as recording, lte.track_sparsity(t5) as together:
        t5(**encoder, labels=labels)
        shapes = {name.split(".")[0]: recording.mask(name) for name in recording.scores}
    assert torch.equal(shapes["encoder"], source["attention_mask"])
    assert torch.equal(shapes["decoder"].long(), target["attention_mask"])
    with torch.no_grad(), lte.track_sparsity(t5) as apart:
        for row, goal in zip(rows(), rows((3, 8, 5)), strict=True):
            t5(row[None], labels=goal[None])
    assert together.by_layer == pytest.approx(apart.by_layer, abs=1e-6)
    assert together.overall == pytest.approx(apart.overall, abs=1e-6)


def test_generation_of_an_encoder_decoder_counts_the_encoder_once(t5):
    lte.set_mode_(t5, "hard")
    source = padded("right")
    inputs = {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"]}
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    with lte.track_sparsity(t5) as generating:
        generated = t5.generate(**inputs, **options)
    with torch.no_grad(), lte.track_sparsity(t5) as at_once:
        t5(**inputs, decoder_input_ids=generated[:, :-1])
    assert generating.by_layer == pytest.approx(at_once.by_layer, abs=1e-6)


def test_classification_in_chunks_of_the_sequence():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=48, pad_token_id=0, num_labels=3, **sizes)).eval()
    lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="random"))
    lte.set_mode_(model, "hard")
    batch = padded("right")
    del batch["position_ids"]
    sparsities = []
    for chunk in (0, 3):
        for layer in model.bert.encoder.layer:
            layer.chunk_size_feed_forward = chunk
        with torch.no_grad(), lte.track_sparsity(model) as meter:
            model(**batch, labels=torch.tensor([0, 1, 2]))
        sparsities.append(meter.by_layer)
    assert sparsities[0] == pytest.approx(sparsities[1], abs=1e-6)


def test_a_wrapped_model_is_understood(t5):
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = t5

        def forward(self, **kwargs):
            return self.module(**kwargs)

    lte.set_mode_(t5, "hard")
    wrapper, source, target = Wrapper(), padded("right"), padded("right", (3, 8, 5))
    inputs = {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"]}
    labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    with torch.no_grad(), lte.track_sparsity(wrapper) as wrapped, lte.track_sparsity(t5) as plain:
        wrapper(**inputs, labels=labels)
    assert wrapped.by_layer == plain.by_layer


def test_a_dense_model_has_nothing_to_record():
    with pytest.raises(ValueError, match="sparsify_"), lte.record_scores(torch.nn.Linear(2, 2)):
        pass


def test_the_decoder_of_a_classifier_reads_the_text_shifted_right():
    config = BartConfig(
        vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0, eos_token_id=2, dropout=0.0,
    )  # fmt: skip
    model = lte.sparsify_(BartForSequenceClassification(config).eval(), lte.LTEConfig(expert_size=8, grouping="random"))
    lte.set_mode_(model, "hard")
    ids = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 2
    found = []
    for padding in (1, 20):
        inputs = torch.nn.functional.pad(ids, (0, padding))
        with torch.no_grad(), lte.track_sparsity(model) as meter:
            model(inputs, attention_mask=inputs.ne(0).long(), labels=torch.zeros(2, dtype=torch.long))
        found.append(meter.by_layer)
    assert found[1] == pytest.approx(found[0], abs=1e-6)
