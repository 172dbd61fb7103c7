"""Tasks of lm-evaluation-harness, run by ``lm_eval`` itself, with sparsity and cost of the same passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lte.data.tokenise import wrapping
from lte.evaluation.measuring import Spent, measure, spent
from lte.surgery.loading import check_causal

_BOOTSTRAP = 1000  # resamplings for errors of metrics that are no mean; lm_eval's 100,000 take minutes


@dataclass(kw_only=True)
class HarnessEvaluation(Spent):
    """What tasks of lm_eval showed.

    Sparsity and cost are those of every token that was computed, once for each time: a question that is scored with
    four answers in four passes counts four times, one whose answers are read off one pass counts once. Padding is left
    out. Of texts that end early in a batch, what the batch still computes for them counts.

    Attributes:
        results: of each task (or group) its values under lm_eval's own names, e.g. ``{"arc_easy": {"acc,none": 0.61,
            "acc_stderr,none": 0.01}}``.
        num_samples: of each task the questions asked.
        shots: of each task the examples before a question.
    """

    results: dict[str, dict[str, float]]
    num_samples: dict[str, int]
    shots: dict[str, int]


@dataclass(frozen=True)
class Tasks:
    """Tasks by their names, and the ``lm_eval.tasks.TaskManager`` that knows them."""

    names: list[str]
    manager: Any


def find_tasks(names: Sequence[str], folder: str | Path | None = None) -> Tasks:
    """The tasks that ``names`` mean, patterns such as ``mmlu_*`` resolved. Takes seconds: lm_eval reads all it has.

    Args:
        names: of tasks, groups or tags of lm_eval.
        folder: YAML files of tasks of one's own, as ``lm_eval --include_path``.

    Raises:
        ValueError: no name, one that nothing is called by; no such folder.
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
    """Run tasks of lm_eval on ``model`` in its present mode.

    Args:
        model: a causal language model, on any device.
        tokenizer: the model's.
        tasks: as :func:`find_tasks` gives them.
        shots: examples before a question; None takes each task's own number.
        limit: only the first questions of each task.
        batch_size: rows a forward pass.

    Raises:
        ValueError: not a causal language model.
        OSError: a task's data cannot be had.
    """
    check_causal(model.config, "lm_eval's tasks ask")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models import huggingface

    harness: Any = huggingface  # its decorators hide the class from a checker
    was_training = model.training
    lm = harness.HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        add_bos_token=bool(wrapping(tokenizer)[0]),  # versions differ in what they take where nothing is said
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
    """Say what lm_eval does not: it scores a batch of rows padded on the right with token 0, and gives no mask.

    A shorter row that itself ends in token 0 loses that token in the count, and nothing else by it: the model is not
    told (:func:`_forget_padding`), nor need it be, as no token before sees the padding.
    """
    if len(args) == 1 and not kwargs:
        padding_BT = args[0].eq(0).flip(-1).cumprod(-1).flip(-1)
        padding_BT[:, 0] = 0  # a row may be nothing but a BOS that is token 0
        if padding_BT.any():
            kwargs = {"attention_mask": 1 - padding_BT}
    return args, kwargs


def _forget_padding(_model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {} if len(args) == 1 and kwargs.keys() == {"attention_mask"} else kwargs


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Of a task's results the values; lm_eval keeps its name, and N/A for what it did not estimate, beside them."""
    return {
        name: float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, int | float) and not isinstance(value, bool)
    }
