"""Rows as lte train, sweep and bench write them, small enough to work out by hand."""

import json
from pathlib import Path
from typing import Any

DENSE_GFLOPS = 0.2


def row(method: str | None, value: float, sparsity: float = 0.0, gflops: float = DENSE_GFLOPS, **more: Any) -> dict:
    """One run; ``more``: seed, steps, metric, data, options."""
    given = {"seed": 1, "steps": 300, "metric": "perplexity", "data": "wiki/test.txt", "options": ""} | more
    name = method or "lte"
    command = f"lte train --method {name} --model models/tiny --text t.txt --eval-text {given['data']}"
    command += f" --target-sparsity {sparsity} --seed {given['seed']} -o out/{name}-{given['seed']} {given['options']}"
    evaluation = {"perplexity": None, "accuracy": None, "sparsity": sparsity, "num_tokens": 1000, "mode": "hard"}
    evaluation |= {"gflops_per_token": gflops, "gflops_per_token_dense": DENSE_GFLOPS, given["metric"]: value}
    evaluation["layer_sparsity"] = [max(0.0, sparsity - 0.1), sparsity, min(1.0, sparsity + 0.1)]
    found = {"command": command, "seed": given["seed"], "steps": {"dense": 0, "soft": given["steps"], "hard": 0}}
    found |= {"recipe": "dense" if method == "dense" else "default", "evaluation": evaluation}
    return found if method is None else {**found, "method": method}


def bench() -> dict:
    rows = [
        {"shape": "tiny", "dtype": "bfloat16", "tokens": 1, "sparsity_asked": s, "sparsity": s, "union_sparsity": s,
         "dense_us": 100.0, "lte_us": 100.0 * (1 - s) + 10, "speedup": 1 / (1.1 - s), "ideal_speedup": 1 / (1 - s)}
        for s in (0.0, 0.5, 0.8)
    ]  # fmt: skip
    failed = {"shape": "tiny", "dtype": "bfloat16", "tokens": 2, "sparsity_asked": 0.5, "error": "out of memory"}
    return {"command": "lte bench ffn --shape tiny", "device": "a GPU", "commit": "abc1234", "rows": [*rows, failed]}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path
