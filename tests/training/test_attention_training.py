"""Training with ``attention_sparsity``: when thresholds are set and act, and how a run is resumed."""

import pytest
import torch
from test_resume import SAVING, Stop, StopAfter
from tiny_training import markov_blocks, sparse_llama, trainer_for
from transformers import AutoModelForCausalLM, TrainerCallback

from lte.evaluation.evaluate import evaluate
from lte.modules.input_threshold import cut_layers


class Cuts(TrainerCallback):
    """Keeps the thresholds of each step, and whether they acted."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        layers = cut_layers(model).values()
        self.steps.append(([float(one.get_buffer("cut")) for one in layers], {one.cutting for one in layers}))


def trained(folder, resume=False, callbacks=None, **overrides):
    trainer = trainer_for(folder, sparse_llama(attention_sparsity=0.25), callbacks=callbacks, **overrides)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Dense up to step 3, soft up to 9, hard up to 12."""
    seen = Cuts()
    return trained(tmp_path_factory.mktemp("whole"), callbacks=[seen], max_steps=12, hard_fraction=0.25), seen.steps


def test_thresholds_act_in_the_hard_stage(whole):
    trainer, steps = whole
    assert [acting for _, acting in steps] == [{False}] * 9 + [{True}] * 3
    assert all(set(cuts) == {0} for cuts, _ in steps[:9])
    assert all(cut > 0 for cuts, _ in steps[9:] for cut in cuts)
    found = evaluate(trainer.model, markov_blocks(40, seed=5))
    assert found.attention_sparsity == pytest.approx(0.25, abs=0.03)
    assert found.sparsity == pytest.approx(0.5, abs=0.05)


def test_without_a_target_they_are_set_on_training_rows_and_stay(tmp_path):
    seen = Cuts()
    paper = {"schedule": "paper", "eta": 0.1, "max_steps": 12}
    trainer = trained(tmp_path, callbacks=[seen], **paper)
    hard = [cuts for cuts, acting in seen.steps if acting == {True}]
    assert len(hard) == 3
    assert all(cuts == hard[0] for cuts in hard)
    assert evaluate(trainer.model, markov_blocks(40, seed=5)).attention_sparsity == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("step", [9, 11])  # 9 resumes where the hard stage begins
def test_resumed_with_the_same_thresholds(tmp_path, whole, step):
    with pytest.raises(Stop):
        trained(tmp_path, callbacks=[StopAfter(step)], hard_fraction=0.25, **SAVING)
    found = trained(tmp_path, True, hard_fraction=0.25, **SAVING).model.state_dict()
    expected = whole[0].model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6) for name, value in found.items())


def test_another_share_is_another_run(tmp_path):
    with pytest.raises(Stop):
        trained(tmp_path, callbacks=[StopAfter(3)], **SAVING)
    for other in (0.0, 0.5):
        trainer = trainer_for(tmp_path, sparse_llama(attention_sparsity=other), **SAVING)
        with pytest.raises(ValueError, match=f"method.attention_sparsity 0.25, and this one {other}"):
            trainer.train(resume_from_checkpoint=True)


def test_a_trained_model_is_trained_again(tmp_path, whole):
    """A second run starts without thresholds in its dense and soft stage, and ends with them."""
    whole[0].model.save_pretrained(tmp_path / "model")
    model, seen = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), Cuts()
    trainer_for(tmp_path / "again", model, callbacks=[seen]).train()
    assert [acting for _, acting in seen.steps] == [{False}] * 11 + [{True}]
    assert model.config.lte["attention_sparsity"] == 0.25


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
def test_a_compiled_run_is_the_same_run(tmp_path):
    """Thresholds are set, switched and recorded under compiled blocks."""
    found = []
    for name, options in {"eager": {}, "compiled": {"torch_compile": True, "torch_compile_backend": "eager"}}.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = trained(tmp_path / name, max_steps=32, **options)
        evaluated = evaluate(trainer.plain, markov_blocks(40, seed=5))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append([*losses, evaluated.attention_sparsity, evaluated.sparsity, evaluated.loss])
        found[-1] += [float(one.get_buffer("cut")) for one in cut_layers(trainer.plain).values()]
    assert not torch._dynamo.utils.counters["graph_break"]
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-4)
