"""TEAL: what is taken for 0 worked out by hand, thresholds, cost, saving and loading."""

import json

import pytest
import torch
from tiny_methods import batches, logits
from tiny_models import SHAPES, relative_rms, tiny_inputs, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlamaForCausalLM

import lte
from lte.core.accounting import G
from lte.evaluation.measuring import measure, spent
from lte.methods.teal_allocation import _allocate
from lte.modules.input_threshold import add_cut_
from lte.modules.recording import track_inputs
from lte.surgery.sites import linear_sites

FAMILIES = ["llama", "phi3", "gpt2", "opt", "bert"]


def converted(family, sparsity=0.5):
    return lte.teal_(tiny_model(family), lte.TEALConfig(sparsity, tokens=300), data=batches(family))


def by_hand():
    """3 inputs, 2 outputs, cut 1."""
    linear = nn.Linear(3, 2)
    add_cut_(linear)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        linear.bias.copy_(torch.tensor([0.5, -0.5]))
        linear.get_buffer("cut").fill_(1)
    return linear


def test_small_inputs_are_taken_for_0():
    linear = by_hand()
    x_TI = torch.tensor([[2.0, 0.5, -3.0], [1.0, -1.0, 0.0], [-1.5, 0.0, 0.0]])  # kept: 2 and -3; none; -1.5
    with track_inputs(linear, {"it": linear}) as meter:
        y_TO = linear(x_TI)
    assert y_TO.tolist() == [[2 - 9 + 0.5, 8 - 18 - 0.5], [0.5, -0.5], [-1.5 + 0.5, -6 - 0.5]]
    assert meter.by_linear == {"it": pytest.approx(6 / 9)}


def test_cut_0_changes_nothing():
    linear = by_hand()
    linear.get_buffer("cut").zero_()
    x_TI = torch.tensor([[2.0, 0.5, -3.0], [1.0, -1.0, 0.0]])
    assert torch.equal(linear(x_TI), nn.functional.linear(x_TI, linear.weight, linear.bias))


def test_what_is_not_a_number_is_not_hidden():
    assert by_hand()(torch.tensor([float("nan"), 0, 0])).isnan().all()


@torch.no_grad()
def test_thresholds_by_hand():
    """A layer's first pass: its threshold is the median of its inputs' sizes, padding left out."""
    dense, seen = tiny_model("llama"), []
    dense.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    for batch in batches("llama"):
        dense(**batch)
    real_TI = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches("llama"), strict=True)])[:300]
    attention = converted("llama").model.layers[0].self_attn  # nothing before it is sparse: both passes see the same
    assert attention.q_proj.cut == real_TI.abs().median()
    assert attention.q_proj.cut == attention.k_proj.cut == attention.v_proj.cut


@torch.no_grad()
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bert"])
def test_measured_is_what_was_asked_for(family, sparsity):
    model = converted(family, sparsity)
    with measure(model) as meter:
        for batch in batches(family):
            model(**batch)
    assert set(meter.by_linear) == {site.name for site in linear_sites(model, family)}
    assert all(abs(one - sparsity) < 0.05 for one in meter.by_linear.values()), meter.by_linear
    found, dense = spent(model, meter), lte.cost_per_token(tiny_model(family))
    assert found.sparsity == pytest.approx(sparsity, abs=0.03)
    assert found.layer_sparsity == pytest.approx([sparsity] * 2, abs=0.03)
    assert found.attention_sparsity == pytest.approx(sparsity, abs=0.03)
    assert found.gflops_per_token == pytest.approx((1 - sparsity) * dense.gflops, rel=0.06)
    assert found.gflops_per_token_dense == dense.gflops
    assert found.mode == "hard"


@torch.no_grad()
@pytest.mark.parametrize(("count", "rows", "off"), [(1, 32, 0.002), (8, 4, 0.03)])
def test_the_last_layer_of_a_deep_model_is_as_sparse_as_the_first(count, rows, off):
    """Each threshold is set behind layers that are sparse by then; over several batches it settles."""
    data = batches("llama", count, rows, length=48)
    model = lte.teal_(tiny_model("llama", num_hidden_layers=16), lte.TEALConfig(0.85), data=data)
    with measure(model) as meter:
        for batch in data:
            model(**batch)
    assert list(meter.by_linear.values()) == pytest.approx([0.85] * 7 * 16, abs=off)
    assert sum(meter.by_linear.values()) / len(meter.by_linear) == pytest.approx(0.85, abs=0.002)


@torch.no_grad()
def test_zeros_that_are_there_anyway_count():
    """OPT has ReLU: more of its down projection's inputs are 0 than the 10 % asked for, and none needs its weights."""
    model = converted("opt", 0.1)
    with measure(model) as meter:
        model(**batches("opt")[0])
    assert model.model.decoder.layers[0].fc2.cut == 0
    assert meter.by_linear["model.decoder.layers.0.fc2"] > 0.3
    assert meter.by_linear["model.decoder.layers.0.fc1"] == pytest.approx(0.1, abs=0.03)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bert"])
def test_greedy(family):
    """As sparse as uniform in the mean over a block's weights, layers differ, and blocks' outputs are nearer."""
    config = lte.TEALConfig(0.5, tokens=300, allocation="greedy")
    greedy = lte.teal_(tiny_model(family), config, data=batches(family))
    with measure(greedy) as meter:
        for batch in batches(family):
            greedy(**batch)
    assert lte.teal_cost(greedy, meter.by_linear).gflops == pytest.approx(lte.teal_cost(greedy, 0.5).gflops, rel=0.06)
    assert max(meter.by_linear.values()) - min(meter.by_linear.values()) > 0.1
    dense = tiny_model(family)
    errors = [
        sum((m(**b).logits - dense(**b).logits)[b["attention_mask"].bool()].square().sum() for b in batches(family))
        for m in (greedy, converted(family))
    ]
    assert errors[0] < errors[1]


def test_greedy_by_hand():
    """Two layers of as many weights; the second's outputs are multiplied by 100: only the first is made sparse."""
    first, second = by_hand(), by_hand()
    x_TI = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    for linear in (first, second):
        linear.get_buffer("cut").zero_()
    ranked = dict.fromkeys(("first", "second"), x_TI.abs().flatten().sort().values)
    found = _allocate(lambda: first(x_TI) + 100 * second(x_TI), {"first": first, "second": second}, ranked, 1 / 3)
    assert found == pytest.approx({"first": 2 / 3, "second": 0})
    assert first.cut == second.cut == 0


@torch.no_grad()
def test_padding_and_company_do_not_matter():
    """A row alone, in a batch, and padded on either side: the same logits and the same sparsity."""
    model, ids = converted("llama"), tiny_inputs("llama", rows=2, length=7)["input_ids"]
    with measure(model) as meter:
        alone = model(input_ids=ids[:1]).logits
    alone_sparsity = meter.by_linear
    short_and_long = torch.zeros(2, 10, dtype=torch.long)
    short_and_long[0, 3:], short_and_long[1] = ids[0], torch.arange(3, 13)
    mask = torch.ones_like(short_and_long)
    mask[0, :3] = 0
    left = model(input_ids=short_and_long, attention_mask=mask).logits[0, 3:]
    assert relative_rms(left, alone[0]) < 1e-5
    padded, mask = nn.functional.pad(ids[:1], (0, 4)), nn.functional.pad(torch.ones_like(ids[:1]), (0, 4))
    with measure(model) as meter:
        right = model(input_ids=padded, attention_mask=mask).logits[0, :7]
    assert relative_rms(right, alone[0]) < 1e-5
    assert meter.by_linear == pytest.approx(alone_sparsity)


@torch.no_grad()
def test_prefill_and_decode_agree():
    model, ids = converted("llama"), tiny_inputs("llama")["input_ids"]
    whole = model(input_ids=ids).logits
    cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    for i in range(3, 7):
        step = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        assert relative_rms(step.logits[:, 0], whole[:, i]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family, tmp_path):
    model, dense = converted(family), tiny_model(family)
    found = logits(model, family)
    assert relative_rms(found, logits(dense, family)) > 1e-3
    assert {n for n in model.state_dict() if not n.endswith(".cut")} == set(dense.state_dict())
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["base_model_type"]) == ("lte", family)
    assert saved["teal"] == {"target_sparsity": 0.5, "tokens": 300, "allocation": "uniform"}
    auto = AutoModelForCausalLM if SHAPES[family][0] == "CausalLM" else AutoModelForMaskedLM
    assert torch.equal(logits(auto.from_pretrained(tmp_path), family), found)


def test_bf16(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    lte.teal_(model, lte.TEALConfig(tokens=300), data=batches("llama"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == loaded.model.layers[0].mlp.down_proj.cut.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


def test_stock_classes_do_not_load_it(tmp_path):
    converted("llama").save_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError)):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_cost():
    """llama, two layers of D 32, F 64: attention 32 x (32 + 16 + 16 + 32) weights, FFN 3 x 32 x 64."""
    model = tiny_model("llama")
    attention, ffn = 2 * 32 * 96, 2 * 3 * 32 * 64
    cost = lte.teal_cost(model, 0.75)
    assert cost.attention_gflops == pytest.approx(2 * attention / 4 / G)
    assert cost.ffn_gflops == pytest.approx(2 * ffn / 4 / G)
    assert cost.gflops == pytest.approx(cost.attention_gflops + cost.ffn_gflops)
    assert cost.router_gflops == 0
    assert cost.weight_bytes == (attention + ffn) // 4 * 4  # a quarter, fp32
    by_linear = {site.name: float(site.name.endswith("down_proj")) for site in linear_sites(model, "llama")}
    assert lte.teal_cost(model, by_linear).ffn_gflops == pytest.approx(2 * ffn * 2 / 3 / G)
    assert lte.teal_cost(model, 0) == lte.cost_per_token(model)
    assert lte.cost_per_token(converted("llama")) == lte.cost_per_token(model)


def test_kept_inputs_get_gradient():
    linear = by_hand()
    x_TI = torch.tensor([[2.0, 0.5, -3.0]], requires_grad=True)
    linear(x_TI).sum().backward()
    assert x_TI.grad.tolist() == [[5.0, 0.0, 9.0]]
    assert linear.weight.grad.tolist() == [[2.0, 0.0, -3.0]] * 2


def relative_deberta():
    model = tiny_model("deberta-v2")
    model.config.update({"relative_attention": True, "share_att_key": True})
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lte.TEALConfig(50), "target_sparsity is 50, but it is the fraction of inputs"),
        (lambda: lte.TEALConfig(tokens=0), "tokens is 0"),
        (lambda: lte.TEALConfig(allocation="best"), "allocation is 'best', but it is one of uniform, greedy"),
        (
            lambda: lte.TEALConfig(0.97, allocation="greedy"),
            "greedy leaves at least 5% of a layer: give allocation='uniform'",
        ),
        (lambda: lte.teal_(relative_deberta(), lte.TEALConfig(), data=[{}]), "deberta-v2 puts embeddings of positions"),
        (
            lambda: lte.prune_(relative_deberta(), lte.WandaConfig(), data=[{}]),
            "deberta-v2 puts embeddings of positions",
        ),
        (
            lambda: lte.TEALConfig.from_dict({"sparsity": 0.5}),
            "unknown option sparsity for method 'teal': it has target_sparsity",
        ),
        (
            lambda: lte.TEALConfig.from_dict({"target_sparsity": "half"}),
            "'teal' has an option of the wrong type",
        ),
        (
            lambda: lte.teal_(tiny_model("llama"), lte.TEALConfig(), data=[]),
            "needs data, but the data is empty",
        ),
        (lambda: lte.teal_(tiny_model("t5"), lte.TEALConfig(), data=[]), "not for an encoder-decoder"),
        (lambda: lte.teal_(converted("llama"), lte.TEALConfig(), data=[]), "sparse already: load the dense checkpoint"),
        (lambda: lte.sparsify_(converted("llama"), lte.LTEConfig()), "sparse already: load the dense checkpoint"),
        (lambda: lte.calibrate_(converted("llama"), [{}], 0.4), "no sparse FFN but TEAL's thresholds"),
        (lambda: lte.teal_cost(tiny_model("llama"), 1.5), "sparsity is 1.5, but it is a fraction"),
        (lambda: lte.teal_cost(tiny_model("llama"), {}), "no sparsity given for 14 linear layers"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
