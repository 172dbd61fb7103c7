"""vLLM serves a sparse model, and its greedy tokens are those of transformers. ``make test-serve`` runs these tests."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from served import NEW, batches, continued, dense, prompts, serve, sparse
from transformers import AutoModelForCausalLM

import lte

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(700),
    pytest.mark.skipif(find_spec("vllm") is None, reason="make test-serve has vLLM"),
]


def check_tokens(found, model):
    """Requests alone, in a batch, and with unequal ends give the tokens of transformers; mode dense gives others."""
    expected = continued(model, max(NEW))
    assert found["alone"] == expected
    assert found["batch"] == expected
    assert found["staggered"] == [one[:n] for one, n in zip(expected, NEW, strict=True)] * 2
    lte.set_mode_(model, "dense")
    different = [one != other for one, other in zip(continued(model, max(NEW)), expected, strict=True)]
    assert all(different)


def test_llama_in_chunks_and_with_kept_prefixes(tmp_path, cache):
    """A long prompt is read in parts, beside tokens of others. No row of padding reaches an FFN."""
    model = sparse("llama")
    model.save_pretrained(tmp_path)
    found = serve(tmp_path, cache, max_num_batched_tokens=64, enable_prefix_caching=True)
    assert found["layers"] == [[["PackedFFN"] * 3, ["cpu"]]]
    check_tokens(found, model)
    (sizes,) = found["sizes"]
    assert max(sizes) == 64
    assert {1, len(prompts())} <= set(sizes)  # steps of one request, and of all


def test_phi3_quantised_and_compiled(tmp_path, cache):
    """Gate and up are one projection, in int8. vLLM's compiler sees one operation in place of an FFN."""
    model = lte.quantise_(sparse("phi3"), "int8")
    model.save_pretrained(tmp_path)
    found = serve(tmp_path, cache, enforce_eager=False)
    assert found["layers"] == [[["PackedFFN"] * 3, ["cpu"]]]
    check_tokens(found, model)


def test_opt(tmp_path, cache):
    """Its FFN is no module: lte has its activation and its projections."""
    model = sparse("opt")
    model.save_pretrained(tmp_path)
    found = serve(tmp_path, cache)
    assert found["layers"] == [[["PackedActivation"] * 3, ["cpu"]]]
    check_tokens(found, model)


def test_two_processes(tmp_path, cache):
    """Attention is divided, and each process has all experts."""
    model = sparse("llama", compensation_rank=4)
    model.save_pretrained(tmp_path)
    found = serve(tmp_path, cache, tensor_parallel_size=2)
    assert found["layers"] == [[["PackedFFN"] * 3, ["cpu"]]] * 2
    check_tokens(found, model)


def test_mode_soft(tmp_path, cache):
    """All experts are computed, and the log says why."""
    model = sparse("llama")
    lte.set_mode_(model, "soft")
    model.save_pretrained(tmp_path)
    found = serve(tmp_path, cache)
    assert "idle experts are computed too: the model is in mode soft" in found["log"]
    assert found["layers"] == [[["SparseFFN"] * 3, ["cpu"]]]
    check_tokens(found, model)


def logprobs(model, chosen):
    """The log-probabilities that a model gives to chosen tokens behind each prompt: ``[prompts, tokens]``."""
    rows = []
    for prompt, new in zip(prompts(), chosen, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + new])).logits.float()
        after = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        rows.append(after.gather(1, torch.tensor(new)[:, None])[:, 0])
    return torch.stack(rows)


def test_bfloat16(tmp_path, cache):
    """Rounding makes greedy tokens differ, also between two runs of transformers. Log-probabilities are near."""
    model = sparse("llama").bfloat16()
    model.save_pretrained(tmp_path)
    found = serve(tmp_path, cache, dtype="bfloat16", logprobs=True)
    ours, exact = torch.tensor(found["logprobs"]), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    off = (ours - logprobs(exact, found["chosen"])).abs().mean()
    of_transformers = (logprobs(model, found["chosen"]) - logprobs(exact, found["chosen"])).abs().mean()
    lte.set_mode_(exact, "dense")
    of_dense = (ours - logprobs(exact, found["chosen"])).abs().mean()
    assert off < 2 * of_transformers
    assert off < of_dense / 4


def test_teal(tmp_path, cache):
    """Thresholds are on the inputs of all layers, attention too: vLLM replaces none of these layers.

    An input near a threshold may be 0 in one engine alone, so greedy tokens are not compared.
    """
    model = lte.sparsify_(dense("llama"), lte.TEALConfig(0.5), batches())
    model.save_pretrained(tmp_path)
    found = serve(tmp_path, cache, logprobs=True)
    ours = torch.tensor(found["logprobs"])
    off = (ours - logprobs(model, found["chosen"])).abs()
    assert off.median() < 1e-4
    assert off.mean() < (ours - logprobs(dense("llama"), found["chosen"])).abs().mean() / 20


@pytest.mark.filterwarnings("ignore")  # vLLM is imported in this process
@pytest.mark.parametrize(
    ("change", "cure"),
    [
        ({"lora_config": object()}, "merge the adapter"),
        ({"quant_config": object()}, "use lte quantise"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "leave --pipeline-parallel-size out"),
        ({"model_config": SimpleNamespace(hf_config=dense("gpt2").config)}, "take lte serve --engine transformers"),
    ],
)
def test_what_is_refused(change, cure):
    from lte.serving.vllm import TransformersForCausalLM

    usual = {"lora_config": None, "quant_config": None, "parallel_config": SimpleNamespace(pipeline_parallel_size=1)}
    with pytest.raises(ValueError, match=cure):
        TransformersForCausalLM(vllm_config=SimpleNamespace(**{**usual, **change}))


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_divided():
    from lte.serving.vllm import _check_divisible

    with pytest.raises(ValueError, match="has a threshold on its inputs"):
        _check_divisible(dense("llama"), ["layers.0.self_attn.q_proj"])
    with pytest.raises(ValueError, match="no plan to divide it"):
        _check_divisible(dense("opt"), [])
