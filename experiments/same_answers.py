"""Compares each answer of `lte eval --tasks` with that of lm_eval's own model, on the same questions.

python experiments/same_answers.py MODEL DATA TASK [LIMIT [BATCH_SIZE]] >> results/evaluation.jsonl
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models import huggingface

import lte
from lte.data.tokenise import wrapping
from lte.evaluation.environment import commit, device_name, versions
from lte.evaluation.harness import evaluate_tasks, find_tasks
from lte.surgery.conversion import is_sparse
from lte.surgery.loading import load_model, load_tokenizer


def main(model: str, data: str, task: str, limit: str | int = 20, batch_size: str | int = 4) -> None:
    limit, batch_size = int(limit), int(batch_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(model)
    made = load_model(model, "causal").to(device)  # pyright: ignore[reportArgumentType]
    chat = task.endswith("_instruct")
    tasks = find_tasks([task], data_folder=data, allow_code_execution=True)
    began = time.perf_counter()
    hflm: Any = huggingface.HFLM
    theirs: Any = simple_evaluate(
        hflm(pretrained=made, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=bool(wrapping(tokenizer)[0])),
        tasks=tasks.found,
        task_manager=tasks.manager,
        limit=limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        confirm_run_unsafe_code=True,
    )
    between = time.perf_counter()
    if is_sparse(made.config):
        lte.optimize_(made)
    tasks = find_tasks([task], data_folder=data, allow_code_execution=True)
    loaded = time.perf_counter()
    ours = evaluate_tasks(made, tokenizer, tasks, limit=limit, batch_size=batch_size, apply_chat_template=chat)
    ended = time.perf_counter()
    expected = [one for several in theirs["samples"].values() for one in several]
    metrics = expected[0]["metrics"]
    answer = "acc" if "acc" in metrics else "filtered_resps"
    pairs = list(zip(ours.predictions, expected, strict=True))
    row = {"command": f"python experiments/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}", "model": model}
    row |= {"device": device_name(device), "versions": versions(), "commit": commit(), "task": task}
    row |= {"answers": len(pairs), "equal_answers": sum(one[answer] == its[answer] for one, its in pairs)}
    row |= {"equal_scores": sum(all(one[name] == its[name] for name in metrics) for one, its in pairs)}
    row |= {"results": ours.results.get(task), "generated": ours.generated, "sparsity": ours.sparsity}
    row |= {"seconds": round(ended - loaded, 1), "seconds_lm_eval": round(between - began, 1), "batch_size": batch_size}
    print(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
