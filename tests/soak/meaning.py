"""Which damage no check can see: a whole file that says something else.

A flipped bit of a weight is another weight; 0.01 instead of 0.02 in a config is another model; a missing key of a
config is its default. Whoever reads such a file cannot know. A value of another type, a tensor with another name, a
table whose rows have another width, a cut-off file can be known, so it must be told.
"""

import csv
import gzip
import io
import json
import math
from pathlib import Path
from typing import Any

import yaml
from formats import layout

OPTIONAL = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
OURS = ("lte", "teal", "pruning")
"""Sections of a config that this package writes and reads: nothing in them has a default."""


def unseen(name: str, before: bytes, after: bytes | None) -> bool:
    """Whether a file (None: it is gone) is whole, and only says something else than before."""
    name = Path(name).name
    if after is None:
        return name in OPTIONAL
    try:
        return _unseen(name, before, after)
    except Exception:  # it does not parse: whatever reads it can see that
        return False


def _unseen(name: str, before: bytes, after: bytes) -> bool:
    if name.endswith(".gz"):
        return gzip.decompress(after) != gzip.decompress(before) and _unseen(
            name[:-3], *map(gzip.decompress, (before, after))
        )
    if name.endswith(".index.json"):
        return False
    if name == "rows.json":  # data: a number is a text, too
        return all(isinstance(row, dict) for row in json.loads(after))
    if name == "lte_training.json":
        return _alike(json.loads(before), json.loads(after), result=True)
    if name.endswith(".json"):
        return _alike(_json(before), _json(after))
    if name.endswith(".jsonl"):
        rows, found = ([json.loads(line) for line in one.split(b"\n") if line.strip()] for one in (before, after))
        if name == "results.jsonl" and len(rows) == len(found):
            return _alike(rows, found, result=True)
        return all(isinstance(row, dict) for row in found)
    if name.endswith(".yaml"):
        return _alike(yaml.safe_load(before), yaml.safe_load(after))
    if name.endswith((".csv", ".tsv")):
        if name.endswith(".tsv") and len({line.count("\t") for line in after.decode().splitlines() if line}) == 1:
            return True  # a quote in it may be a character like others
        delimiter = "," if name.endswith(".csv") else "\t"
        rows = list(csv.reader(io.StringIO(after.decode(), newline=""), delimiter=delimiter, strict=True))
        return len({len(row) for row in rows if row}) == 1
    if name.endswith((".txt", ".jinja")):
        return bool(after.decode().strip())
    found, was = layout(name, after), layout(name, before)
    assert found is not None
    assert was is not None
    if name.endswith(".gguf"):
        same = found.says[0] == was.says[0] and found.says[2] == was.says[2]
        return same and found.finite and _alike(was.says[1], found.says[1])
    return found.says == was.says and found.finite


def _json(content: bytes) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(content, parse_constant=refuse)


def _alike(before: Any, after: Any, result: bool = False) -> bool:
    """Whether values have the same types; what one of two dicts or lists lacks, and null, may be a default.

    Of results a quality may be NaN or infinite, as a run that failed has it, and a method may be a name alone.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        ours = [(before[key], after.get(key)) for key in OURS if isinstance(before.get(key), dict)]
        whole = all(isinstance(now, dict) and then.keys() == now.keys() for then, now in ours)
        return whole and all(_alike(before[key], after[key], result) for key in before.keys() & after.keys())
    if isinstance(before, list) and isinstance(after, list):
        return all(_alike(*pair, result) for pair in zip(before, after, strict=False))
    if before is None or after is None:
        return True
    if result and isinstance(before, dict) and "method" in before and isinstance(after, str):
        return True
    if isinstance(before, int | float) and isinstance(after, int | float):
        return isinstance(before, bool) == isinstance(after, bool) and (result or math.isfinite(after))
    return type(before) is type(after)
