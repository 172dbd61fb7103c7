"""One verb for every conversion, one way to ask what a model is, and the sections of configs that saved models have."""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lte
from lte.core.accounting import G
from lte.evaluation.measuring import measure, spent
from lte.surgery.architectures import become_lte_
from lte.surgery.conversion import Conversion, conversion_of, is_sparse, section_of, sections_of
from lte.surgery.cost import meta_model
from lte.surgery.method import Method, mode_of
from lte.surgery.sites import linear_sites

KINDS = {
    "lte": lte.LTEConfig(expert_size=8, compensation_rank=2),
    "cats": lte.CATSConfig(0.4, tokens=100),
    "moefication": lte.MoEficationConfig(expert_size=8, fit_epochs=1),
    "sigma-moe": lte.SigmaMoEConfig(expert_size=8),
    "teal": lte.TEALConfig(0.6, tokens=100),
    "wanda": lte.WandaConfig(0.4, tokens=100),
    "magnitude": lte.MagnitudeConfig(0.5, "2:4"),
}
STOCK = {"wanda", "magnitude"}
OLD_NAME = {"teal": lte.teal_, "wanda": lte.prune_, "magnitude": lte.prune_}
SAVED = Path(__file__).parent / "saved"


def data(count=4):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 48, (4, 12), generator=generator)} for _ in range(count)]


def converted(kind, model=None):
    return lte.sparsify_(tiny_model("llama") if model is None else model, KINDS[kind], data())


@torch.no_grad()
def logits(model):
    return model(**tiny_inputs("llama")).logits


@pytest.mark.parametrize("kind", OLD_NAME)
def test_the_old_names_do_the_same(kind):
    new, old = converted(kind), OLD_NAME[kind](tiny_model("llama"), KINDS[kind], data())
    assert type(new) is type(old)
    assert section_of(new.config) == section_of(old.config)
    weights = old.state_dict()
    assert new.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in new.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_says_what_its_model_is(kind, tmp_path):
    """In memory, on disk, and once loaded; the model computes the same."""
    model = converted(kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model.eval()))
    on_disk = json.loads((tmp_path / "config.json").read_text())
    for config in (model.config, loaded.config, AutoConfig.from_pretrained(tmp_path), on_disk):
        assert conversion_of(config) == KINDS[kind]
        assert is_sparse(config) == (kind not in STOCK)
    assert isinstance(loaded, LlamaForCausalLM)
    assert (type(loaded) is LlamaForCausalLM) == (kind in STOCK)
    assert conversion_of(meta_model(loaded.config).config) == KINDS[kind]
    assert sum(one is not None for one in sections_of(loaded.config).values()) == 1


def test_a_dense_model_is_none():
    for config in (LlamaConfig(), {}, None):
        assert conversion_of(config) is None
        assert not is_sparse(config)
        assert section_of(config) == {}
        assert mode_of(config) == "dense"


@pytest.mark.parametrize("folder", [path for path in SAVED.iterdir() if path.is_dir()], ids=lambda path: path.name)
def test_sections_written_before_are_read(folder):
    config = AutoConfig.from_pretrained(folder)
    made = conversion_of(config)
    name = "lte" if folder.name.startswith("lte") else folder.name
    assert made.name == name
    assert is_sparse(config) == (name != "wanda")
    written = json.loads((folder / "config.json").read_text())[made.section]
    assert made.to_dict().items() >= {key: value for key, value in written.items() if key not in made.state}.items()
    assert mode_of(config) == written.get("mode", "dense")


@pytest.mark.parametrize("section", [{"method": "magic"}, {"amount": 0.5}, {"target_sparsity": "half"}, "yes", None])
def test_a_section_of_somebody_else_is_left_alone(section, tmp_path):
    model = tiny_model("llama")
    model.config.pruning = section
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.pruning == section
    assert conversion_of(model.config) is None
    assert not is_sparse(model.config)
    with measure(model) as meter:
        logits(model)
    assert spent(model, meter).weight_sparsity < 0.01


@pytest.mark.parametrize("kind", ["lte", "teal"])
def test_a_pruned_model_can_be_made_sparse(kind, tmp_path):
    model = converted(kind, converted("magnitude"))
    assert conversion_of(model.config) == KINDS[kind]
    assert sections_of(model.config)["pruning"] == KINDS["magnitude"].to_dict()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_sparse(loaded.config)
    assert lte.weight_sparsity(loaded) == pytest.approx(0.5, abs=1e-3)
    assert torch.equal(logits(loaded), logits(model.eval()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", ["lte", "cats", "teal"])
def test_a_sparse_model_is_not_converted_again(before, kind):
    model = converted(before)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="sparse already: load the dense checkpoint to convert it"):
        converted(kind, model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def without_weights():
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_model("llama").config)


def wrapped(name):
    model = tiny_model("llama")
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Sequential(model.get_submodule(name)))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_weights, "is on the meta device: load the model's weights first"),
        (
            lambda: wrapped("model.layers.1.mlp.up_proj"),
            "model.layers.1.mlp.up_proj is a torch.nn.modules.container.Se",
        ),
        (lambda: tiny_model("llama", intermediate_size=30, num_hidden_layers=0), "no FFN found in LlamaForCausalLM"),
    ],
)
def test_refused_before_the_first_change(kind, make, message):
    model = make()
    with pytest.raises(ValueError, match=message) as error:
        converted(kind, model)
    assert "\n" not in str(error.value)
    assert section_of(model.config) == {}
    assert type(model) is LlamaForCausalLM


@pytest.mark.parametrize("kind", [kind for kind, config in KINDS.items() if config.data_tokens])
def test_data_is_missing(kind):
    name = type(KINDS[kind]).__name__
    for given, message in [
        (None, "data: pass sparsify_.model, config, data=batches"),
        ([], "data, but the data is empty"),
    ]:
        model = tiny_model("llama")
        with pytest.raises(ValueError, match=f"this {name} needs {message}"):
            lte.sparsify_(model, KINDS[kind], given)
        assert section_of(model.config) == {}


@pytest.mark.parametrize("kind", ["cats", "teal", "wanda"])
def test_no_more_data_is_read_than_needed(kind):
    taken = []
    lte.sparsify_(tiny_model("llama"), KINDS[kind], (taken.append(1) or batch for batch in data(20)))
    assert len(taken) == 3  # of 48 tokens each, for 100


@pytest.mark.parametrize("kind", KINDS)
def test_what_takes_long_is_shown(kind):
    seen = []

    def progress(steps):
        for step in steps:
            seen.append(step)
            yield step

    lte.sparsify_(tiny_model("llama"), KINDS[kind], data(), progress)
    assert seen
    assert KINDS[kind].doing


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Conversion.named("magic"),
            "unknown method 'magic': this version of lte knows cats, deja-vu, lte, mag",
        ),
        (lambda: Method.named("teal"), "unknown method 'teal': this version of lte knows cats"),
        (lambda: Conversion.from_dict({"target_sparsity": 0.5}), "unknown method None"),
        (lambda: Conversion.from_dict({"method": "wanda", "mode": "hard"}), "unknown option mode for method 'wanda'"),
        (lambda: Conversion.from_dict({"method": "wanda", "tokens": "all"}), "wrong type: tokens 'all'"),
        (lambda: KINDS["magnitude"].cost(tiny_model("llama"), 1.5), "sparsity is 1.5, but it is a fraction"),
        (lambda: lte.teal_(tiny_model("t5"), lte.TEALConfig(), data()), "not for an encoder-decoder"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["teal", "wanda", "magnitude"])
def test_what_has_no_routers_is_not_trained(kind, tmp_path):
    name, arguments = type(KINDS[kind]).__name__, lte.LTETrainingArguments(str(tmp_path))
    for train in (
        lambda: lte.train("m", KINDS[kind], "d.txt", str(tmp_path)),
        lambda: lte.LTETrainer(tiny_model("llama"), arguments, method=KINDS[kind]),
    ):
        with pytest.raises(ValueError, match=f"{name} has no routers and is not trained: call lte.sparsify_") as error:
            train()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_named(kind):
    assert Conversion.named(kind) is type(KINDS[kind])
    assert Conversion.from_dict({"method": kind, **KINDS[kind].to_dict()}) == KINDS[kind]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_cost_is_what_is_measured(kind):
    model = converted(kind)
    if isinstance(KINDS[kind], Method):
        lte.set_mode_(model, "hard")
    with measure(model.eval()) as meter:
        for batch in data():
            model(**batch)
    found = spent(model, meter)
    asked = {"teal": getattr(meter, "by_linear", 0), "wanda": found.weight_sparsity, "magnitude": found.weight_sparsity}
    cost = KINDS[kind].cost(model, asked.get(kind, found.layer_sparsity))
    assert found.gflops_per_token == cost.gflops
    assert (
        found.gflops_per_token_dense == KINDS[kind].cost(model).gflops == lte.cost_per_token(tiny_model("llama")).gflops
    )


def test_cost_of_a_pruned_model_by_hand():
    """llama, two layers of D 32, F 64: attention 32 x 96 weights, FFN 3 x 32 x 64; a quarter is left."""
    cost = KINDS["magnitude"].cost(tiny_model("llama"), 0.75)
    attention, ffn = 2 * 32 * 96, 2 * 3 * 32 * 64
    assert (cost.ffn_gflops, cost.attention_gflops) == (2 * ffn / 4 / G, 2 * attention / 4 / G)
    assert cost.gflops == cost.ffn_gflops + cost.attention_gflops
    assert cost.weight_bytes == (ffn + attention) // 4 * 4


@pytest.mark.parametrize(("kind", "computes_all"), [("lte", True), ("sigma-moe", False)])
def test_mode_soft(kind, computes_all):
    """LTE's scores are above 0, so that every expert is computed; a mixture's are 0 but for the best."""
    model = converted(kind)
    lte.set_mode_(model, "soft")
    with measure(model.eval()) as meter:
        logits(model)
    found = spent(model, meter)
    assert (found.mode, found.sparsity > 0.1) == ("soft", True)
    assert (found.gflops_per_token > found.gflops_per_token_dense) == computes_all


def test_a_conversion_of_ones_own(tmp_path, monkeypatch):
    """Another kind, with a section of its own, that nothing in the package knows of: a cap on attention's output."""
    monkeypatch.setattr(Conversion, "_by_name", dict(Conversion._by_name))
    monkeypatch.setattr(Conversion, "_by_section", dict(Conversion._by_section))

    @dataclass(frozen=True)
    class Capped(Conversion):
        name: ClassVar[str] = "capped"
        section: ClassVar[str] = "cap"
        stock: ClassVar[bool] = False

        most: float = 0.01

        def convert_(self, model, batches, progress):
            self.install_(model)
            become_lte_(model, self)

        def install_(self, model):
            for site in linear_sites(model, model.config.model_type):
                if site.name.endswith("o_proj"):
                    site.linear.register_forward_hook(lambda _module, _args, y: y.clamp(-self.most, self.most))

        @contextmanager
        def meter(self, model, entry):
            yield "seen"

        def spent(self, model, meter):
            return meter

    model = lte.sparsify_(tiny_model("llama"), Capped(0.02))
    assert not torch.equal(logits(model), logits(tiny_model("llama")))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["cap"] == {"method": "capped", "most": 0.02}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert (conversion_of(loaded.config), is_sparse(loaded.config)) == (Capped(0.02), True)
    with measure(loaded) as meter:
        assert spent(loaded, meter) == "seen"
    with pytest.raises(ValueError, match="sparse already"):
        lte.sparsify_(loaded, lte.LTEConfig(expert_size=8))
