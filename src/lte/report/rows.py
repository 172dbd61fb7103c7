"""Rows of results files, each checked. ``lte train``, ``lte eval``, ``lte sweep`` and ``lte bench`` write them."""

import json
from pathlib import Path
from typing import get_args

from lte.evaluation.record import SUMMARY, MeasuredOn
from lte.evaluation.result_row import ResultRow
from lte.report.fields import (
    AMOUNT,
    METHOD,
    OBJECT,
    POSITIVE,
    QUALITY,
    SHARE,
    TEXT,
    WHOLE,
    FieldKind,
    check_fields,
    many,
    named,
    one_of,
)
from lte.report.metrics import METRICS
from lte.report.older_rows import upgraded

_EVALUATION: dict[str, FieldKind] = {
    **dict.fromkeys(("command", "model", "mode"), TEXT),
    **dict.fromkeys(("sparsity", "weight_sparsity", "attention_sparsity"), SHARE),
    **dict.fromkeys(
        ("gflops_per_token", "gflops_per_token_dense", "num_tokens", "num_prompts", "num_questions"), AMOUNT
    ),
    **{metric.name: QUALITY for metric in METRICS},
    "method": METHOD,
    "layer_sparsity": many(SHARE),
    "made": many(OBJECT),
    "measured": OBJECT,
    "results": named(OBJECT),
    "generated": OBJECT,
    "num_samples": named(AMOUNT),
}
_RUN: dict[str, FieldKind] = {
    **dict.fromkeys(("command", "trained_by", "model", "recipe"), TEXT),
    "method": METHOD,
    "made": many(OBJECT),
    "measured": OBJECT,
    "seed": WHOLE,
    "target_sparsity": SHARE,
    "eta": QUALITY,
    "seconds": AMOUNT,
    "environment": named(TEXT),
    "steps": named(AMOUNT),
    "evaluation": OBJECT,
    "evals": many(OBJECT),
}
_STEP: dict[str, FieldKind] = {
    **dict.fromkeys(("command", "model"), TEXT),
    "kind": one_of(get_args(MeasuredOn)),
    "data": many(TEXT),
    "options": OBJECT,
}
_BENCH: dict[str, FieldKind] = {
    **dict.fromkeys(("dtype", "shape"), TEXT),
    **dict.fromkeys(("sparsity", "sparsity_asked", "union_sparsity"), SHARE),
    **dict.fromkeys(("speedup", "ideal_speedup"), POSITIVE),
    "tokens": AMOUNT,
}
_DRAWN = ("tokens", "sparsity", "sparsity_asked", "speedup", "ideal_speedup")
"""The fields of a row of ``lte bench ffn`` that are drawn."""


def read_result_rows(path: Path) -> list[ResultRow]:
    """Return the rows of a file: one for each line of ``.jsonl``, one in all of ``.json``.

    Raises:
        ValueError: the file is empty or not JSON, a row is no object, or a field of our rows has another type. The
            message names file, line and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): give results") from None
    if path.suffix == ".json":
        found = [_read(text, str(path))] if text.strip() else []
    else:
        lines = enumerate(text.split("\n"), 1)
        found = [_read(line, f"{path} line {number}") for number, line in lines if line.strip()]
    if path.name == SUMMARY and found and found[0].get("evaluation") is None:
        raise ValueError(
            f"{path} has no evaluation: run lte eval {path.parent} --text FILE --json and give a file with the line "
            "that it prints"
        )
    if not found:
        raise ValueError(f"{path} is empty: give a file that lte sweep, train, eval or bench has written")
    return found


def _read(text: str, where: str) -> ResultRow:
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half a character (a lone surrogate): write the row again") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", str(error))
        raise ValueError(f"{where} is not JSON ({reason}): a results file has one row on each line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object: a results file has one object on each line")
    row = upgraded(row)
    _check(row, where)
    return row


def _check(row: ResultRow, where: str) -> None:
    """Raise ValueError unless the fields of one of our rows are as we write them. Other rows are not checked."""
    if row.get("bench") is not None:
        check_fields(row, {"rows": many(OBJECT)}, where, ("rows",))
        for number, one in enumerate(row["rows"], 1):
            if "error" not in one:
                drawn = _DRAWN if {"speedup", "tokens"} <= one.keys() else ()
                check_fields(one, _BENCH, f"{where}, row {number}", drawn)
    elif "error" not in row and ("evaluation" in row or {"sparsity", "gflops_per_token"} <= row.keys()):
        check_fields(row, _RUN, where)
        _check_evaluation(row.get("evaluation") or row, where)
        for number, one in enumerate(row.get("evals") or (), 1):
            _check_evaluation(one, f"{where}, evaluation {number} of evals")
        if "evaluation" in row:
            _check_steps(row, where)


def _check_evaluation(one: ResultRow, where: str) -> None:
    check_fields(one, _EVALUATION, where)
    _check_steps(one, where)


def _check_steps(one: ResultRow, where: str) -> None:
    check_fields(one.get("measured") or {}, _STEP, f"{where}, measured")
    for number, step in enumerate(one.get("made") or (), 1):
        check_fields(step, _STEP, f"{where}, part {number} of made")
