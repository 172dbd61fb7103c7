"""Moving a model to another sparsity by its routers' biases."""

import copy

import pytest
import torch
from tiny_training import dense_llama, markov_blocks, sparse_llama
from torch.utils.data import DataLoader
from transformers import T5Config, T5ForConditionalGeneration

import lte
from lte.methods.lte import calibration
from lte.methods.lte.calibration import calibrate_
from lte.modules.recording import sparse_layers


def hard_llama(**overrides):
    """Routers that differ between layers, and are not centred."""
    model = sparse_llama(initializer_range=0.3, **overrides)
    for index, layer in enumerate(sparse_layers(model).values()):
        layer.router.weight.data.mul_(2 + index)
        layer.router.bias.data.copy_(torch.linspace(0.2, 1.2, layer.router.num_experts))
    lte.set_mode_(model, "hard")
    return model


def hard_t5():
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = lte.sparsify_(T5ForConditionalGeneration(config).eval(), lte.LTEConfig(expert_size=8, grouping="random"))
    lte.set_mode_(model, "hard")
    return model


def padded_batches(count: int = 3, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 64, (4, 24), generator=generator)
        lengths = torch.randint(5, 25, (4, 1), generator=generator)
        mask = (torch.arange(24) < lengths).long()
        batches.append({"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask})
    return batches


@torch.no_grad()
def sparsity(model, batches) -> float:
    was_training = model.training
    model.eval()
    with lte.track_sparsity(model) as meter:
        for batch in batches:
            model(**batch)
    model.train(was_training)
    return meter.overall


def state(model) -> dict:
    layers = sparse_layers(model).values()
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
        "layers": [(layer.tau, layer.mode, layer.kept_in, len(layer.router._forward_hooks)) for layer in layers],
        "config": copy.deepcopy(model.config.to_dict()),
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
    }


def same_but_biases(model, before: dict, target: float | None = None) -> None:
    """The config says which sparsity the thresholds are set for: ``target``, or as before."""
    after = state(model)
    then = before["config"]["lte"].pop("target_sparsity")
    assert after["config"]["lte"].pop("target_sparsity") == (then if target is None else target)
    tensors = after.pop("tensors")
    assert tensors.keys() == before["tensors"].keys()
    for name, value in tensors.items():
        assert name.endswith("router.bias") or torch.equal(value, before["tensors"][name]), name
    assert after == {name: value for name, value in before.items() if name != "tensors"}


@pytest.mark.parametrize("target", [0.01, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("tau", [0.5, 0.3])
def test_the_target_is_met_and_nothing_else_changes(target, tau):
    model = hard_llama()
    for layer in sparse_layers(model).values():
        layer.tau = tau
    model.train()
    model.model.layers[0].eval()  # as where a part is frozen
    before, batches = state(model), padded_batches()
    shift = calibrate_(model, batches, target)
    same_but_biases(model, before, target)
    for layer, name in zip(sparse_layers(model).values(), (n for n in before["tensors"] if "bias" in n), strict=True):
        assert torch.allclose(layer.router.bias, before["tensors"][name] - shift, atol=1e-5)
    assert sparsity(model, batches) == pytest.approx(target, abs=0.005)


def test_rows_that_were_not_calibrated_on_have_the_target_too():
    model, data = hard_llama(), markov_blocks(128)
    parts = [DataLoader(data.select(range(first, 128, 2)), 8, collate_fn=data.collator) for first in (0, 1)]
    calibrate_(model, parts[0], 0.6)
    assert sparsity(model, parts[1]) == pytest.approx(0.6, abs=0.01)


def test_there_and_back_again():
    model, batches = hard_llama(), padded_batches()
    before = sparsity(model, batches)
    there = calibrate_(model, batches, 0.8, passes=4)
    assert there + calibrate_(model, batches, before, passes=4) == pytest.approx(0, abs=0.05)


def test_taus_of_layers_may_differ():
    model, batches = hard_llama(), padded_batches()
    for layer, tau in zip(sparse_layers(model).values(), (0.3, 0.8), strict=True):
        layer.tau = tau
    calibrate_(model, batches, 0.6)
    active = [scores for scores in _scores(model, batches[0]).values()]
    assert len(active) == 2
    idle = sum((one <= tau).sum() for one, tau in zip(active, (0.3, 0.8), strict=True))
    assert idle / sum(one.numel() for one in active) == pytest.approx(0.6, abs=0.06)


@torch.no_grad()
def _scores(model, batch) -> dict[str, torch.Tensor]:
    with lte.record_scores(model) as recording:
        model(**batch)
        return {name: scores[recording.mask(name).bool()] for name, scores in recording.scores.items()}


def test_padding_does_not_count():
    batch = padded_batches(1)[0]
    rows = [
        {name: value[i : i + 1, : int(batch["attention_mask"][i].sum())] for name, value in batch.items()}
        for i in range(4)
    ]
    junk = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 63)}
    shifts = [calibrate_(hard_llama(), given, 0.6) for given in (rows, [batch], [junk])]
    assert shifts == pytest.approx([shifts[0]] * 3, abs=1e-4)


def test_scores_that_a_sigmoid_cannot_tell_apart():
    model, batches = hard_llama(), padded_batches()
    for layer in sparse_layers(model).values():
        layer.router.weight.data.mul_(100)
    calibrate_(model, batches, 0.97)
    assert sparsity(model, batches) == pytest.approx(0.97, abs=0.01)


def test_equal_logits_fall_on_the_nearer_side(caplog):
    model, batches = hard_llama(), padded_batches()
    for index, layer in enumerate(sparse_layers(model).values()):
        layer.router.weight.data.zero_()
        layer.router.bias.data.fill_(float(index))
    calibrate_(model, batches, 0.505)
    assert not caplog.records
    assert sparsity(model, batches) == 0.5
    calibrate_(model, batches, 0.9)
    assert "many router logits are equal" in caplog.records[0].message
    assert sparsity(model, batches) == 1


@pytest.mark.parametrize(
    ("values", "share", "cut", "below"),
    [
        ([3.0, 1.0, 2.0, 4.0], 0.5, 2.5, 0.5),
        ([1.0, 1.0, 1.0, 2.0], 0.5, 1.5, 0.75),
        ([1.0, 2.0, 2.0, 2.0], 0.4, 1.5, 0.25),
        ([1.0, 1.0], 0.1, 0.5, 0.0),
        ([1.0, 1.0], 0.9, 1.5, 1.0),
        ([1.0], 0.5, 1.5, 1.0),
    ],
)
def test_cut(values, share, cut, below):
    assert calibration._cut(torch.tensor(values), share) == (cut, below)


def test_a_sample_of_the_logits_will_do(monkeypatch):
    model, data = hard_llama(), markov_blocks(128)
    monkeypatch.setattr(calibration, "_MAX_LOGITS", 8_000)  # of 65,536, of experts that differ much
    for layer in sparse_layers(model).values():
        layer.router.bias.data.copy_(torch.linspace(-9, 9, layer.router.num_experts))
    batches = list(DataLoader(data, 16, collate_fn=data.collator))
    assert len(calibration._margins(model, batches)) == pytest.approx(8_000, rel=0.2)
    calibrate_(model, batches, 0.6)
    assert sparsity(model, batches) == pytest.approx(0.6, abs=0.01)


def test_half_precision():
    model, batches = hard_llama().bfloat16(), padded_batches()
    before = state(model)
    calibrate_(model, batches, 0.7, passes=3)
    same_but_biases(model, before, 0.7)
    assert sparsity(model, batches) == pytest.approx(0.7, abs=0.01)


def test_encoder_and_decoder():
    model = hard_t5()
    batches = [
        {**batch, "labels": batch["input_ids"][:, :9].where(batch["attention_mask"][:, :9].bool(), -100)}
        for batch in padded_batches()
    ]
    calibrate_(model, batches, 0.7)
    assert sparsity(model, batches) == pytest.approx(0.7, abs=0.01)


def test_an_optimised_model_stays_one():
    plain, optimised = hard_llama(), lte.optimize_(hard_llama(), "reference")
    batches = padded_batches()
    classes = [type(layer) for layer in sparse_layers(optimised).values()]
    assert calibrate_(optimised, batches, 0.6) == pytest.approx(calibrate_(plain, batches, 0.6), abs=1e-3)
    assert [type(layer) for layer in sparse_layers(optimised).values()] == classes
    assert sparsity(optimised, batches) == pytest.approx(0.6, abs=0.005)
    with torch.no_grad():
        assert torch.allclose(optimised(**batches[0]).logits, plain(**batches[0]).logits, atol=1e-3)


def refused(model, batches, target, said, **options) -> None:
    before = state(model) if hasattr(model, "config") and hasattr(model.config, "lte") else None
    with pytest.raises(ValueError, match=said) as error:
        calibrate_(model, batches, target, **options)
    assert "\n" not in str(error.value)
    if before is not None:
        same_but_biases(model, before)
        biases = {name: value for name, value in model.state_dict().items() if name.endswith("router.bias")}
        assert all(torch.equal(value, before["tensors"][name]) for name, value in biases.items())


def test_what_is_refused():
    batches = padded_batches(1)
    refused(hard_llama(), [], 0.5, "at least one batch")
    refused(hard_llama(), batches, 0.5, "at least one pass", passes=0)
    for target in (0, 1, -0.1, 50, float("nan")):
        refused(hard_llama(), batches, target, "must lie between 0 and 1")
    refused(dense_llama(), batches, 0.5, "call lte.sparsify_")
    for mode in ("dense", "soft"):
        model = hard_llama()
        lte.set_mode_(model, mode)
        refused(model, batches, 0.5, f"in mode {mode}")
    model = hard_llama()
    next(iter(sparse_layers(model).values())).tau = 0.0
    refused(model, batches, 0.5, "tau is not between")
    empty = {**batches[0], "attention_mask": torch.zeros_like(batches[0]["attention_mask"])}
    refused(hard_llama(), [empty], 0.5, "only padding")


def test_a_failure_leaves_the_model_as_it_was():
    model = hard_llama().train()
    before, batches = state(model), padded_batches(2)

    def fail(_module, _args):
        if model.count:
            raise KeyError("a batch that does not fit")
        model.count += 1

    model.count = 0
    with model.lm_head.register_forward_pre_hook(fail), pytest.raises(KeyError):
        calibrate_(model, batches, 0.9)
    same_but_biases(model, before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before["tensors"][name]), name
    damaged = hard_llama()
    layer = list(sparse_layers(damaged).values())[1]
    layer.router.weight.data[0, 0] = float("nan")
    bias = layer.router.bias.clone()
    with pytest.raises(ValueError, match="not finite"):
        calibrate_(damaged, batches, 0.5)
    assert torch.equal(layer.router.bias, bias)
