"""Local stand-ins for what lm_eval's tasks take from the hub: their data, and the metric that runs programs.

So lm_eval's own definitions run as they are.
"""

import csv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lte.argument_error import Argument, ArgumentError
from lte.data.sources import read_rows
from lte.data.text_files import open_text
from lte.evaluation.programs import CodeEval

_LETTERS = ("A", "B", "C", "D")


def refuse_programs() -> None:
    """Raise ValueError: a task runs programs, and nobody has allowed it."""
    raise ArgumentError(
        "a task runs programs that the model writes: allow it with ", Argument("allow_code_execution", "True")
    )


@contextmanager
def stand_ins(folder: Path | None, allow_code_execution: bool) -> Iterator[None]:
    """Let tasks that are loaded inside the context read ``folder``, and run programs by :class:`CodeEval`.

    ``folder`` has ``gsm8k/train.jsonl`` and ``test.jsonl``, ``humaneval/HumanEval.jsonl.gz`` and
    ``mmlu/{dev,test}/*.csv``, as they were released. Any other data set of the hub may be in a folder of its own name,
    e.g. ``Rowan/hellaswag``. The rest comes from the hub.

    Raises:
        ValueError, OSError: a file is missing or is not as released; a task runs programs and may not.
    """
    import datasets
    import evaluate

    load, load_metric = datasets.load_dataset, evaluate.load

    def data(path: str, name: str | None = None, **options: Any) -> Any:
        assert folder is not None
        if reader := _READERS.get(path):
            return datasets.DatasetDict(
                {split: datasets.Dataset.from_list(rows) for split, rows in reader(folder, name or "")}
            )
        return load(str(folder / path) if (folder / path).is_dir() else path, name, **options)

    def metric(path: str, *args: Any, **options: Any) -> Any:
        if path != "code_eval":
            return load_metric(path, *args, **options)
        if not allow_code_execution:
            refuse_programs()
        return CodeEval()

    with ExitStack() as patches:
        patches.enter_context(patch.object(evaluate, "load", metric))
        if folder is not None:
            patches.enter_context(patch.object(datasets, "load_dataset", data))
        yield


Splits = Iterator[tuple[str, list[dict[str, Any]]]]


def _gsm8k(folder: Path, _name: str) -> Splits:
    for split in ("train", "test"):
        yield split, list(read_rows(folder / "gsm8k" / f"{split}.jsonl"))


def _humaneval(folder: Path, _name: str) -> Splits:
    yield "test", list(read_rows(folder / "humaneval" / "HumanEval.jsonl.gz"))


def _mmlu(folder: Path, subject: str) -> Splits:
    for split in ("test", "dev"):
        yield split, list(_questions(folder / "mmlu" / split / f"{subject}_{split}.csv"))


def _questions(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: MMLU's folder is needed as released, with dev/ and test/")
    with open_text(path) as file:
        try:
            rows = list(csv.reader(file, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}: {error}: it has to be CSV, as released") from None
    for number, (*asked, answer) in enumerate(filter(None, rows), 1):
        if len(asked) != 1 + len(_LETTERS) or answer not in _LETTERS:
            raise ValueError(f"{path}, row {number}: a row is a question, four choices and a letter A to D")
        yield {"question": asked[0], "choices": asked[1:], "answer": _LETTERS.index(answer)}


_READERS = {
    "openai/gsm8k": _gsm8k,
    "openai/openai_humaneval": _humaneval,
    "cais/mmlu": _mmlu,
    "hails/mmlu_no_train": _mmlu,
}
"""Readers of released files, by the hub's name of the data set."""
