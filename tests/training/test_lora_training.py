"""``LTETrainer`` with ``lora_rank``: adapters beside frozen weights, which are also the teacher's."""

import copy
import json

import pytest
import torch
from test_resume import SAVING, Stop, StopAfter, by_step
from tiny_models import relative_rms, tiny_inputs, tiny_model
from tiny_training import dense_llama, markov_blocks, sparse_llama, trainer_for
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

import lte
from lte.modules.input_threshold import cut_layers
from lte.modules.recording import record_scores, sparse_layers
from lte.surgery.adapter_folder import load_adapter_
from lte.surgery.adapters import SCALE, Adapters
from lte.surgery.convert import install_routers_
from lte.surgery.loading import load_model
from lte.training.distiller import FrozenTeacher

pytest.importorskip("peft")

RANK = 4
SLOW = pytest.mark.slow
IDS = torch.arange(3, 43).view(2, 20)


def ungrouped():
    return install_routers_(dense_llama(), lte.LTEConfig(expert_size=8))


def lora_trainer(folder, model=None, **options):
    return trainer_for(folder, ungrouped() if model is None else model, lora_rank=RANK, **options)


@torch.no_grad()
def logits_of(model):
    return model.eval()(IDS).logits


@torch.no_grad()
def shake_(adapters):
    """Give everything that is trained other values."""
    torch.manual_seed(5)
    for name, value in adapters._adapted().items():
        value.add_(0.1 * torch.randn_like(value), alpha=float(value.abs().mean()) if "lora" not in name else 1.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run: dense up to step 3, soft up to 9, hard up to 12."""
    trainer = lora_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "opt", *(pytest.param(o, marks=SLOW) for o in ("phi3", "bert", "t5"))]
)
def test_aside_and_off_give_the_model_back_and_finish_merges(family):
    model = lte.sparsify_(tiny_model(family), lte.LTEConfig(expert_size=8, grouping="random")).eval()
    lte.set_mode_(model, "soft")
    inputs, names = tiny_inputs(family), [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        before = model(**inputs).logits
        adapters = Adapters(model, RANK)
        assert torch.equal(model(**inputs).logits, before)
        shake_(adapters)
        trained = model(**inputs).logits
        assert relative_rms(trained, before) > 1e-3
        with adapters.aside():
            assert [name for name, _ in model.named_parameters()] == names
            assert torch.equal(model(**inputs).logits, before)
        with adapters.off():
            assert torch.equal(model(**inputs).logits, before)
        assert torch.equal(model(**inputs).logits, trained)
        adapters.finish()
        assert relative_rms(model(**inputs).logits, trained) < 1e-5
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradients_are_those_of_full_training():
    """By the chain rule, from the gradients of a model in which the same adapters are merged."""
    model = sparse_llama()
    lte.set_mode_(model, "soft")
    adapters = Adapters(model, RANK)
    shake_(adapters)
    merged = copy.deepcopy(adapters)
    merged.finish()
    full = merged.model

    def backward(one):
        with record_scores(one) as recording:
            loss = one(IDS, labels=IDS).loss
        (loss + sum(scores.sum() for scores in recording.scores.values())).backward()

    backward(model)
    backward(full)
    expected = {name: parameter.grad for name, parameter in full.named_parameters()}
    for name, wrapper in adapters._lora.items():
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        gradient = expected[f"{name}.weight"]
        assert relative_rms(b.grad, SCALE * gradient @ a.T) < 1e-5
        assert relative_rms(a.grad, SCALE * b.T @ gradient) < 1e-5
        assert wrapper.base_layer.weight.grad is None
    for name, wrapper in adapters._in_full.items():
        assert relative_rms(wrapper.trained.weight.grad, expected[f"{name}.weight"]) < 1e-5
    for name, layer in sparse_layers(model).items():
        assert relative_rms(layer.router.weight.grad, expected[f"{name}.router.weight"]) < 1e-5
    assert model.get_input_embeddings().weight.grad is None


def test_the_teacher_is_the_dense_model():
    dense = dense_llama(attention_dropout=0.5)
    expected = logits_of(dense)
    model = lte.sparsify_(dense, lte.LTEConfig(expert_size=8))
    adapters = Adapters(model, RANK)
    shake_(adapters)
    lte.set_mode_(model, "soft")
    model.train()
    found = FrozenTeacher(model, model, adapters)(input_ids=IDS).logits
    assert relative_rms(found, expected) < 1e-5
    assert model.config.lte["mode"] == "soft"
    assert {layer.mode for layer in sparse_layers(model).values()} == {"soft"}
    assert all(module.training for module in model.modules())
    assert all(one.requires_grad for name, one in model.named_parameters() if "lora_" in name or ".trained." in name)


def test_what_is_trained(tmp_path):
    trainer = lora_trainer(tmp_path, train_dataset=markov_blocks(200))
    model, before = trainer.model, copy.deepcopy(dense_llama().state_dict())
    trainer.create_optimizer()
    held = {id(one) for group in trainer.optimizer.param_groups for one in group["params"]}
    names = {name for name, one in model.named_parameters() if id(one) in held}
    assert all(any(kind in name for kind in ("lora_", "norm", "router")) for name in names)
    rates = {
        name: group["lr"]
        for name, p in model.named_parameters()
        for group in trainer.optimizer.param_groups
        if any(p is one for one in group["params"])
    }
    expected = {name: 1e-2 if "router" in name else 1e-3 if "lora_" in name else 1e-4 for name in rates}
    assert rates == pytest.approx(expected)
    assert len(held) == 2 * 7 * 2 + 5 + 2 * 2  # two matrices of 7 linear layers, norms, two of a router
    trainer.train()
    after = trainer.model.state_dict()
    assert not any("lora" in name for name in after)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name])
    for index in range(2):
        order = trainer.adapters.orders[f"model.layers.{index}"]
        assert not torch.equal(order, torch.arange(128))
        name = f"model.layers.{index}.mlp.up_proj.weight"
        changed = torch.linalg.matrix_rank(after[name] - before[name][order], tol=1e-5)
        assert 0 < changed <= 2 * RANK  # the adapter of the dense stage, and that of the others
        norm = f"model.layers.{index}.input_layernorm.weight"
        assert not torch.equal(after[norm], before[norm])


def test_the_student_learns_from_the_model_after_the_dense_stage(tmp_path):
    seen = []

    class Look(StopAfter):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step in (3, 8):
                seen.append(trainer.distiller.teacher(input_ids=IDS).logits)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                seen.append(logits_of(model))
                model.train()

    model = ungrouped()
    trainer = lora_trainer(tmp_path, model, learning_rate=1e-2)
    trainer.callback_handler.add_callback(Look(3))
    trainer.train()
    after_dense, *teachers = seen
    for one in teachers:  # neurons were grouped meanwhile
        assert relative_rms(one, after_dense) < 1e-5
    assert relative_rms(after_dense, logits_of(dense_llama())) > 1e-3
    assert not (tmp_path / "lte_teacher").exists()


@pytest.mark.parametrize("step", [pytest.param(2, marks=SLOW), 7, pytest.param(11, marks=SLOW)])  # dense, soft, hard
def test_resumed_in_every_stage(tmp_path, whole, step):
    with pytest.raises(Stop):
        lora_trainer(tmp_path, callbacks=[StopAfter(step)], **SAVING).train()
    assert not list(tmp_path.glob("checkpoint-*/model.safetensors"))
    trainer = lora_trainer(tmp_path, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    for name in ("loss", "sparsity", "eta", "grad_norm"):
        assert by_step(trainer, name) == pytest.approx(by_step(whole, name), rel=1e-4)
    expected = whole.model.state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(
    ("dtype", "dense_fraction"),
    [
        (torch.bfloat16, 0.25),
        pytest.param(torch.float32, 0.25, marks=SLOW),
        pytest.param(torch.float32, 0.0, marks=SLOW),
    ],
)
def test_merged_and_as_an_adapter(tmp_path, dtype, dense_fraction):
    base = tmp_path / "base"
    dense_llama().to(dtype).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    method = lte.LTEConfig(expert_size=8, compensation_rank=4)
    trainer = lora_trainer(
        tmp_path / "run",
        install_routers_(model, method),
        save_adapter=True,
        dense_fraction=dense_fraction,
        bf16=dtype == torch.bfloat16,
        **SAVING,
    )
    assert {layer.router.weight.dtype for layer in sparse_layers(model).values()} == {torch.float32}
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    trainer.model.save_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {dtype}
    expected = logits_of(trainer.model)

    loaded = load_model(str(tmp_path / "adapter"))
    assert loaded.config.lte == trainer.model.config.lte
    assert loaded.config.lte["mode"] == "hard"
    assert torch.equal(logits_of(loaded), expected)
    assert torch.equal(logits_of(load_adapter_(load_model(str(base)), tmp_path / "adapter")), expected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert torch.equal(logits_of(merged), expected)
    assert torch.equal(logits_of(load_model(str(tmp_path / "run" / "checkpoint-12"))), expected)
    if dtype == torch.float32:
        assert relative_rms(logits_of(lte.optimize_(loaded)), expected) < 1e-5
    size = sum(one.stat().st_size for one in (tmp_path / "adapter").glob("*.safetensors"))
    assert size < (tmp_path / "merged" / "model.safetensors").stat().st_size


def test_an_adapter_on_another_model_is_refused(tmp_path):
    trainer = lora_trainer(tmp_path, save_adapter=True)
    trainer.train()
    trainer.save_model()
    with pytest.raises(ValueError, match="has others, or its neurons are in another order"):
        load_adapter_(dense_llama(seed=1), tmp_path)
    other = dense_llama()
    other.model.layers[1].self_attn.q_proj.weight.data += 1e-3  # neurons alone do not tell
    with pytest.raises(ValueError, match="has others"):
        load_adapter_(other, tmp_path)
    with pytest.raises(ValueError, match="in another order"):
        load_adapter_(lte.sparsify_(dense_llama(), lte.LTEConfig(expert_size=8)), tmp_path)
    settings = tmp_path / "lte_adapter.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "base": "/no/such/folder"}))
    with pytest.raises(FileNotFoundError, match=r"lte_adapter\.json names it as base"):
        load_model(str(tmp_path))


def test_a_head_that_is_new_trains_in_full():
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(dense_llama(num_labels=3).config)
    adapters = Adapters(lte.sparsify_(model, lte.LTEConfig(expert_size=8, grouping="random")), RANK)
    assert "score" in adapters._in_full
    assert "lm_head" not in Adapters(sparse_llama(), RANK)._in_full


def test_targets():
    model = sparse_llama(attention_sparsity=0.25)
    names = {name.rpartition(".")[2] for name in Adapters(model, RANK, ["up_proj", "gate_proj"]).targets}
    assert names == {"up_proj", "gate_proj"}
    with pytest.raises(ValueError, match="linear layers of the blocks are q_proj, k_proj"):
        Adapters(sparse_llama(), RANK, ["query"])
    model = sparse_llama(attention_sparsity=0.25)
    assert cut_layers(model)
    with pytest.raises(ValueError, match="threshold on its inputs"):
        Adapters(model, RANK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_targets": ["up_proj"]}, "lora_targets needs lora_rank"),
        ({"save_adapter": True}, "save_adapter needs lora_rank"),
        ({"lora_rank": 0}, "at least 1"),
        ({"lora_rank": 4, "optim": "galore_adamw"}, "do not go together"),
        ({"lora_rank": 4, "save_adapter": True, "schedule": "dense"}, "saves a plain checkpoint"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        trainer_for(tmp_path, **options)


@SLOW
def test_a_full_run_is_not_resumed_with_adapters(tmp_path):
    trainer_for(tmp_path, **SAVING, max_steps=12).train()
    with pytest.raises(ValueError, match="lora_rank"):
        lora_trainer(tmp_path, sparse_llama(), **SAVING).train(resume_from_checkpoint=True)


def test_the_model_of_a_run_that_did_not_end_is_refused(tmp_path):
    trainer = lora_trainer(tmp_path)
    for options in ({"lora_rank": RANK}, {}):
        with pytest.raises(ValueError, match="a run that did not end"):
            trainer_for(tmp_path, trainer.model, **options)


def test_a_merged_run_is_not_trained_on(whole):
    with pytest.raises(ValueError, match="make a new LTETrainer"):
        whole.train()


@SLOW
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
def test_compiled_blocks_train_the_same(tmp_path, whole):
    trainer = lora_trainer(tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    assert by_step(trainer, "loss") == pytest.approx(by_step(whole, "loss"), rel=1e-4)
    assert relative_rms(logits_of(trainer.model), logits_of(whole.model)) < 1e-4
