"""Runs tasks of lm-evaluation-harness by ``lm_eval``, with sparsity and cost of the same passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lte.data.tokenise import wrapping
from lte.evaluation.measuring import Spent, measure, spent
from lte.surgery.loading import check_causal

_BOOTSTRAP = 1000  # resamplings for the errors of metrics that are no means; lm_eval's 100,000 take minutes


@dataclass(kw_only=True)
class HarnessEvaluation(Spent):
    """The results of tasks of lm_eval.

    Sparsity and cost are those of every computed token. If a question is scored in four passes with four answers, its
    tokens count four times. If one pass scores all answers, they count once. Padding does not count. If a text ends
    early in a batch, the tokens that the batch still computes for it count.

    Attributes:
        results: values of each task (or group) under lm_eval's names, e.g. ``{"arc_easy": {"acc,none": 0.61,
            "acc_stderr,none": 0.01}}``.
        num_samples: number of questions of each task.
        shots: number of examples before a question of each task.
    """

    results: dict[str, dict[str, float]]
    num_samples: dict[str, int]
    shots: dict[str, int]


@dataclass(frozen=True)
class Tasks:
    """Names of tasks, and the ``lm_eval.tasks.TaskManager`` that knows them."""

    names: list[str]
    manager: Any


def find_tasks(names: Sequence[str], folder: str | Path | None = None) -> Tasks:
    """Return the tasks of ``names``, which may be patterns such as ``mmlu_*``. It takes seconds.

    Args:
        names: of tasks, groups or tags of lm_eval.
        folder: a folder with your own tasks as YAML files, as for ``lm_eval --include_path``.

    Raises:
        ValueError: no name is given, a name is unknown, or there is no such folder.
        ImportError: lm_eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('tasks need the package lm_eval: pip install "lte[eval]"') from error
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"{folder}: there is no such folder of tasks")
    if not names:
        raise ValueError("no task is named: give some of lm_eval's, e.g. hellaswag,arc_easy")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    found = {name: manager.match_tasks([name]) for name in names}
    for name in (name for name, matched in found.items() if not matched):
        near = get_close_matches(name, manager.all_tasks, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them all"
        raise ValueError(f"lm_eval knows no task {name!r}: {hint}")
    return Tasks(list(dict.fromkeys(task for matched in found.values() for task in matched)), manager)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> HarnessEvaluation:
    """Run tasks of lm_eval on ``model`` in its current mode.

    Args:
        model: a causal language model, on any device.
        tokenizer: the model's.
        tasks: the result of :func:`find_tasks`.
        shots: number of examples before a question. None takes each task's own number.
        limit: only the first questions of each task.
        batch_size: rows of a forward pass.

    Raises:
        ValueError: not a causal language model.
        OSError: the data of a task cannot be loaded.
    """
    check_causal(model.config, "lm_eval's tasks ask")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models import huggingface

    harness: Any = huggingface  # its decorators hide the class from the type checker
    was_training = model.training
    lm = harness.HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        add_bos_token=bool(wrapping(tokenizer)[0]),  # versions have different defaults
    )
    with measure(model) as meter:
        marked = model.register_forward_pre_hook(_mark_padding, with_kwargs=True, prepend=True)  # before the meter's
        unmarked = model.register_forward_pre_hook(_forget_padding, with_kwargs=True)  # after it
        try:
            found: Any = simple_evaluate(
                lm,
                tasks=[*tasks.names],
                num_fewshot=shots,
                limit=limit,
                batch_size=batch_size,
                task_manager=tasks.manager,
                log_samples=False,
                bootstrap_iters=_BOOTSTRAP,
            )
        finally:
            marked.remove()
            unmarked.remove()
            model.train(was_training)
    return HarnessEvaluation(
        results={name: _numbers(values) for name, values in {**found["results"], **found.get("groups", {})}.items()},
        num_samples={name: counts["effective"] for name, counts in found["n-samples"].items()},
        shots=found["n-shot"],
        **vars(spent(model, meter)),
    )


def _mark_padding(_model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Add the mask that lm_eval does not give: it pads rows on the right with token 0.

    If a shorter row itself ends in token 0, that token does not count. Nothing else changes: the model does not get the
    mask (:func:`_forget_padding`) and does not need it, because no earlier token sees the padding.
    """
    if len(args) == 1 and not kwargs:
        padding_BT = args[0].eq(0).flip(-1).cumprod(-1).flip(-1)
        padding_BT[:, 0] = 0  # a row may be only a BOS that is token 0
        if padding_BT.any():
            kwargs = {"attention_mask": 1 - padding_BT}
    return args, kwargs


def _forget_padding(_model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {} if len(args) == 1 and kwargs.keys() == {"attention_mask"} else kwargs


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among a task's results. lm_eval also has the name there, and N/A for missing estimates."""
    return {
        name: float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, int | float) and not isinstance(value, bool)
    }
