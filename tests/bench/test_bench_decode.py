"""The decoding benchmark on the CPU: the tokens are generate's, whatever computes them."""

import copy

import pytest
import torch
from transformers import LlamaConfig

from lte.bench import decode as bench_decode
from lte.bench import decoding, parity, step_parity
from lte.bench.decode import DecodeGrid, be_dense_, dense_models, random_model
from lte.bench.decoding import Decoded, TimedDecoder
from lte.bench.routing import random_routers_, route_
from lte.inference import optimize, packed_linear
from lte.inference.optimize import optimize_
from lte.inference.packed_linear import PackedLinear
from lte.methods.lte import LTEConfig
from lte.methods.teal import TEALConfig, teal_
from lte.modules.recording import record_scores, sparse_layers
from lte.ops.sparse_linear import reference
from lte.surgery.convert import set_mode_, sparsify_
from lte.surgery.cost import cost_per_token

torch.set_num_threads(1)
SIZES = {"hidden_size": 32, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
PROMPT, NEW = 12, 10


@pytest.fixture(scope="module")
def dense():
    config = LlamaConfig(vocab_size=100, num_key_value_heads=2, **SIZES)
    return random_model(config, torch.float32, torch.device("cpu"), seed=0)


@pytest.fixture(scope="module")
def sparse(dense):
    model = sparsify_(copy.deepcopy(dense), LTEConfig(expert_size=8, grouping="random"))
    set_mode_(model, "hard")
    random_routers_(model)
    route_(model, prompt(), 0.6)
    return model


def prompt(batch: int = 2) -> torch.Tensor:
    return torch.randint(100, (batch, PROMPT), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_tokens_are_those_of_the_masked_dense_model(sparse, backend):
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = sparse.generate(prompt(), **options)
    decoder = TimedDecoder(optimize_(copy.deepcopy(sparse), backend), 2, PROMPT, NEW, compile=False)
    assert decoder.how == ("one call" if backend == "auto" else "eager")
    for _ in range(2):
        found = decoder(prompt())
        assert torch.equal(found.tokens, expected)
        assert len(found.steps) == NEW - 1
        assert found.prefill > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
def test_a_compiled_step_gives_the_same_tokens_and_sees_new_biases(sparse):
    packed = optimize_(copy.deepcopy(sparse), "auto")
    decoder = TimedDecoder(packed, 2, PROMPT, NEW, compile=True)
    assert decoder.how == "compiled"
    for sparsity in (0.6, 0.9):
        route_(packed, prompt(), sparsity)
        assert torch.equal(
            decoder(prompt()).tokens, TimedDecoder(packed, 2, PROMPT, NEW, compile=False)(prompt()).tokens
        )


def test_a_step_that_does_not_compile_is_timed_as_it_is(dense, monkeypatch, caplog):
    def broken(*_args, **_options):
        raise ValueError("this model's step does not compile here")

    right = decoding.generate
    monkeypatch.setattr(
        decoding, "generate", lambda *args, compile, **how: (broken if compile else right)(*args, **how)
    )
    decoder = TimedDecoder(dense, 1, PROMPT, NEW, compile=True)
    assert decoder.how == "one call"
    assert len(decoder(prompt(1)).steps) == NEW - 1
    assert "does not compile here" in caplog.text


def run(dense, sparse=None, **changes):
    if sparse is None:
        config = LTEConfig(
            expert_size=8, grouping="random", attention_sparsity=changes.get("attention_sparsity") or 0.0
        )
        sparse = sparsify_(copy.deepcopy(dense), config)
    values = {"backend": "reference", "prompt_tokens": PROMPT, "new_tokens": NEW, "repeats": 1, "compile": False}
    grid = DecodeGrid("tiny", **{"sparsities": (0.0, 0.5), "batches": (1, 3), **values, **changes})
    return list(bench_decode.bench_decode(dense_models(dense), sparse, grid))


def test_rows(dense):
    rows = run(dense, generate=True, bandwidth=10.0)
    assert [(row["batch"], row["sparsity_asked"]) for row in rows] == [(1, 0.0), (1, 0.5), (3, 0.0), (3, 0.5)]
    for row in rows:
        assert row["sparsity"] == pytest.approx(row["sparsity_asked"], abs=0.04)
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["lte_ms"])
        assert row["dense_by"] in ("one call float32", "one call bfloat16")
        assert row["dense_generate_s"] > 0
        assert row["lte_generate_s"] > 0
    assert rows[0]["bytes"] > rows[1]["bytes"]
    assert rows[1]["union_sparsity"] == pytest.approx(rows[1]["sparsity"])
    assert rows[3]["union_sparsity"] < rows[3]["sparsity"]


def test_rows_with_attention_sparsity(dense):
    rows = run(dense, attention_sparsity=0.25, sparsities=(0.0, 0.5))
    without = run(dense, sparsities=(0.0,), batches=(1,))[0]
    for row in rows:
        assert row["attention_sparsity_asked"] == 0.25
        assert row["attention_sparsity"] == pytest.approx(0.25, abs=0.02)
        assert row["sparsity"] == pytest.approx(row["sparsity_asked"], abs=0.04)
    one, _, three, _ = rows
    assert one["union_attention_sparsity"] == one["attention_sparsity"]
    assert three["union_attention_sparsity"] < 0.15
    attention = 4 * (2 * 32 * 32 + 2 * 32 * 16) * 4  # bytes: four blocks with q, o, k and v
    assert without["bytes"] - one["bytes"] == pytest.approx(one["attention_sparsity"] * attention, abs=1)
    assert without["attention_sparsity"] == 0


def test_rows_of_teal(dense):
    data = [{"input_ids": torch.randint(100, (4, 40), generator=torch.Generator().manual_seed(2))}]
    model = teal_(copy.deepcopy(dense), TEALConfig(0.5, tokens=160), data)
    be_dense_(plain := copy.deepcopy(model))
    assert torch.equal(plain(prompt()).logits, dense(prompt()).logits)
    (row,) = run(plain, model, sparsities=(), batches=(1,))
    assert row["sparsity"] == pytest.approx(0.5, abs=0.1)
    assert row["attention_sparsity"] == pytest.approx(0.5, abs=0.1)
    read = cost_per_token(dense)
    assert row["bytes"] < 0.7 * (read.weight_bytes + read.head_bytes)
    assert row["backend"] == "reference"


def test_a_wrong_kernel_of_linear_layers_gets_no_time(dense, monkeypatch):
    def wrong(x, layers, _backend):
        return [-reference(x, layer) for layer in layers]

    def skips(linear, x):
        return linear.cutting and linear.backend != "reference" and x.shape[1] == 1

    def pack(linears, _backend):
        right(linears, "triton")

    right = optimize.pack_linears_
    monkeypatch.setattr(optimize, "pack_linears_", pack)
    monkeypatch.setattr(PackedLinear, "skips", skips)
    for file in (packed_linear, step_parity):
        monkeypatch.setattr(file, "sparse_linears", wrong)
    (row,) = run(dense, backend="auto", attention_sparsity=0.25, sparsities=(0.5,), batches=(1,))
    assert "parity red" in row["error"]
    assert "lte_ms" not in row
    for file in (packed_linear, step_parity):
        monkeypatch.setattr(file, "sparse_linears", lambda x, layers, _: [reference(x, one) for one in layers])
    (row,) = run(dense, backend="auto", attention_sparsity=0.25, sparsities=(0.5,), batches=(1,))
    assert row["lte_ms"] > 0


def test_a_wrong_backend_gets_no_time(dense, monkeypatch):
    right = parity.sparse_ffn
    monkeypatch.setattr(parity, "sparse_ffn", lambda *args, **kwargs: 2 * right(*args, **kwargs))
    for row in run(dense, batches=(1,)):
        assert "parity red" in row["error"]
        assert "lte_ms" not in row


def test_a_wrong_step_gets_no_time(dense, monkeypatch):
    class Wrong(TimedDecoder):
        def __call__(self, prompt_BS):
            made = super().__call__(prompt_BS)
            made.tokens[:, PROMPT:].add_(1).remainder_(100)
            return made

    monkeypatch.setattr(bench_decode, "TimedDecoder", Wrong)
    for row in run(dense, batches=(2,)):
        assert "decoded token" in row["error"]
        assert "lte_ms" not in row


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_right_step_in_bf16_is_timed(dense, backend):
    for row in run(copy.deepcopy(dense).to(torch.bfloat16), backend=backend):
        assert "error" not in row


def test_the_check_leaves_the_layers_as_they_were(sparse):
    packed = optimize_(copy.deepcopy(sparse), "auto")
    layers = [layer.packed for layer in sparse_layers(packed).values()]
    with step_parity.by_reference(packed):
        assert {layer.packed.backend for layer in sparse_layers(packed).values()} == {"reference"}
    assert all(a.packed is b for a, b in zip(sparse_layers(packed).values(), layers, strict=True))


def test_the_check_decides_half_of_the_experts_and_gives_the_biases_back(sparse):
    biases = {name: layer.router.bias.clone() for name, layer in sparse_layers(sparse).items()}
    tokens = torch.randint(100, (2, 9))
    with torch.no_grad(), step_parity.fixed_choice(sparse, seed=0), record_scores(sparse) as recording:
        sparse(input_ids=tokens)
        for scores in recording.scores.values():
            assert ((scores == 0) | (scores == 1)).all()
            assert 0 < scores.mean() < 1
            assert (scores == scores[0, 0]).all()
    assert all(torch.equal(layer.router.bias, biases[name]) for name, layer in sparse_layers(sparse).items())


def test_dense_is_the_fastest_of_its_contenders_in_each_measure(dense, monkeypatch):
    class Slow(TimedDecoder):
        def __call__(self, prompt_BS):
            fp32 = self.model.dtype == torch.float32  # the faster step, but a slow prefill
            times = (1.0, [0.1] * (NEW - 1)) if fp32 else (0.01, [0.11] * (NEW - 1))
            return Decoded(super().__call__(prompt_BS).tokens, *times)

    monkeypatch.setattr(bench_decode, "TimedDecoder", Slow)
    row = run(dense, batches=(2,), sparsities=(0.5,))[0]
    assert (row["dense_by"], row["dense_total_by"]) == ("one call float32", "one call bfloat16")
    assert (row["dense_ms"], row["dense_prefill_ms"]) == pytest.approx((100, 10))
    assert (row["dense_total_s"], row["lte_total_s"]) == pytest.approx((1.0, 1.9))
    assert row["speedup_total"] == pytest.approx(1 / 1.9)
    assert row["dense_tokens_per_s"] == pytest.approx(2 * NEW)
