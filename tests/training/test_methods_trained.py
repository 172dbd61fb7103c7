"""LTETrainer with methods other than LTE: a dense stage, then their own way of choosing."""

import math

import pytest
import torch
from tiny_training import arguments, dense_llama, markov_blocks
from transformers import TrainerCallback

import lte
from lte.data.batches import PackedBlocks
from lte.modules.recording import sparse_layers, track_sparsity
from lte.surgery.convert import install_routers_
from lte.surgery.stages import StagePlan
from lte.training.arguments import LTETrainingArguments
from lte.training.trainer import LTETrainer

MIXTURES = {
    "topk-moe": lte.TopKMoEConfig(expert_size=8, grouping="random"),
    "sigmoid": lte.TopKMoEConfig(expert_size=8, grouping="random", scores="sigmoid"),
    "noisy-topk": lte.NoisyTopKConfig(expert_size=8, grouping="random"),
    "sigma-moe": lte.SigmaMoEConfig(expert_size=8, grouping="random"),
}
POST_HOC = {
    "cats": lte.CATSConfig(tokens=500),
    "deja-vu": lte.DejaVuConfig(tokens=500, fit_epochs=2),
    "moefication": lte.MoEficationConfig(expert_size=8, grouping="random", tokens=500, fit_epochs=2),
    "static-pruning": lte.StaticPruningConfig(tokens=500),
    "relufication": lte.ReLUficationConfig(tokens=500, target_sparsity=0.7),
}
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in LTETrainingArguments.__dataclass_fields__
)


class Routers(TrainerCallback):
    """The stage, and copies of the routers, at the end of every step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        state_dict = self.trainer.model.state_dict()
        self.seen.append((self.trainer.stage, {n: v.clone() for n, v in state_dict.items() if ".router." in n}))

    def changed(self, stage, name):
        first, *_, last = [routers for one, routers in self.seen if one == stage]
        return any(not torch.equal(first[key], last[key]) for key in first if key.endswith(name))


def trained(folder, method, data=None, **overrides):
    model = install_routers_(dense_llama(), method)
    usual = {"max_steps": 60, "learning_rate": 1e-2, "target_sparsity": method.target_sparsity}
    routers = Routers()
    trainer = LTETrainer(
        model,
        args=arguments(folder, **{**usual, **overrides}),
        train_dataset=markov_blocks(1500) if data is None else data,
        data_collator=PackedBlocks.collator,
        callbacks=[routers],
    )
    routers.trainer = trainer
    trainer.train()
    return trainer, routers


@torch.no_grad()
def judged(trainer):
    """Loss and sparsity by layer on rows that it has not seen."""
    model = trainer.model.eval()
    with track_sparsity(model) as meter:
        loss = model(**PackedBlocks.collator(list(markov_blocks(100, seed=9)))).loss.item()
    return loss, meter.by_layer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("start", ["fitted", "random"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_learns(tmp_path, name, start):
    trainer, routers = trained(tmp_path, MIXTURES[name], router_start=start)
    assert trainer.stages.plan == StagePlan(15, 39, 6)
    loss, by_layer = judged(trainer)
    assert loss < 0.75 * math.log(64)
    assert by_layer == [0.5, 0.5]
    assert {layer.mode for layer in sparse_layers(trainer.model).values()} == {"hard"}
    assert not routers.changed("dense", "weight")
    assert routers.changed("soft", "router.weight")
    assert routers.changed("soft", "router.bias")
    assert not routers.changed("hard", "")
    if name == "noisy-topk":
        assert routers.changed("soft", "router.noise")
    tasks = logged(trainer, "task_loss")
    assert sum(tasks[-5:]) < sum(tasks[:5])
    balance = logged(trainer, "balance_loss")
    assert len(balance) == 39
    assert all(map(math.isfinite, balance))
    assert not logged(trainer, "eta")
    assert logged(trainer, "sparsity")[-1] == pytest.approx(0.5)


def test_the_balance_loss_is_part_of_the_loss(tmp_path):
    method = lte.TopKMoEConfig(expert_size=8, grouping="random", balance_weight=3.0)
    trainer, _ = trained(tmp_path, method, max_steps=4, distillation_weight=0.0, dense_fraction=0.0)
    soft = [entry for entry in trainer.state.log_history if "balance_loss" in entry]
    assert len(soft) == 3
    for entry in soft:
        assert entry["balance_loss"] > 2.9  # 1 where all are used alike
        assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["balance_loss"], rel=1e-3)


def test_balance_keeps_experts_in_use(tmp_path):
    """The more the loss counts, the nearer all experts come to being used alike."""
    spread = {}
    for weight in (0.0, 1.0):
        method = lte.TopKMoEConfig(expert_size=8, grouping="random", balance_weight=weight, target_sparsity=0.75)
        trainer, _ = trained(tmp_path, method)
        with torch.no_grad(), lte.record_scores(trainer.model.eval()) as recording:
            trainer.model(**PackedBlocks.collator(list(markov_blocks(100, seed=9))))
        used_LE = torch.stack([(scores > 0).float().flatten(0, -2).mean(0) for scores in recording.scores.values()])
        spread[weight] = used_LE.std(dim=1).mean().item()
    assert spread[1.0] < 0.8 * spread[0.0]


@pytest.mark.parametrize("name", POST_HOC)
def test_dense_then_hard(tmp_path, name):
    trainer, routers = trained(tmp_path, POST_HOC[name])
    assert trainer.stages.plan == StagePlan(15, 0, 45)
    assert [stage for stage, _ in routers.seen] == ["dense"] * 15 + ["hard"] * 45
    loss, by_layer = judged(trainer)
    assert loss < 0.75 * math.log(64)
    assert by_layer == pytest.approx([POST_HOC[name].target_sparsity] * 2, abs=0.03)
    for one in ("weight", "down", "up", "mix", "kept_F"):
        assert not routers.changed("hard", f"router.{one}")
    assert routers.changed("hard", "router.cut") == (name in ("cats", "deja-vu", "relufication"))
    assert not logged(trainer, "balance_loss")
    assert len(logged(trainer, "distillation_loss")) == 45


@pytest.mark.parametrize("name", ["deja-vu", "noisy-topk"])
def test_a_run_is_resumed(tmp_path, name):
    method = {**POST_HOC, **MIXTURES}[name]
    saving = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    data = markov_blocks(200)
    whole, _ = trained(tmp_path / "a", method, data, **saving)
    model = install_routers_(dense_llama(), method)
    again = LTETrainer(
        model,
        args=arguments(tmp_path / "b", learning_rate=1e-2, **saving),
        train_dataset=data,
        data_collator=PackedBlocks.collator,
    )
    again.train(str(tmp_path / "a" / "checkpoint-6"))
    expected = whole.model.state_dict()
    for key, value in again.model.state_dict().items():
        assert torch.allclose(value, expected[key], atol=1e-6), key


@pytest.mark.parametrize("name", MIXTURES)
def test_gradient_checkpointing_changes_nothing(tmp_path, name):
    data, found = markov_blocks(100), []
    for checkpointing in (False, True):
        usual = {"max_steps": 4, "hard_fraction": 0.0, CHECKPOINTING: checkpointing}
        trainer, _ = trained(tmp_path / str(checkpointing), MIXTURES[name], data, **usual)
        found.append(logged(trainer, "loss") + logged(trainer, "balance_loss"))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_what_is_refused(tmp_path):
    model = install_routers_(dense_llama(), lte.CATSConfig())
    with pytest.raises(ValueError, match=r"made for target_sparsity 0\.5, but the arguments ask for 0\.7"):
        LTETrainer(model, args=arguments(tmp_path, target_sparsity=0.7))
    with pytest.raises(ValueError, match="schedule='paper' trains LTE's routers, not those of cats"):
        LTETrainer(model, args=arguments(tmp_path, schedule="paper", eta=0.5))
    with pytest.raises(ValueError, match="leave the hard stage no step"):
        StagePlan.without_soft(3, 0.9)
