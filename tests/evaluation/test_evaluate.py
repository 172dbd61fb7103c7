"""evaluate() against a computation by hand."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lte
from lte.data.batches import PackedBlocks, PaddedRows, PaddingCollator
from lte.evaluation.evaluate import evaluate

torch.set_num_threads(1)
TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def llama(sparse: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.3, pad_token_id=0)).eval()
    if sparse:
        lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="random"))
        lte.set_mode_(model, "hard")
    return model


def rows(lengths: tuple[int, ...] = (12, 5, 9, 7, 3)) -> PaddedRows:
    """The first two labels of each row are ignored, as a prompt's."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 64, (n,), generator=generator).numpy() for n in lengths]
    labels = [one.copy() for one in ids]
    for one in labels:
        one[:2] = -100
    return PaddedRows({"input_ids": ids, "labels": labels}, PaddingCollator(0))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("sparse", [True, False])
def test_perplexity_by_hand(sparse, batch_size):
    model, dataset = llama(sparse), rows()
    total = count = 0
    for row in dataset:
        logits = model(input_ids=row["input_ids"][None]).logits[0]
        total += sum(-logits[i - 1].log_softmax(-1)[row["labels"][i]].item() for i in range(2, len(logits)))
        count += len(logits) - 2
    found = evaluate(model, dataset, batch_size)
    assert found.num_tokens == count
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.accuracy is None
    assert found.mode == ("hard" if sparse else "dense")


def test_logits_of_one_pass_are_bounded(monkeypatch):
    model, dataset = llama(), rows()
    at_once = evaluate(model, dataset, 8)
    monkeypatch.setattr("lte.evaluation.evaluate._MAX_LOGITS", 2 * max(map(len, dataset.columns["labels"])) * 64)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    in_parts = evaluate(model, dataset, 8)
    handle.remove()
    assert max(seen) == 2
    assert in_parts.loss == pytest.approx(at_once.loss, rel=1e-6)
    assert (in_parts.sparsity, in_parts.num_tokens) == (pytest.approx(at_once.sparsity, abs=1e-6), at_once.num_tokens)


def test_entries_that_have_no_row_for_each_stay_whole(monkeypatch):
    monkeypatch.setattr("lte.evaluation.evaluate._MAX_LOGITS", 1)  # a row at a time
    model, dataset = llama(), rows((6, 6, 6))
    expected = evaluate(model, dataset, 3).loss
    collate = dataset.collator
    dataset.collator = lambda some: {**collate(some), "position_ids": torch.arange(6)[None]}
    assert evaluate(model, dataset, 3).loss == pytest.approx(expected, rel=1e-6)


def test_sparsity_is_what_track_sparsity_measures():
    model, dataset = llama(), rows()
    with lte.track_sparsity(model) as meter:
        for row in dataset:  # without padding
            model(input_ids=row["input_ids"][None])
    found = evaluate(model, dataset, 3)
    assert found.sparsity == pytest.approx(meter.overall, abs=1e-6)
    assert found.layer_sparsity == pytest.approx(meter.by_layer, abs=1e-6)
    assert 0.2 < found.sparsity < 0.8
    assert len(set(found.layer_sparsity)) == 2


def test_cost_is_that_of_the_layers_sparsity():
    model = llama()
    found = evaluate(model, rows())
    assert found.gflops_per_token == lte.cost_per_token(model, found.layer_sparsity).gflops
    assert found.gflops_per_token_dense == lte.cost_per_token(model, 0.0).gflops
    assert found.gflops_per_token != found.gflops_per_token_dense


def test_mode_soft_computes_every_expert():
    model = llama()
    lte.set_mode_(model, "soft")
    found = evaluate(model, rows())
    assert 0.2 < found.sparsity < 0.8
    assert found.gflops_per_token == lte.cost_per_token(model, 0.0, router=True).gflops > found.gflops_per_token_dense


def test_a_model_that_sees_what_it_has_to_predict_is_refused():
    with pytest.raises(ValueError, match=r"perplexity asks for the next token.*, not a bert"):
        evaluate(BertForMaskedLM(BertConfig(**TINY, pad_token_id=0)), rows())


def test_outputs_that_are_not_finite_are_refused():
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=2, pad_token_id=0)).eval()
    model.classifier.bias.data[1] = torch.nan
    ids = [torch.randint(1, 64, (3 + i,)).numpy() for i in range(4)]
    with pytest.raises(ValueError, match=r"outputs of the model .* are NaN or infinite"):
        evaluate(model, PaddedRows({"input_ids": ids, "labels": [0, 1, 0, 1]}, PaddingCollator(0), ("a", "b")))


@pytest.mark.parametrize("part", ["weight", "bias", "temperature"])
def test_a_router_that_is_no_number_does_not_count_as_idle(part):
    model = llama()
    router = model.model.layers[1].mlp.router
    with torch.no_grad():
        getattr(router, part).view(-1)[0] = math.nan
    with pytest.raises(ValueError, match=rf"first model\.layers\.1\.mlp\.router\.{part}"):
        evaluate(model, rows())


def test_a_threshold_that_is_no_number_does_not_count_as_idle():
    model = llama(sparse=False)
    batches = [{"input_ids": torch.arange(20)[None]}]
    lte.teal_(model, lte.TEALConfig(), batches)
    model.model.layers[0].self_attn.q_proj.cut.fill_(math.inf)
    with pytest.raises(ValueError, match=r"first model\.layers\.0\.self_attn\.q_proj\.cut"):
        evaluate(model, rows())


def test_a_perplexity_that_is_no_number_is_refused():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluate(model, rows())


def test_a_dense_model_has_no_sparsity():
    model = llama(sparse=False)
    found = evaluate(model, rows())
    assert (found.sparsity, found.layer_sparsity) == (0.0, [])
    assert found.gflops_per_token == found.gflops_per_token_dense


def test_packed_blocks():
    model = llama()
    blocks = PackedBlocks(torch.randint(1, 64, (100,)).numpy().astype("uint16"), 16)
    ids = PackedBlocks.collator(list(blocks))["input_ids"]
    expected = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    found = evaluate(model, blocks, 4)
    assert found.num_tokens == 6 * 15
    assert found.loss == pytest.approx(expected, rel=1e-5)


def test_accuracy_of_a_classifier():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=3, pad_token_id=0, initializer_range=0.5))
    lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="random"))
    lte.set_mode_(model.eval(), "hard")
    ids = [torch.randint(1, 64, (3 + i,)).numpy() for i in range(9)]
    logits = torch.cat([model(input_ids=torch.from_numpy(one)[None]).logits for one in ids]).detach()
    right = logits.argmax(-1)
    labels = [int(c) if i % 3 else (int(c) + 1) % 3 for i, c in enumerate(right)]
    dataset = PaddedRows({"input_ids": ids, "labels": labels}, PaddingCollator(0), ("a", "b", "c"))
    found = evaluate(model, dataset, 4)
    assert found.accuracy == pytest.approx(6 / 9)
    assert found.perplexity is None
    assert found.num_tokens == 9
    assert found.loss == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-4)


def test_every_number_of_a_regression_counts():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=1, pad_token_id=0)).eval()
    ids, labels = [torch.randint(1, 64, (3 + i,)).numpy() for i in range(4)], [0.25, -100.0, 4.75, 1.5]
    whole = PaddedRows({"input_ids": ids, "labels": labels}, PaddingCollator(0), ("score",))
    predicted = torch.cat([model(input_ids=torch.from_numpy(one)[None]).logits[:, 0] for one in ids]).detach()
    for dataset, kept in ((whole, slice(0, 4)), (whole.select([0, 1, 2]), slice(0, 3))):
        found = evaluate(model, dataset, 2)
        assert found.num_tokens == kept.stop
        assert found.loss == pytest.approx(F.mse_loss(predicted[kept], torch.tensor(labels)[kept]).item(), rel=1e-4)


def test_the_model_is_left_as_it_was():
    model = llama().train()
    evaluate(model, rows())
    assert model.training
    assert all(not layer.kept_in for layer in model.modules() if hasattr(layer, "kept_in"))


def test_no_label():
    dataset = PaddedRows({"input_ids": [[1, 2, 3]], "labels": [[-100] * 3]}, PaddingCollator(0))
    with pytest.raises(ValueError, match="no label"):
        evaluate(llama(), dataset)
