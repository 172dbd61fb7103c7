"""LTE's option ``attention_sparsity``: where thresholds are, when they act, how they are set, counted and kept."""

import json

import pytest
import torch
from tiny_methods import batches, logits
from tiny_models import SHAPES, tiny_inputs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import lte
from lte.core.accounting import G
from lte.evaluation.measuring import measure, spent
from lte.methods.lte.calibration import set_attention_cuts_
from lte.modules.input_threshold import cut_layers
from lte.surgery.convert import densify
from lte.surgery.sites import linear_sites

FAMILIES = ["llama", "phi3", "gpt2", "opt", "bert"]


def converted(family="llama", share=0.25, mode="hard"):
    """With routers that leave out about half of the experts, and thresholds set on data."""
    model = lte.sparsify_(tiny_model(family), lte.LTEConfig(expert_size=8, attention_sparsity=share))
    lte.set_mode_(model, "hard")
    set_attention_cuts_(model, batches(family))
    lte.set_mode_(model, mode)
    return model


def cuts(model):
    return {name: linear.get_buffer("cut").clone() for name, linear in cut_layers(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_of_attention_alone_have_thresholds(family):
    model = converted(family)
    assert set(cut_layers(model)) == {site.name for site in linear_sites(model, family) if not site.in_ffn}
    assert all(cut > 0 for cut in cuts(model).values())


@torch.no_grad()
@pytest.mark.parametrize("mode", ["dense", "soft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_act_in_mode_hard_alone(family, mode):
    """Thresholds that are set change nothing in modes dense and soft, bit for bit."""
    model, without = converted(family), converted(family, 0.0)
    assert not torch.equal(logits(model, family), logits(without, family))
    for one in (model, without):
        lte.set_mode_(one, mode)
    assert torch.equal(logits(model, family), logits(without, family))


def test_0_is_a_model_without_the_option():
    model = converted(share=0.0)
    assert model.config.lte == {"method": "lte", "expert_size": 8, "tau": 0.5, "seed": 0, "grouping": "kmeans"} | {
        "compensation_rank": 0,
        "target_sparsity": None,
        "mode": "hard",
    }
    assert not cut_layers(model)
    assert not any("cut" in name for name in model.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bert"])
def test_measured_is_what_was_asked_for(family):
    model = converted(family, 0.4)
    with measure(model) as meter:
        for batch in batches(family):
            model(**batch)
    assert meter.by_linear == pytest.approx(dict.fromkeys(cut_layers(model), 0.4), abs=0.03)
    found = spent(model, meter)
    assert found.attention_sparsity == pytest.approx(0.4, abs=0.02)
    expected = lte.cost_per_token(model, meter.by_layer, attention_sparsity=found.attention_sparsity)
    assert found.gflops_per_token == expected.gflops
    assert found.gflops_per_token < lte.cost_per_token(model, meter.by_layer).gflops
    assert found.layer_sparsity == meter.by_layer


@torch.no_grad()
def test_thresholds_and_shares_by_hand():
    """The first layer's threshold is the quantile of its inputs' sizes. Padding counts neither there nor in shares."""
    model, data, seen = converted(), batches("llama"), []
    q_proj = model.model.layers[0].self_attn.q_proj
    hook = q_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]), prepend=True)
    with lte.track_sparsity(model) as meter:
        for batch in data:
            model(**batch)
    hook.remove()
    real_TI = torch.cat([x_BTI[batch["attention_mask"].bool()] for x_BTI, batch in zip(seen, data, strict=True)])
    sizes = real_TI.abs().flatten()
    assert q_proj.cut == sizes.kthvalue(round(0.25 * len(sizes))).values
    found = meter.by_linear["model.layers.0.self_attn.q_proj"]
    assert found == pytest.approx((sizes <= q_proj.cut).float().mean().item(), rel=1e-6)
    other = [{**batch, "input_ids": batch["input_ids"] * batch["attention_mask"]} for batch in data]
    before = cuts(model)
    set_attention_cuts_(model, other)
    assert cuts(model) == before


@torch.no_grad()
def test_modes_without_thresholds_count_none():
    for mode in ("dense", "soft"):
        model = converted(mode=mode)
        with lte.track_sparsity(model) as meter:
            model(**batches("llama")[0])
        assert (meter.attention_sparsity, meter.by_linear) == (0.0, {})


def test_cost():
    """llama, two layers of D 32: attention has 32 x (32 + 16 + 16 + 32) weights."""
    model, attention = converted(share=0.25), 2 * 32 * 96
    whole, cost = lte.cost_per_token(model, 0.5), lte.LTEConfig(8, attention_sparsity=0.25).cost(model, 0.5)
    assert cost.attention_gflops == pytest.approx(2 * 0.75 * attention / G)
    assert whole.gflops - cost.gflops == pytest.approx(2 * 0.25 * attention / G)
    assert whole.weight_bytes - cost.weight_bytes == attention  # a quarter, fp32
    assert (whole.ffn_gflops, whole.router_gflops) == (cost.ffn_gflops, cost.router_gflops)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family, tmp_path):
    model = converted(family)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["lte"]["attention_sparsity"] == 0.25
    auto = AutoModelForCausalLM if SHAPES[family][0] == "CausalLM" else AutoModelForMaskedLM
    loaded = auto.from_pretrained(tmp_path)
    assert cuts(loaded) == cuts(model)
    assert torch.equal(logits(loaded, family), logits(model, family))


def test_calibration_sets_both():
    model, data = converted(), batches("llama", 16)
    with torch.no_grad():
        for cut in cut_layers(model).values():
            cut.get_buffer("cut").zero_()
    lte.calibrate_(model, data, 0.6)
    with torch.no_grad(), lte.track_sparsity(model) as meter:
        for batch in data:
            model(**batch)
    assert meter.overall == pytest.approx(0.6, abs=0.02)
    assert meter.attention_sparsity == pytest.approx(0.25, abs=0.02)


def test_a_calibration_that_fails_changes_nothing():
    model = converted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="a token that is not padding"):
        lte.calibrate_(model, [{"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.zeros(2, 4)}], 0.5)
    model.model.layers[1].mlp.router.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        lte.calibrate_(model, batches("llama"), 0.5)
    model.model.layers[1].mlp.router.weight.data[0, 0] = before["model.layers.1.mlp.router.weight"][0, 0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_an_optimised_model_decodes_alike():
    model, ids = converted(), tiny_inputs("llama")["input_ids"]
    expected = model(input_ids=ids).logits
    lte.optimize_(model)
    assert torch.allclose(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    wanted = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(lte.generate(model, {"input_ids": ids}, max_new_tokens=6, do_sample=False), wanted)


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, for which a GPU is waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_pass_does_not_wait():
    counts = []
    for share in (0.25, 0.0):
        model = converted(share=share)
        with Reads() as reads:
            model(input_ids=tiny_inputs("llama")["input_ids"])
        counts.append(reads.count)
    assert counts[0] == counts[1]


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_pass():
    """It is one graph. A new threshold needs no new program, and a mode has its own."""
    model, ids = converted(), tiny_inputs("llama")["input_ids"]
    expected = model(input_ids=ids).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(input_ids=ids).logits, expected)
    for cut in cut_layers(model).values():
        cut.get_buffer("cut").fill_(1e9)
    assert torch.equal(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
    lte.set_mode_(model, "dense")
    assert torch.equal(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


@torch.no_grad()
def test_densify_leaves_thresholds_out():
    model = converted()
    plain = densify(model)
    assert not any("cut" in name for name in plain.state_dict())
    lte.set_mode_(model, "dense")
    assert torch.equal(logits(plain, "llama"), logits(model, "llama"))


def relative_deberta():
    model = tiny_model("deberta-v2")
    model.config.update({"relative_attention": True, "share_att_key": True})
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lte.LTEConfig(attention_sparsity=25), "attention_sparsity is 25, but it is the fraction of"),
        (lambda: lte.LTEConfig(attention_sparsity=1.0), "attention_sparsity is 1.0, but it is the fraction of"),
        (lambda: converted("t5"), "attention_sparsity is for models with one stack of blocks, not for an encoder-dec"),
        (
            lambda: lte.sparsify_(relative_deberta(), lte.LTEConfig(8, attention_sparsity=0.25)),
            "deberta-v2 puts embeddings of positions",
        ),
        (
            lambda: lte.cost_per_token(tiny_model("llama"), 0.5, 8, attention_sparsity=2.0),
            "attention_sparsity is 2.0, but it is a fraction",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
