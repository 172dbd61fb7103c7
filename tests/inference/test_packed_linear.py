"""Linear layers with thresholds in an optimised model: the kernel where it can run, otherwise the layer as it was."""

import copy
from collections import Counter

import pytest
import torch
from tiny_methods import batches
from tiny_models import relative_rms, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

pytest.importorskip("triton")

import lte
from lte.inference import packed_linear
from lte.inference.packed_linear import PackedLinear
from lte.modules.input_threshold import cut_layers, switch_cuts_
from lte.modules.recording import track_inputs

FAMILIES = ["llama", "gpt2", "opt"]
"""A family of each kind: three layers with one input, Conv1D with q, k and v in one, biases."""
LAUNCHES = {"llama": 4, "gpt2": 4, "opt": 4}
"""Of a block: attention's inputs, its output, and the FFN's two or three projections."""
LAYERS = 2


def teal(family="llama"):
    return lte.teal_(tiny_model(family), lte.TEALConfig(0.5, tokens=300), data=batches(family))


def single(family="llama"):
    """Inputs of one token, which the kernel takes."""
    return {name: value[:1, :1] for name, value in tiny_inputs(family).items()}


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@pytest.fixture
def launches(monkeypatch):
    """How often the kernel ran, by the number of layers in a launch."""
    counted = Counter()

    def counting(x, layers, backend):
        counted[len(layers)] += 1
        return right(x, layers, backend)

    right = packed_linear.sparse_linears
    monkeypatch.setattr(packed_linear, "sparse_linears", counting)
    return counted


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_computes_the_same(family, launches):
    model = teal(family)
    small, large = single(family), tiny_inputs(family)
    expected, of_many = logits(model, small), logits(model, large)
    assert lte.optimize_(model, "triton") is model
    assert relative_rms(logits(model, small), expected) <= 1e-5
    assert launches.total() == LAUNCHES[family] * LAYERS
    assert relative_rms(logits(model, large), of_many) <= 1e-5  # many tokens: all rows are read
    assert launches.total() == LAUNCHES[family] * LAYERS


def test_layers_with_one_input_share_a_launch(launches):
    model = lte.optimize_(teal(), "triton")
    logits(model, single())
    assert launches == {3: LAYERS, 2: LAYERS, 1: 2 * LAYERS}
    assert all(one.group._made is None for one in cut_layers(model).values())


def test_layers_whose_inputs_differ_run_one_by_one(launches):
    attention = lte.optimize_(teal(), "triton").model.layers[0].self_attn
    a, b = torch.randn(2, 1, attention.q_proj.in_features).unbind()
    reference = copy.deepcopy(attention)
    for linear in cut_layers(reference).values():
        linear.backend = "reference"
    with torch.no_grad():
        for name, x in (("q_proj", a), ("k_proj", b), ("v_proj", a), ("v_proj", a), ("q_proj", b)):
            found, want = getattr(attention, name)(x), getattr(reference, name)(x)
            assert relative_rms(found, want) <= 1e-5


def test_a_hook_on_one_layer_takes_it_out_of_the_launch(launches):
    model = teal()
    expected = logits(model, single())
    lte.optimize_(model, "triton")
    seen = []
    model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert relative_rms(logits(model, single()), expected) <= 1e-5
    assert launches == {3: LAYERS - 1, 2: LAYERS, 1: 2 * LAYERS + 2}
    assert 0.1 < float(seen[0].eq(0).float().mean()) < 0.9  # the hook sees what the layer multiplies


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_is_a_memory_layout(family, tmp_path):
    model = teal(family)
    parameters = dict(model.named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lte.optimize_(model, "triton")
    assert all(parameters[name] is one for name, one in model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(linear.weights().rows_IO.is_contiguous() for linear in cut_layers(model).values())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, PackedLinear) for module in loaded.modules())
    assert torch.equal(logits(lte.optimize_(loaded, "triton"), single(family)), logits(model, single(family)))


def test_moved_cast_and_copied(launches):
    plain = teal()
    model = lte.optimize_(copy.deepcopy(plain), "triton")
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, single()), logits(model, single()))
    assert copied.model.layers[0].self_attn.q_proj.group is not model.model.layers[0].self_attn.q_proj.group
    launches.clear()
    half = logits(copied.to(torch.float16), single())
    assert launches.total() == 4 * LAYERS
    assert relative_rms(half, logits(plain.to(torch.float16), single())) <= 0.01


def test_gradients_counting_and_autocast_use_the_layer_as_it_was(launches):
    model, inputs = teal(), single()
    expected = logits(model, inputs)
    model(**inputs).logits.sum().backward()
    gradient = model.model.layers[0].self_attn.v_proj.weight.grad.clone()
    model.zero_grad()
    lte.optimize_(model, "triton")
    model(**inputs).logits.sum().backward()
    assert relative_rms(model.model.layers[0].self_attn.v_proj.weight.grad, gradient) <= 1e-5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative_rms(model(**inputs).logits, expected) <= 0.1
    with torch.no_grad(), track_inputs(model, cut_layers(model)) as meter:
        assert relative_rms(model(**inputs).logits, expected) <= 1e-5
    assert all(0 < share < 1 for share in meter.by_linear.values())
    assert not launches


def test_another_backend_by_a_second_call(launches):
    model = lte.optimize_(teal(), "triton")
    expected = logits(model, single())
    launches.clear()
    lte.optimize_(model, "reference")
    assert relative_rms(logits(model, single()), expected) <= 1e-5
    assert not launches


def test_thresholds_that_are_off_are_off_in_the_kernel():
    model = teal()
    switch_cuts_(model, False)
    expected = logits(model, single())
    lte.optimize_(model, "triton")
    assert relative_rms(logits(model, single()), expected) <= 1e-5


def test_lte_with_attention_sparsity(launches):
    model = lte.sparsify_(
        tiny_model("llama"), lte.LTEConfig(expert_size=16, grouping="random", attention_sparsity=0.25)
    )
    lte.set_mode_(model, "hard")
    for linear in cut_layers(model).values():
        linear.cut.fill_(0.3)
    expected = logits(model, single())
    lte.optimize_(model, "triton")
    assert relative_rms(logits(model, single()), expected) <= 1e-5
    assert launches == {3: LAYERS, 1: LAYERS}
    with lte.track_sparsity(model) as meter:
        logits(model, single())
    assert 0 < meter.attention_sparsity < 1
    lte.set_mode_(model, "dense")
    launches.clear()
    logits(model, single())
    assert not launches


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
def test_decodes_the_tokens_of_generate_and_notices_changes(compile, launches):
    model = teal()
    prompt = tiny_inputs("llama")["input_ids"][:1]
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    packed = lte.optimize_(copy.deepcopy(model), "triton")
    for cutting in (True, False):
        switch_cuts_(model, cutting)
        switch_cuts_(packed, cutting)
        expected = model.generate(prompt, **options)
        assert torch.equal(lte.generate(packed, prompt, compile=compile, **options), expected)
    assert launches


def test_a_packed_layer_can_be_quantised_later(launches):
    pytest.importorskip("torchao")
    config = lte.LTEConfig(expert_size=16, grouping="random", attention_sparsity=0.25)
    model = lte.sparsify_(tiny_model("llama", hidden_size=32, intermediate_size=128), config)
    lte.set_mode_(model, "hard")
    quantised = lte.optimize_(copy.deepcopy(model), weights="int8")
    twice = lte.optimize_(lte.optimize_(model, "triton"), weights="int8")
    assert relative_rms(logits(twice, single()), logits(quantised, single())) <= 1e-5
    assert not launches
