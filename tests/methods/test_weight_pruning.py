"""Wanda and magnitude pruning: which weights become 0, worked out by hand."""

import pytest
import torch
from tiny_methods import batches, logits
from tiny_models import tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lte
from lte.evaluation.measuring import measure, spent
from lte.methods.weight_pruning import _kept

SCORES = torch.tensor([[1.0, 5.0, 2.0, 6.0], [9.0, 3.0, 8.0, 4.0]])


@pytest.mark.parametrize(
    ("config", "by_row", "kept"),
    [
        (lte.MagnitudeConfig(0.5), False, [[0, 1, 0, 1], [1, 0, 1, 0]]),  # of the whole matrix
        (lte.MagnitudeConfig(0.25), False, [[0, 1, 0, 1], [1, 1, 1, 1]]),
        (lte.WandaConfig(0.25), True, [[0, 1, 1, 1], [1, 0, 1, 1]]),  # of each row
        (lte.WandaConfig(0.5, "1:2"), True, [[0, 1, 0, 1], [1, 0, 1, 0]]),
        (lte.WandaConfig(0.75, "1:4"), True, [[0, 0, 0, 1], [1, 0, 0, 0]]),
        (lte.WandaConfig(0.01), True, [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ],
)
def test_what_is_kept(config, by_row, kept):
    assert _kept(SCORES, config, by_row).int().tolist() == kept


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wanda_by_hand(family):
    """|w| times the length of its input over the tokens that are not padding; half of each output's weights go."""
    dense, seen = tiny_model(family), []
    down = dense.model.layers[1].mlp.down_proj if family == "llama" else dense.transformer.h[1].mlp.c_proj
    down.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    for batch in batches(family):
        dense(**batch)
    real_TI = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, batches(family), strict=True)])
    rows_OI = down.weight if family == "llama" else down.weight.T
    scores_OI = rows_OI.abs() * real_TI.norm(dim=0)
    kept = scores_OI > scores_OI.median(dim=1, keepdim=True).values  # of an even number it is the lower one
    model = lte.prune_(tiny_model(family), lte.WandaConfig(), data=batches(family))
    down = model.model.layers[1].mlp.down_proj if family == "llama" else model.transformer.h[1].mlp.c_proj
    assert torch.equal(down.weight if family == "llama" else down.weight.T, rows_OI * kept)


@pytest.mark.parametrize("config", [lte.WandaConfig(0.5), lte.WandaConfig(0.5, "2:4"), lte.MagnitudeConfig(0.5, "4:8")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "phi3"])
def test_only_the_blocks_and_just_so_many(family, config):
    model = lte.prune_(tiny_model(family), config, data=batches(family))
    assert lte.weight_sparsity(model) == pytest.approx(0.5, abs=1e-3)
    dense = tiny_model(family).state_dict()
    for name, value in model.state_dict().items():
        changed = not torch.equal(value, dense[name])
        in_a_block = ".layer" in name or ".h." in name
        assert changed == (in_a_block and value.ndim == 2), name


@pytest.mark.parametrize("config", [lte.MagnitudeConfig(0.5), lte.WandaConfig(0.3)])
def test_weights_of_equal_size_do_not_go_together(config):
    """bf16 has few numbers: many weights are as large as the last that goes."""
    rows_OI = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = _kept(rows_OI.float().abs(), config, by_row=isinstance(config, lte.WandaConfig))
    dropped = [round(0.5 * kept.numel())] if config.name == "magnitude" else [round(0.3 * 512)] * 512
    assert kept.view(len(dropped), -1).logical_not().sum(1).tolist() == dropped
    assert rows_OI.abs()[kept].min() >= rows_OI.abs()[~kept].max() or config.name == "wanda"


def test_the_model_stays_stock(tmp_path):
    model = lte.prune_(tiny_model("llama"), lte.WandaConfig(0.5, "2:4"), data=batches("llama"))
    assert type(model) is LlamaForCausalLM
    assert lte.cost_per_token(model) == lte.cost_per_token(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))
    assert lte.weight_sparsity(loaded) == 0.5
    assert loaded.config.pruning == {"method": "wanda", "target_sparsity": 0.5, "pattern": "2:4", "tokens": 4096}


def test_inputs_that_are_never_there_go_first():
    """Wanda drops weights of an input that is always 0, however large; magnitude does not."""
    models = {}
    for config in (lte.WandaConfig(0.25), lte.MagnitudeConfig(0.25)):
        model = tiny_model("llama")
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.up_proj.weight[:16], layer.mlp.up_proj.bias[:16] = 0, 0  # 16 of 64 neurons are 0
                layer.mlp.down_proj.weight[:, :16] = 100
        models[type(config)] = lte.prune_(model, config, data=batches("llama")).model.layers[0].mlp.down_proj.weight
    assert (models[lte.WandaConfig][:, :16] == 0).all()
    assert (models[lte.WandaConfig][:, 16:] != 0).all()
    assert (models[lte.MagnitudeConfig][:, :16] == 100).all()


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.2, "4:5"), (0.3, "7:10"), (0.6667, "1:3")])
def test_a_pattern_agrees_with_its_sparsity_to_rounding(sparsity, pattern):
    assert lte.WandaConfig(sparsity, pattern).pattern == pattern


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lte.WandaConfig(1.5), "target_sparsity is 1.5"),
        (lambda: lte.WandaConfig(0.5, "4:2"), "pattern is '4:2', but it keeps N of every M"),
        (lambda: lte.WandaConfig(0.5, "half"), "pattern is 'half'"),
        (lambda: lte.WandaConfig(0.6, "2:4"), "pattern 2:4 is a sparsity of 0.5, but target_sparsity is 0.6"),
        (lambda: lte.WandaConfig(tokens=0), "tokens is 0"),
        (lambda: lte.prune_(tiny_model("llama"), lte.WandaConfig()), "this WandaConfig needs data"),
        (lambda: lte.prune_(tiny_model("llama"), lte.WandaConfig(), data=[]), "data is empty"),
        (lambda: lte.prune_(tiny_model("t5"), lte.WandaConfig(), data=[tiny_inputs("t5")]), "use MagnitudeConfig"),
        (lambda: lte.prune_(tiny_model("llama"), lte.MagnitudeConfig(0.8, "1:5")), "which pattern 1:5 does not divide"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_zeros_cost_nothing(family):
    dense = lte.cost_per_token(tiny_model(family)).gflops
    for model, share in [(tiny_model(family), 0.0), (lte.prune_(tiny_model(family), lte.MagnitudeConfig(0.75)), 0.75)]:
        with measure(model) as meter:
            logits(model, family)
        found = spent(model, meter)
        assert (found.sparsity, found.gflops_per_token_dense) == (0, dense)
        assert found.weight_sparsity == pytest.approx(share, abs=1e-3)
        assert found.gflops_per_token == pytest.approx((1 - share) * dense, rel=1e-2)


def test_a_sparse_model_is_refused():
    for model in (
        lte.sparsify_(tiny_model("llama"), lte.LTEConfig(expert_size=8)),
        lte.teal_(tiny_model("llama"), lte.TEALConfig(), data=batches("llama")),
    ):
        with pytest.raises(ValueError, match="sparse already: load the dense checkpoint to convert it"):
            lte.prune_(model, lte.MagnitudeConfig())
