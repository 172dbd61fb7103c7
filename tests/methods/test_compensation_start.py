"""Compensation that starts at what fitted routers leave out."""

import pytest
import torch
from test_router_start import batches
from tiny_training import DEPENDENT, dense_llama, make_dependent_, markov_blocks, trainer_for

import lte
from lte.methods.lte.compensation_start import fit_compensations_
from lte.methods.router_start import TOKENS_PER_INPUT, fit_routers_
from lte.modules.recording import sparse_layers


def model_of(rank: int, d_model: int = 32):
    config = lte.LTEConfig(expert_size=8, grouping="random", compensation_rank=rank)
    return lte.sparsify_(dense_llama(hidden_size=d_model), config)


def seen_by(model, run):
    """The first layer with its inputs, and the neurons, of a pass over data."""
    layer, inputs, neurons = next(iter(sparse_layers(model).values())), [], []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1))),
        layer.down_proj.register_forward_pre_hook(lambda _, args: neurons.append(args[0].flatten(0, 1))),
    ]
    run()
    for hook in hooks:
        hook.remove()
    return layer, torch.cat(inputs), torch.cat(neurons)


@torch.no_grad()
def test_full_rank_is_the_regression_and_a_lower_one_its_best_part():
    errors = {}
    for rank in (0, 2, 8, 32, 40):
        model = model_of(rank or 1)
        fit_routers_(model, batches(), bias=1.0)
        layer, x_TD, hidden_TF = seen_by(model, lambda m=model: fit_compensations_(m, batches(), 0.7))
        count = TOKENS_PER_INPUT * 33
        x_TD, hidden_TF = x_TD[:count].double(), hidden_TF[:count].double()
        logits = layer.router.logits(x_TD.float())
        first = logits[: len(batches()[0]["input_ids"]) * 16]  # the threshold is that of the first batch
        idle = logits < first.flatten().kthvalue(1 + int(0.7 * first.numel())).values
        left_out = hidden_TF * idle.repeat_interleave(8, -1) @ layer.down_proj.weight.double().T
        assert idle.float().mean() == pytest.approx(0.7, abs=0.03)
        added = layer.compensation(x_TD.float(), ~idle).double() if rank else 0.0
        errors[rank] = float((left_out - added).square().sum())
        if rank == 32:
            given = torch.nn.functional.pad(x_TD, (0, 1), value=1.0) * idle.double().mean(-1, keepdim=True)
            best = given @ torch.linalg.lstsq(given, left_out).solution
            assert errors[rank] == pytest.approx(float((left_out - best).square().sum()), rel=0.02)
    assert errors[0] > errors[2] > errors[8] > errors[32]
    assert errors[40] == pytest.approx(errors[32], rel=1e-3)  # more than the width brings nothing


@torch.no_grad()
def test_each_direction_begins_at_size_one():
    model = model_of(4)
    fit_routers_(model, batches(), bias=1.0)
    layer, x_TD, _ = seen_by(model, lambda: fit_compensations_(model, batches(), 0.5))
    x_TD = x_TD[: TOKENS_PER_INPUT * 33]
    one = layer.compensation
    idle = (layer.router.logits(x_TD) < 1.0).float().mean(-1, keepdim=True)  # about half: the mean is the bias
    size = ((x_TD @ one.compress.T + one.bias) * idle).square().mean(0).sqrt()
    assert size.tolist() == pytest.approx([1.0] * 4, abs=0.15)


@pytest.mark.parametrize("start", ["fitted", "random"])
def test_it_trains_in_the_soft_and_hard_stage(tmp_path, start):
    seen = {}
    trainer = trainer_for(
        tmp_path, model_of(4), markov_blocks(400), max_steps=20, router_start=start, hard_fraction=0.3
    )
    layer = next(iter(sparse_layers(trainer.model).values()))
    step = trainer.stages.begin_step

    def begin_step(number):
        step(number)
        trains = layer.compensation.expand.requires_grad
        seen.setdefault(trainer.stage, (trains, layer.compensation.expand.detach().clone()))

    trainer.stages.begin_step = begin_step
    trainer.train()
    assert {stage: trains for stage, (trains, _) in seen.items()} == {"dense": False, "soft": True, "hard": True}
    assert bool(seen["soft"][1].any()) == (start == "fitted")
    assert not torch.equal(seen["soft"][1], seen["hard"][1])
    assert not torch.equal(seen["hard"][1], layer.compensation.expand)


@torch.no_grad()
@pytest.mark.parametrize("kind", DEPENDENT)
def test_inputs_that_depend_on_each_other(kind):
    model, data = model_of(4), batches(rows=50)
    make_dependent_(model, data, kind)
    fit_routers_(model, data, bias=2.0)
    fit_compensations_(model, data, 0.5)
    assert all(one.isfinite().all() for one in model.parameters())


@torch.no_grad()
def test_finite_weights_may_leave_out_infinities():
    model, data = model_of(4), batches(rows=50)
    fit_routers_(model, data, bias=2.0)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.mul_(1e25)
    mlp.down_proj.weight.mul_(1e25)
    with pytest.raises(ValueError, match="what FFNs are given and leave out has become NaN or infinite"):
        fit_compensations_(model, data, 0.5)
