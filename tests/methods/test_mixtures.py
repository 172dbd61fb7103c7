"""The trained mixtures of experts on cases worked out by hand: who wins, with what weight, and what balance costs."""

import math
import threading

import pytest
import torch
from tiny_methods import batches, converted, logits
from tiny_models import SHAPES, relative_rms, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import lte
from lte.core.accounting import G
from lte.methods.noisy_topk import NoisyRouter
from lte.methods.sigma_moe import SigmaRouter
from lte.methods.topk_moe import TopKRouter
from lte.modules.mixture import balance_loss, record_balance
from lte.modules.recording import record_scores, sparse_layers
from lte.surgery.method import Method

AUTO = {"CausalLM": AutoModelForCausalLM, "MaskedLM": AutoModelForMaskedLM, "Seq2SeqLM": AutoModelForSeq2SeqLM}
METHODS = {
    "topk-moe": lte.TopKMoEConfig(expert_size=8, grouping="random"),
    "topk-moe-sigmoid": lte.TopKMoEConfig(expert_size=8, grouping="random", scores="sigmoid"),
    "noisy-topk": lte.NoisyTopKConfig(expert_size=8, grouping="coactivation"),
    "sigma-moe": lte.SigmaMoEConfig(expert_size=8),
}
LOGITS_TE = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])


def by_hand(router_class, method, k=2):
    """A router of three experts that gives :data:`LOGITS_TE` for the unit vectors of two dimensions."""
    router = router_class(method, 2, 3, k)
    router.reset()
    with torch.no_grad():
        router.weight.copy_(LOGITS_TE.T)
    return router


def run(router):
    """Weights, and the means of what its balance loss is made of, for the two tokens."""
    kept = []
    router.kept_in.append([threading.get_ident(), kept])
    weights_TE = router(torch.eye(2))
    return weights_TE.detach(), kept[0].detach().mean(1)


def test_softmax_top_k():
    weights_TE, means_SE = run(by_hand(TopKRouter, lte.TopKMoEConfig()))
    e = math.e  # of logits 2 and 1; of 3 and 0, where the tie goes to the lower index. Together k = 2
    assert weights_TE.flatten().tolist() == pytest.approx(
        [2 * e / (1 + e), 2 / (1 + e), 0, 2 / (1 + e**3), 2 * e**3 / (1 + e**3), 0]
    )
    assert means_SE[0].tolist() == [0.5, 0.5, 0]
    assert means_SE[1].tolist() == pytest.approx(LOGITS_TE.softmax(-1).mean(0).tolist())


def test_softmax_weights_that_add_up_to_one():
    weights_TE, _ = run(by_hand(TopKRouter, lte.TopKMoEConfig(weight_sum=1.0)))
    assert weights_TE.sum(-1).tolist() == pytest.approx([1, 1])


def test_sigmoid_top_k():
    weights_TE, means_SE = run(by_hand(TopKRouter, lte.TopKMoEConfig(scores="sigmoid"), k=1))
    assert weights_TE.flatten().tolist() == pytest.approx([1 / (1 + math.exp(-2)), 0, 0, 0, 1 / (1 + math.exp(-3)), 0])
    assert means_SE[1].sum().item() == pytest.approx(1)


def test_load_balancing_loss():
    router = by_hand(TopKRouter, lte.TopKMoEConfig(balance_weight=0.5))
    even = torch.full((2, 3), 1 / 3)
    assert router.balance_loss(even).item() == pytest.approx(0.5)  # times 1
    skewed = torch.tensor([[0.5, 0.5, 0.0], [0.6, 0.3, 0.1]])
    assert router.balance_loss(skewed).item() == pytest.approx(0.5 * 3 * (0.3 + 0.15))


def test_noisy_top_k_without_noise():
    router = by_hand(NoisyRouter, lte.NoisyTopKConfig(importance_weight=1.0, load_weight=0.0))
    router.eval()
    weights_TE, means_SE = run(router)
    assert weights_TE[0].tolist() == pytest.approx([2 * math.e / (1 + math.e), 2 / (1 + math.e), 0])
    assert means_SE[0].tolist() == pytest.approx((weights_TE.mean(0) / 2).tolist())
    deviation = math.log(2)  # softplus(0)
    # to stay in, experts 0 and 1 of the first token have to beat 0, the third expert; it has to beat 1, the second best
    first = [2 / deviation, 1 / deviation, -1 / deviation]
    second = [0.0, 3 / deviation, 0.0]
    likely = [0.5 * (1 + math.erf(z / math.sqrt(2))) for z in first + second]
    assert means_SE[1].tolist() == pytest.approx([(a + b) / 2 for a, b in zip(likely[:3], likely[3:], strict=True)])


def test_importance_and_load_loss():
    """(0, 1, 2): mean 1, variance 2 / 3."""
    router = by_hand(NoisyRouter, lte.NoisyTopKConfig(importance_weight=0.3, load_weight=0.6))
    assert router.balance_loss(torch.tensor([[0.0, 1.0, 2.0], [4.0, 4.0, 4.0]])).item() == pytest.approx(0.2)
    assert router.balance_loss(torch.tensor([[1.0, 1.0, 1.0], [0.0, 5.0, 10.0]])).item() == pytest.approx(0.4)


def test_noise_is_for_learning():
    router = by_hand(NoisyRouter, lte.NoisyTopKConfig())
    with torch.no_grad():
        router.noise.fill_(5.0)
    quiet_TE = router.eval()(torch.eye(2))
    torch.manual_seed(0)
    assert not torch.equal(router.train()(torch.eye(2)), quiet_TE)
    router.requires_grad_(False)  # as in the hard stage
    assert torch.equal(router(torch.eye(2)), quiet_TE)
    assert router.num_weights == 6  # the noise is not run in use


def test_sigma_moe():
    router = by_hand(SigmaRouter, lte.SigmaMoEConfig(entropy_weight=2.0)).eval()
    weights_TE, means_SE = run(router)
    assert weights_TE.flatten().tolist() == pytest.approx(
        [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1)), 0, 0.5, 1 / (1 + math.exp(-3)), 0]
    )
    assert means_SE[0].tolist() == pytest.approx(LOGITS_TE.softmax(-1).mean(0).tolist())
    assert router.balance_loss(torch.tensor([[0.5, 0.25, 0.25]])).item() == pytest.approx(2 * -1.5 * math.log(2))
    assert router.balance_loss(torch.tensor([[1.0, 0.0, 0.0]])).item() == 0


def test_expert_dropout():
    router = SigmaRouter(lte.SigmaMoEConfig(expert_dropout=0.5), 4, 100, 99)
    router.reset()
    torch.manual_seed(0)
    active = (router.train()(torch.randn(50, 4)) > 0).float().mean().item()
    assert active == pytest.approx(0.5, abs=0.03)
    assert ((router.eval()(torch.randn(50, 4)) > 0).sum(-1) == 99).all()


def test_sigma_moe_rows_start_alike():
    router = SigmaRouter(lte.SigmaMoEConfig(), 16, 5, 2)
    router.reset(generator=torch.Generator().manual_seed(0))
    assert router.weight.norm(dim=1).tolist() == pytest.approx([router.weight[0].norm().item()] * 5)


def test_padding_does_not_count():
    model = lte.sparsify_(tiny_model("llama"), METHODS["topk-moe"])
    lte.set_mode_(model, "soft")
    inputs = tiny_inputs("llama")
    found = []
    for ids in (inputs["input_ids"], torch.nn.functional.pad(inputs["input_ids"], (0, 5), value=9)):
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - 7))
        with record_scores(model) as recording, record_balance(sparse_layers(model)) as balance:
            model(input_ids=ids, attention_mask=mask)
        found.append(balance_loss(balance, recording).item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert not any(layer.router.kept_in for layer in sparse_layers(model).values())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "t5", "bert"])
def test_the_same_function_then_hard_saved_and_loaded(family, name, tmp_path):
    model = converted(family, METHODS[name])
    assert {layer.mode for layer in sparse_layers(model).values()} == {"dense"}
    assert relative_rms(logits(model, family), logits(tiny_model(family), family)) < 1e-5
    lte.set_mode_(model, "hard")
    with torch.no_grad(), lte.track_sparsity(model) as meter:
        for batch in batches(family, 2):
            model(**batch)
    assert meter.overall == 0.5
    found = logits(model, family)
    model.save_pretrained(tmp_path)
    loaded = AUTO[SHAPES[family][0]].from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, family), found)
    assert Method.from_dict(loaded.config.lte) == METHODS[name]


@pytest.mark.parametrize("name", METHODS)
def test_cost(name):
    model = lte.sparsify_(tiny_model("llama"), METHODS[name], data=batches("llama"))
    cost, dense = lte.cost_per_token(model, sparsity=0.75), lte.cost_per_token(tiny_model("llama"))
    assert cost.router_gflops == 2 * 2 * 8 * 32 / G
    assert cost.ffn_gflops == dense.ffn_gflops / 4
    assert cost.weight_bytes == round(4 * G / 2 * cost.gflops)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lte.TopKMoEConfig(target_sparsity=1), "target_sparsity is 1"),
        (lambda: lte.TopKMoEConfig(scores="best"), "scores is 'best', but it is one of softmax, sigmoid"),
        (lambda: lte.TopKMoEConfig(weight_sum=0), "weight_sum is 0"),
        (lambda: lte.TopKMoEConfig(balance_weight=-1), "balance_weight is -1"),
        (lambda: lte.NoisyTopKConfig(load_weight=-1), "load_weight is -1"),
        (lambda: lte.NoisyTopKConfig(importance_weight=-1), "importance_weight is -1"),
        (lambda: lte.SigmaMoEConfig(expert_dropout=1), "expert_dropout is 1"),
        (lambda: lte.SigmaMoEConfig(entropy_weight=-1), "entropy_weight is -1"),
        (lambda: lte.SigmaMoEConfig(grouping="best"), "grouping is 'best'"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("target", "message"), [(0.01, "closes none of 2 experts"), (0.9, "leaves none of 2 experts")])
def test_errors_before_the_first_change(target, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        lte.sparsify_(model, lte.SigmaMoEConfig(target_sparsity=target))
    assert not hasattr(model.config, "lte")
