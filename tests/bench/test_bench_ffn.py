"""The FFN benchmark on the CPU: rows, and what a wrong backend leads to."""

import pytest
import torch

from lte.bench import ffn as bench_ffn
from lte.bench import parity
from lte.bench.ffn import FFNGrid, crossovers
from lte.bench.shapes import FFNSize

ROW = {"shape", "dtype", "tokens", "rank", "sparsity_asked", "sparsity", "sparsity_range", "union_sparsity", "backend"}
ROW |= {"dense_us", "lte_us", "speedup", "ideal_speedup", "bytes", "dense_bytes", "gb_per_s", "share_of_bandwidth"}
ROW |= {"dense_by", "dense_us_all", "copies"}


def grid(**changes) -> FFNGrid:
    values = {
        "name": "tiny",
        "size": FFNSize(32, 256, True, "silu"),
        "sparsities": (0.0, 0.5),
        "tokens": (1, 4),
        "dtypes": [torch.float32],
        "device": torch.device("cpu"),
        "backend": "reference",
        "expert_size": 8,
        "repeats": 3,
        "compile": False,
        "bandwidth": 10.0,
    }
    return FFNGrid(**{**values, **changes})


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch):
    monkeypatch.setattr(bench_ffn, "cache_bytes", lambda device: 2**16)


def test_rows():
    rows = list(bench_ffn.bench_ffn(grid(dtypes=[torch.float32, torch.bfloat16])))
    assert len(rows) == 8
    for row in rows:
        assert row.keys() == ROW
        assert row["sparsity"] == pytest.approx(row["sparsity_asked"], abs=0.02)
        assert row["dense_us"] == min(row["dense_us_all"].values())
        assert row["dense_us_all"].keys() == {"eager float32", "eager bfloat16"}
        assert row["speedup"] == pytest.approx(row["dense_us"] / row["lte_us"])
    first, half = rows[0], rows[1]
    neurons, router, ends = 256 * 3 * 32 * 4, 32 * 33 * 4, 2 * 32 * 4
    assert first["bytes"] == neurons + router + ends
    assert half["bytes"] == pytest.approx(neurons / 2 + router + ends, rel=0.02)
    assert half["union_sparsity"] == half["sparsity"]
    assert rows[3]["union_sparsity"] < rows[3]["sparsity"] - 0.2


def test_compensation_is_run_and_charged():
    plain, compensated = (list(bench_ffn.bench_ffn(grid(compensation_rank=rank, tokens=(1,)))) for rank in (0, 8))
    for row, more in zip(plain, compensated, strict=True):
        assert (row["rank"], more["rank"]) == (0, 8)
        assert more["bytes"] == pytest.approx(row["bytes"] + 4 * 8 * (2 * 32 + 1), rel=0.02)
        assert more["dense_bytes"] / row["dense_bytes"] in (0.5, 1, 2)  # fp32 or bf16, whichever was faster
    layers = bench_ffn.make_layers(grid(compensation_rank=8), torch.float32)
    assert all(weights.rank == 8 for weights in layers.sparse)


def test_nothing_stays_in_cache():
    layers = bench_ffn.make_layers(grid(), torch.float32)
    projections = [part.matrix.rows for one in layers.sparse for part in (one.up, one.gate, one.down) if part]
    read = sum(rows.numel() * rows.itemsize for rows in projections) / 2
    assert read > 4 * 2**16


@pytest.mark.parametrize("wrong", [lambda y: y * 1.001, lambda y: y * float("nan"), lambda y: y + 1])
def test_a_wrong_backend_gets_no_time(monkeypatch, wrong):
    right = parity.sparse_ffn
    monkeypatch.setattr(parity, "sparse_ffn", lambda *args, **kwargs: wrong(right(*args, **kwargs)))
    rows = list(bench_ffn.bench_ffn(grid(tokens=(2,))))
    assert len(rows) == 2
    for row in rows:
        assert "parity red" in row["error"]
        assert not any(name.endswith("_us") or name == "speedup" for name in row)


def test_a_backend_that_ignores_the_router_is_seen(monkeypatch):
    right = parity.sparse_ffn

    def all_experts(x, weights, active=None, backend="auto"):
        active = torch.ones(x.shape[0], weights.num_experts, dtype=torch.bool) if active is None else active
        return right(x, weights, active, backend)

    monkeypatch.setattr(parity, "sparse_ffn", all_experts)
    rows = list(bench_ffn.bench_ffn(grid(tokens=(2,))))
    assert ["error" in row for row in rows] == [False, True]


def test_a_failure_costs_its_rows(monkeypatch):
    def fail(x, weights, backend):
        if x.shape[0] == 1:
            raise RuntimeError("out of\nregisters")
        return backend

    monkeypatch.setattr(bench_ffn, "choose", fail)
    rows = list(bench_ffn.bench_ffn(grid()))
    assert [row.get("error") for row in rows] == ["RuntimeError: out of registers"] * 2 + [None] * 2


def test_crossovers():
    def row(tokens, sparsity, lte_us):
        return {"dtype": "float32", "sparsity_asked": sparsity, "tokens": tokens, "dense_us": 100.0, "lte_us": lte_us}

    rows = [row(1, 0.0, 102), row(4, 0.0, 110), row(8, 0.0, 90), row(1, 0.5, 60), row(8, 0.5, 99), row(1, 0.9, 200)]
    rows.append({"dtype": "float32", "sparsity_asked": 0.5, "tokens": 16, "error": "parity red"})
    assert crossovers(rows) == {"float32": {"0.0": 1, "0.5": 8, "0.9": 0}}
    rows.append(row(32, 0.5, 10))  # beyond the failure, so it does not count
    rows += [{**rows[5], "sparsity_asked": 0.7, "error": "red"}, row(2, 0.7, 10)]
    del rows[-2]["lte_us"]
    assert crossovers(rows) == {"float32": {"0.0": 1, "0.5": 8, "0.7": 0, "0.9": 0}}
