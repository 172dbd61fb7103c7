"""LTETrainer on a tiny llama: the three stages, what is logged, what moves, and what padding may not change."""

import copy
import math
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_training import TOKENS, arguments, dense_llama, markov_blocks, sparse_llama, trainer_for
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback

import lte
from lte.data.batches import PackedBlocks
from lte.modules.evaluating import evaluating
from lte.modules.recording import sparse_layers, track_sparsity
from lte.modules.step_log import StepLog
from lte.surgery.convert import install_routers_
from lte.surgery.experts import group, regroup_
from lte.surgery.sites import find_sites
from lte.training.trainer import LTETrainer


class Watch(TrainerCallback):
    """Copies of the routers at the end of every step, by stage."""

    def __init__(self):
        self.routers: dict[str, list[dict[str, torch.Tensor]]] = {"dense": [], "soft": [], "hard": []}
        self.trainer: LTETrainer | None = None

    def on_step_end(self, args, state, control, **kwargs):
        weights = {n: p.detach().clone() for n, p in self.trainer.model.named_parameters() if "router" in n}
        self.routers[self.trainer.stage].append(weights)

    def changed(self, stage: str, name: str) -> bool:
        first, *_, last = self.routers[stage]
        return any(not torch.equal(first[n], last[n]) for n in first if n.endswith(name))


def watched(folder, **overrides) -> tuple[LTETrainer, Watch]:
    watch = Watch()
    watch.trainer = trainer_for(folder, callbacks=[watch], **overrides)
    return watch.trainer, watch


def steps_logged(trainer):
    return [logs for logs in trainer.state.log_history if "loss" in logs]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One whole run at a target of 0.5."""
    trainer, watch = watched(
        tmp_path_factory.mktemp("run"), max_steps=80, learning_rate=1e-2, train_dataset=markov_blocks(1500)
    )
    trainer.train()
    return trainer, watch


def test_the_target_is_met_on_held_out_rows(run):
    trainer, _ = run
    model, held_out = trainer.model.eval(), markov_blocks(100, seed=9)
    assert all(layer.mode == "hard" for layer in sparse_layers(model).values())
    with track_sparsity(model) as meter, torch.no_grad():
        loss = model(**PackedBlocks.collator(list(held_out))).loss.item()
    assert meter.overall == pytest.approx(0.5, abs=0.02)
    assert loss < 0.75 * math.log(64)  # it learned something too
    assert trainer.evaluate(held_out)["eval_sparsity"] == pytest.approx(meter.overall, abs=1e-6)


def test_what_is_logged(run):
    trainer, _ = run
    logs = steps_logged(trainer)
    assert len(logs) == 80
    plan = trainer.stages.plan
    always = {"task_loss", "efficiency_loss", "separability_loss", "near_tau", "eta", "sparsity"}
    for step, entry in enumerate(logs):
        stage, _ = plan.at(step)
        if stage == "dense":
            assert not always & entry.keys()
            continue
        assert always <= entry.keys(), step
        layers = [entry["sparsity/layer_00"], entry["sparsity/layer_01"]]
        assert entry["sparsity"] == pytest.approx(sum(layers) / 2, abs=1e-6)
        assert 0 <= entry["near_tau"] <= 1
        assert entry["separability_loss"] > 1
        if stage == "hard":
            assert entry["loss"] == pytest.approx(0.1 * entry["task_loss"] + 0.9 * entry["distillation_loss"], rel=1e-3)
    assert logs[plan.dense]["sparsity"] < 0.25  # most experts start open


def test_router_weights_are_frozen_in_the_hard_stage_only(run):
    _, watch = run
    assert not watch.changed("dense", "router.weight")
    assert watch.changed("soft", "router.weight")
    assert watch.changed("soft", "router.bias")
    assert not watch.changed("hard", "router.weight")
    assert watch.changed("hard", "router.bias")  # calibration


def test_the_temperature_is_folded_away(run):
    trainer, _ = run
    assert all(layer.router.temperature == 1 for layer in sparse_layers(trainer.model).values())


@pytest.mark.parametrize(("ramp", "reached"), [(1.0, [0, 0.25, 0.5, 0.75]), (0.5, [0, 0.5, 1, 1])])
def test_the_temperature_ramps(tmp_path, ramp, reached):
    trainer = trainer_for(tmp_path, ramp=ramp, temperature=9.0, dense_fraction=0.0, hard_fraction=0.0)
    trainer.create_optimizer()
    trainer.create_scheduler(4)
    trainer.stages.begin(None)
    found = []
    for index in range(4):
        trainer.stages.begin_step(index)
        layer = next(iter(sparse_layers(trainer.model).values()))
        found.append(layer.router.temperature.item())
    assert found == [pytest.approx(9.0**share) for share in reached]


def test_rows_kept_out_of_training_are_compared_with_those_in_it(tmp_path):
    trainer, seen = trainer_for(tmp_path, max_steps=100, target_sparsity=0.5), []
    compare = trainer.training.compare

    def spied(sparsity, rows):
        compare(sparsity, rows)
        with evaluating(trainer.model), torch.no_grad(), track_sparsity(trainer.model) as meter:
            for batch in trainer.rows.held_out():
                trainer.model(**batch)
        seen.append(
            (float(trainer.training.controller.gap), meter.overall - float(sparsity), trainer.state.global_step)
        )

    trainer.training.compare = spied
    trainer.train()
    assert [step for *_, step in seen] == [40, 60, 80]
    for gap, expected, _ in seen:
        assert gap == pytest.approx(expected, abs=1e-6)


def test_the_paper_schedule(tmp_path):
    trainer, watch = watched(tmp_path, schedule="paper", eta=0.5)
    trainer.train()
    logs = steps_logged(trainer)
    assert {entry["eta"] for entry in logs if "eta" in entry} == {0.5}
    soft = [entry for step, entry in enumerate(logs) if trainer.stages.plan.at(step)[0] == "soft"]
    for entry in soft:
        extra = 0.5 * entry["efficiency_loss"] + 0.5 * entry["separability_loss"]
        assert entry["loss"] == pytest.approx(entry["task_loss"] + extra, rel=1e-3)
    assert trainer.distiller.teacher is None
    assert watch.changed("soft", "router.weight")
    for stages in watch.routers.values():
        for routers in stages:
            assert all((p == 0).all() for n, p in routers.items() if n.endswith("bias"))
    assert not watch.changed("hard", "router.weight")


def test_the_paper_schedule_ignores_calibration_rows(tmp_path):
    args = arguments(tmp_path, schedule="paper", eta=0.5, max_steps=4)
    trainer = LTETrainer(
        sparse_llama(),
        args,
        calibration_dataset=markov_blocks(4),
        train_dataset=markov_blocks(40),
        data_collator=PackedBlocks.collator,
    )
    trainer.train()
    assert all((layer.router.bias == 0).all() for layer in sparse_layers(trainer.model).values())


def test_the_dense_schedule_leaves_routers_alone(tmp_path):
    trainer, watch = watched(tmp_path, schedule="dense")
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert len(watch.routers["dense"]) == 12
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("router" in name), name
    assert all(layer.mode == "dense" for layer in sparse_layers(trainer.model).values())


@pytest.mark.parametrize("grouping", ["kmeans", "coactivation"])
def test_neurons_are_grouped_anew_on_the_dense_stages_model(tmp_path, grouping):
    """On the weights and neurons of then, without a change of the function or of the random state."""
    method, blocks = lte.LTEConfig(expert_size=8, grouping=grouping), markov_blocks(40)
    batch = PackedBlocks.collator(list(blocks))
    model = lte.sparsify_(dense_llama(), method, [batch])
    trainer = trainer_for(tmp_path, model=model, train_dataset=blocks, schedule="paper", eta=0.5)
    sites = find_sites(model, "llama")
    for site in sites:
        site.permute_neurons(torch.randperm(site.d_ff))
    orders = list(group(model, sites, method, trainer.rows.training()))
    expected = [site.first.weight[order] for site, order in zip(sites, orders, strict=True)]
    before, state = model(**batch).logits, torch.get_rng_state()
    with torch.no_grad():
        regroup_(model, method, trainer.rows.training())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(site.first.weight, other) for site, other in zip(sites, expected, strict=True))
    assert torch.allclose(model(**batch).logits, before, atol=1e-5)


@pytest.mark.parametrize(
    ("grouped", "dense_fraction", "times"),
    [(True, 0.0, 1), (True, 0.25, 2), (False, 0.25, 1), (False, 0.0, 1), (False, 0.001, 1)],
    ids=["before", "before and after dense", "after dense", "no dense stage", "a dense stage of no step"],
)
def test_neurons_are_never_left_ungrouped(tmp_path, monkeypatch, grouped, dense_fraction, times):
    called = []
    monkeypatch.setattr(
        lte.LTEConfig, "group", lambda *given, real=lte.LTEConfig.group: called.append(1) or real(*given)
    )
    convert_ = lte.sparsify_ if grouped else install_routers_
    model = convert_(dense_llama(), lte.LTEConfig(expert_size=8))
    assert ("grouped" in model.config.lte) != grouped
    trainer_for(tmp_path, model=model, max_steps=8, dense_fraction=dense_fraction).train()
    assert len(called) == times
    assert "grouped" not in model.config.lte


def test_routers_have_their_own_learning_rate_and_decay(tmp_path):
    trainer = trainer_for(tmp_path, router_learning_rate=0.02, router_weight_decay=0.3, weight_decay=0.05)
    groups = trainer.create_optimizer().param_groups
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == set(names.values())
    assert sum(len(g["params"]) for g in groups) == len(found)
    for name, (lr, decay) in found.items():
        if name.endswith("router.weight"):
            assert (lr, decay) == (0.02, 0.3)
        elif name.endswith("router.bias"):
            assert (lr, decay) == (0.02, 0.0)
        else:
            assert lr == 1e-3
            assert decay == (0.0 if "norm" in name else 0.05), name


def soft_trainer(folder, **overrides) -> LTETrainer:
    """A trainer in the soft stage, before its first step."""
    trainer = trainer_for(
        folder, schedule="paper", **{"eta": 0.7, "dense_fraction": 0.0, "separability_floor": 1e-2, **overrides}
    )
    trainer.create_optimizer()
    trainer.create_scheduler(4)
    trainer.stages.begin(None)
    trainer.stages.begin_step(0)
    for layer in sparse_layers(trainer.model).values():
        layer.router.weight.data.mul_(4)
    return trainer


def step(trainer: LTETrainer, batches: list[dict[str, torch.Tensor]]) -> tuple[dict, dict[str, torch.Tensor]]:
    """What is logged of one optimizer step, and its gradients."""
    trainer.model.zero_grad()
    trainer.training.log = StepLog()
    trainer.current_gradient_accumulation_steps = len(batches)
    items = sum(batch["labels"][:, 1:].ne(-100).sum() for batch in batches)
    total = sum(trainer.training_step(trainer.model, dict(b), items).item() for b in batches)
    trainer.stages.end_step()
    logged = {name: torch.stack(list(values)).mean().item() for name, values in trainer.training.log.noted.items()}
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return {**logged, "loss": total}, gradients


def same(one, other):
    logs, gradients = one
    assert logs == pytest.approx(other[0], rel=1e-4, abs=1e-6)
    assert gradients.keys() == other[1].keys()
    for name, gradient in gradients.items():
        expected = other[1][name]
        assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name


def batch_of(rows: int, seed: int = 5) -> dict[str, torch.Tensor]:
    batch = PackedBlocks.collator(list(markov_blocks(rows, seed)))
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def padded(batch, left: int, right: int):
    """Junk under attention mask 0 and labels -100."""
    junk = torch.randint(3, 64, (len(batch["input_ids"]), left + right), generator=torch.Generator().manual_seed(1))
    fills = {"input_ids": junk, "labels": torch.full_like(junk, -100), "attention_mask": torch.zeros_like(junk)}
    return {n: torch.cat([fills[n][:, :left], value, fills[n][:, left:]], 1) for n, value in batch.items()}


@pytest.mark.parametrize("stage", ["soft", "hard"])
@pytest.mark.parametrize("teaching", [{}, {"feature_distillation_weight": 1.0}])
def test_padding_changes_nothing(tmp_path, stage, teaching):
    trainer = soft_trainer(tmp_path, **teaching)
    if stage == "hard":
        trainer.stages.enter("hard")
    batch = batch_of(4)
    plain = step(trainer, [batch])
    assert plain[0]["sparsity"] > 0.1
    same(step(trainer, [padded(batch, 0, 7)]), plain)


def test_padding_of_each_row_changes_nothing(tmp_path):
    """Rows of different lengths in one batch: the same as their tokens counted one row at a time."""
    trainer = soft_trainer(tmp_path)
    batch = batch_of(2)
    batch["attention_mask"][1, 5:] = 0
    batch["labels"][1, 5:] = -100
    found, _ = step(trainer, [batch])
    alone = [
        step(trainer, [{n: v[i : i + 1, :size] for n, v in batch.items()}])[0] for i, size in ((0, TOKENS), (1, 5))
    ]
    for name in ("efficiency_loss", "separability_loss", "near_tau", "sparsity", "sparsity/layer_01"):
        mean = (TOKENS * alone[0][name] + 5 * alone[1][name]) / (TOKENS + 5)
        assert found[name] == pytest.approx(mean, rel=1e-4), name


def test_gradient_accumulation_equals_one_large_batch(tmp_path):
    trainer = soft_trainer(tmp_path)
    batch = batch_of(8)
    batch["labels"][4:, :9] = -100  # labels are counted over both halves together
    halves = [{n: v[:4] for n, v in batch.items()}, {n: v[4:] for n, v in batch.items()}]
    whole, accumulated = step(trainer, [batch]), step(trainer, halves)
    same(accumulated, whole)


def test_gradient_accumulation_through_train(tmp_path):
    weights = []
    for size, accumulate in ((8, 1), (4, 2)):
        trainer = trainer_for(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, optim="sgd", max_steps=4
        )
        trainer.train()
        weights.append((trainer.model.state_dict(), steps_logged(trainer)))
    for name, value in weights[0][0].items():
        assert torch.allclose(value, weights[1][0][name], rtol=1e-4, atol=1e-4), name
    for one, other in zip(weights[0][1], weights[1][1], strict=True):
        for name in one.keys() - {"grad_norm", "epoch"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("teaching", [{}, {"feature_distillation_weight": 5.0}])
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, teaching):
    plain = soft_trainer(tmp_path, **teaching)
    checkpointed = soft_trainer(tmp_path, gradient_checkpointing=True, **teaching)
    kwargs = checkpointed.args.gradient_checkpointing_kwargs
    word = "activation" if hasattr(checkpointed.model, "activation_checkpointing_enable") else "gradient"  # renamed
    getattr(checkpointed.model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": kwargs})
    batch = batch_of(4)
    same(step(checkpointed, [batch]), step(plain, [batch]))


def test_gradient_checkpointing_trains(tmp_path):
    weights = []
    for given in ({}, {"gradient_checkpointing": True}):
        trainer = trainer_for(tmp_path, max_steps=4, **given)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.allclose(value, weights[1][name], atol=1e-5) for name, value in weights[0].items())


def test_distillation_is_kl_to_the_dense_model(tmp_path):
    trainer = soft_trainer(tmp_path, distillation_weight=1.0, eta=0.0, separability_weight=0.0)
    batch = batch_of(4)
    batch["labels"][0, :9] = -100
    with torch.no_grad():
        student, teacher = (
            m.train()(input_ids=batch["input_ids"]).logits for m in (trainer.model, trainer.distiller.teacher)
        )
    keep = batch["labels"][:, 1:].ne(-100)
    p, q = (one[:, :-1][keep].log_softmax(-1) for one in (teacher, student))
    assert step(trainer, [batch])[0]["loss"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)


def relative_error(student: torch.Tensor, teacher: torch.Tensor) -> float:
    return ((student - teacher).square().sum(-1) / teacher.square().sum(-1)).mean().item()


@torch.no_grad()
def hidden_states(trainer: LTETrainer, batch, part: str = "") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every block: the student's, the teacher's."""
    outputs = [model(**batch, output_hidden_states=True) for model in (trainer.model, trainer.distiller.teacher)]
    return list(zip(*(output[f"{part}hidden_states"][1:] for output in outputs), strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_teacher_has_the_precision_of_training(tmp_path, bf16):
    trainer = trainer_for(tmp_path, dense_fraction=0.25, bf16=bf16)
    trainer.train()
    assert {p.dtype for p in trainer.distiller.teacher.parameters()} == {torch.bfloat16 if bf16 else torch.float32}
    assert {b.dtype for n, b in trainer.distiller.teacher.named_buffers() if "inv_freq" in n} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("stage", ["soft", "hard"])
def test_feature_distillation_is_the_error_of_the_blocks(tmp_path, stage):
    """Alone, without KL; over two batches of an accumulated step it is their mean."""
    weights = {"feature_distillation_weight": 3.0, "distillation_weight": 0.0, "eta": 0.0, "separability_weight": 0.0}
    trainer = soft_trainer(tmp_path, **weights)
    if stage == "hard":
        trainer.stages.enter("hard")
    batches = [batch_of(4), batch_of(4, seed=6)]
    errors = [relative_error(*pair) for batch in batches for pair in hidden_states(trainer, batch)]
    assert len(errors) == 2 * 2
    logged, gradients = step(trainer, batches)
    assert logged["feature_distillation_loss"] == pytest.approx(sum(errors) / 4, rel=1e-4)
    assert logged["feature_distillation_loss"] > 1e-3
    assert logged["loss"] == pytest.approx(logged["task_loss"] + 3 * sum(errors) / 4, rel=1e-4)
    assert "distillation_loss" not in logged
    trainer.args.feature_distillation_weight = 0.0
    plain = step(trainer, batches)[1]
    name = "model.layers.1.mlp.down_proj.weight"
    assert (gradients[name] - plain[name]).norm() > 0.1 * plain[name].norm()


def test_feature_distillation_of_an_encoder_decoder(tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = T5Config(**shape, decoder_start_token_id=0, dropout_rate=0.0)
    model = lte.sparsify_(T5ForConditionalGeneration(config), lte.LTEConfig(expert_size=8, grouping="random"))
    trainer = soft_trainer(tmp_path, model=model, feature_distillation_weight=1.0)
    batch = batch_of(2)
    batch["labels"] = batch["labels"][:, :7].clone()
    batch["labels"][0, 4:] = -100
    batch["attention_mask"][1, 9:] = 0
    real = {"encoder_": batch["attention_mask"].bool(), "decoder_": batch["labels"].ne(-100)}
    errors = [
        relative_error(*(one[mask] for one in pair))
        for part, mask in real.items()
        for pair in hidden_states(trainer, batch, part)
    ]
    assert step(trainer, [batch])[0]["feature_distillation_loss"] == pytest.approx(sum(errors) / 4, rel=1e-4)


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LTETrainingArguments"):
        LTETrainer(sparse_llama(), None)
    with pytest.raises(ValueError, match="sparsify_"):
        LTETrainer(torch.nn.Linear(2, 2), arguments(tmp_path))
    args = copy.copy(arguments(tmp_path))
    args._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun"):
        LTETrainer(sparse_llama(), args)


def test_too_few_steps_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="leave the soft stage no step"):
        trainer_for(tmp_path, max_steps=4, dense_fraction=0.5, hard_fraction=0.5).train()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
@pytest.mark.parametrize("given", [{}, {"ramp": 0.5, "feature_distillation_weight": 1.0}], ids=str)
def test_a_compiled_run_is_the_same_run(tmp_path, given):
    """Stages and recording of scores change under the compiled blocks; few programs must do for all."""
    logs = {}
    for name, options in {"eager": {}, "compiled": {"torch_compile": True, "torch_compile_backend": "eager"}}.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = trainer_for(tmp_path / name, max_steps=32, **options, **given)
        trainer.train()
        logs[name] = [entry for entry in trainer.state.log_history if "loss" in entry]
    programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if not given:  # transformers' hooks that collect hidden states break each block once
        assert not torch._dynamo.utils.counters["graph_break"]
        assert 0 < programs <= 24
    assert len(logs["eager"]) == len(logs["compiled"]) == 32
    for eager, compiled in zip(logs["eager"], logs["compiled"], strict=True):
        for key in {"loss", "sparsity", "eta", "feature_distillation_loss"} & eager.keys():
            assert compiled[key] == pytest.approx(eager[key], rel=1e-3, abs=1e-4)


class Reads(TorchDispatchMode):
    """Which code outside of torch reads a number from a tensor: on a GPU it would wait there."""

    def __init__(self):
        super().__init__()
        self.by_file = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            files = [Path(frame.filename) for frame in traceback.extract_stack()[:-1]]
            self.by_file[next(file.name for file in reversed(files) if "torch" not in file.parts)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", [{}, {"schedule": "paper", "eta": 0.5}, {"schedule": "dense"}], ids=str)
def test_a_step_reads_no_number(tmp_path, given):
    options = {"dense_fraction": 0.0, "hard_fraction": 0.0, "bf16": True, "logging_steps": 100}
    trainer = trainer_for(tmp_path, max_steps=16, **options, **given)
    with Reads() as reads:
        trainer.train()
    assert {file for file, count in reads.by_file.items() if count >= 16} <= {"masking_utils.py"}  # of transformers


def test_a_model_trained_in_mixed_precision_is_left_without_autocast(tmp_path):
    model = sparse_llama()
    trainer = trainer_for(tmp_path, model=model, bf16=True, max_steps=6)
    trainer.train()
    seen = []
    hook = next(iter(sparse_layers(model).values())).register_forward_pre_hook(
        lambda _module, _args: seen.append(torch.is_autocast_enabled("cpu"))
    )
    model(torch.ones(1, 3, dtype=torch.long))
    hook.remove()
    assert seen == [False]
    assert trainer.evaluate(markov_blocks(4))["eval_loss"] > 0


def test_batches_left_out_of_training_are_evaluated(tmp_path):
    rows, model = markov_blocks(5), sparse_llama()
    losses = []
    for drop_last in (False, True):
        trainer = trainer_for(tmp_path, model=model, per_device_eval_batch_size=2, dataloader_drop_last=drop_last)
        losses.append(trainer.evaluate(rows)["eval_loss"])
    assert losses[0] == losses[1]
