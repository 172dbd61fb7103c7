"""Lean optimizers: routers keep a group of their own, and a run resumes."""

import pytest
import torch
from test_resume import Stop, StopAfter, by_step
from tiny_training import sparse_llama, trainer_for

from lte.modules.recording import sparse_layers

LOW_RANK = {"optim_target_modules": "all-linear", "optim_args": "rank=4,update_proj_gap=3"}
OPTIMIZERS = [
    ("adamw_torch_8bit", {}),
    ("galore_adamw", LOW_RANK),
    ("apollo_adamw", LOW_RANK),
    ("adafactor", {}),
]
PACKAGES = {"galore_adamw": "galore_torch", "apollo_adamw": "apollo_torch", "adamw_torch_8bit": "torchao"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of those libraries
@pytest.mark.parametrize(("optim", "options"), OPTIMIZERS)
def test_routers_have_an_ordinary_group_and_a_run_resumes(tmp_path, optim, options):
    if optim in PACKAGES:
        pytest.importorskip(PACKAGES[optim])
    whole = trainer_for(tmp_path / "whole", optim=optim, **options)
    whole.create_optimizer()
    routers = [layer.router for layer in sparse_layers(whole.model).values()]
    held = {id(p): group for group in whole.optimizer.param_groups for p in group["params"]}
    for router in routers:
        for parameter in router.parameters():
            assert float(held[id(parameter)]["lr"]) == pytest.approx(whole.args.router_learning_rate)
            assert "rank" not in held[id(parameter)]
    if options:
        assert held[id(whole.model.model.layers[0].mlp.up_proj.weight)]["rank"] == 4
    assert len(held) == sum(1 for _ in whole.model.parameters())
    before = [router.weight.clone() for router in routers]
    whole.train()
    assert not any(torch.equal(one, router.weight) for one, router in zip(before, routers, strict=True))
    saving = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(Stop):
        trainer_for(tmp_path / "cut", callbacks=[StopAfter(7)], optim=optim, **saving, **options).train()
    again = trainer_for(tmp_path / "cut", optim=optim, **saving, **options)
    again.train(resume_from_checkpoint=True)
    assert by_step(again, "loss") == pytest.approx(by_step(whole, "loss"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_bf16_weights_move_by_stochastic_rounding(tmp_path):
    """Steps of 1e-5 are far below half a unit in the last place of bf16, so nearest rounding would lose all of them."""
    pytest.importorskip("torchao")
    changed = {}
    for rounds in (True, False):
        model = sparse_llama().bfloat16()
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        options = {"optim": "adamw_torch_8bit", "optim_args": f"bf16_stochastic_round={rounds}"}
        trainer = trainer_for(tmp_path / str(rounds), model, learning_rate=1e-5, schedule="dense", **options)
        trainer.train()
        name = "model.embed_tokens.weight"
        changed[rounds] = (model.state_dict()[name] != before[name]).float().mean()
    assert changed[True] > 2 * changed[False]


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "lomo", "adalomo"])
def test_steps_in_the_backward_pass_are_refused(tmp_path, optim):
    with pytest.raises(ValueError, match="routers would not learn"):
        trainer_for(tmp_path, optim=optim)
