"""Runs tasks of lm-evaluation-harness by ``lm_eval``, with sparsity and cost of the same tokens."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lte.argument_error import Argument, ArgumentError
from lte.evaluation.local_tasks import refuse_programs, stand_ins
from lte.evaluation.measuring import Spent, spent
from lte.modules.sparsity_meter import SparsityMeter
from lte.surgery.loading import check_causal

_BOOTSTRAP = 1000  # resamplings for the errors of metrics that are no means; lm_eval's 100,000 take minutes


@dataclass(kw_only=True)
class HarnessEvaluation(Spent):
    """The results of tasks of lm_eval.

    Sparsity and cost are those of every token of scored rows, prompts and generated texts. If a question is scored in
    four passes with four answers, its tokens count four times. If one pass scores all answers, they count once. Padding
    does not count, nor does what a batch computes after the end of a text.

    Attributes:
        results: values of each task (or group) under lm_eval's names, e.g. ``{"arc_easy": {"acc,none": 0.61,
            "acc_stderr,none": 0.01}}``.
        num_samples: number of questions of each task and group.
        shots: number of examples before a question of each task.
        generated: number, sparsity and cost of the generated tokens alone; None if no task generates.
        predictions: lm_eval's sample of each question, without the question: its responses, target and metrics.
    """

    results: dict[str, dict[str, float]]
    num_samples: dict[str, int]
    shots: dict[str, int]
    generated: dict[str, Any] | None = None
    predictions: list[dict[str, Any]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Tasks:
    """Tasks and groups of lm_eval with their data, for one number of examples, and the manager that loaded them."""

    found: list[Any]
    manager: Any
    shots: int | None

    @property
    def names(self) -> list[str]:
        """The names of all tasks, without groups."""
        return list(self.manager.load(self.found)["tasks"])


def find_tasks(
    names: Sequence[str],
    include_path: str | Path | None = None,
    data_folder: str | Path | None = None,
    *,
    shots: int | None = None,
    allow_code_execution: bool = False,
) -> Tasks:
    """Return the tasks of ``names``, which may be patterns such as ``mmlu_*``, with their data. It takes seconds.

    Args:
        names: of tasks, groups or tags of lm_eval.
        include_path: a folder with your own tasks as YAML files, as for ``lm_eval --include_path``.
        data_folder: a folder with released data, in place of the hub: see
            :func:`~lte.evaluation.local_tasks.stand_ins`.
        shots: number of examples before a question. None takes each task's own number.
        allow_code_execution: whether tasks may run programs that the model writes, as HumanEval does: see
            :func:`~lte.evaluation.programs.runs`.

    Raises:
        ValueError: no name is given, a name is unknown, there is no such folder, a task runs programs and may not, or
            data is not as released.
        OSError: data is missing.
        ImportError: lm_eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError('tasks need the package lm_eval: pip install "lte[eval]"') from error
    for folder in (include_path, data_folder):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{folder}: there is no such folder")
    if not names:
        raise ValueError("no task is named: give some of lm_eval's, e.g. hellaswag,arc_easy")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    matched = dict.fromkeys(one for name in names for one in _matches(manager, name))
    with stand_ins(None if data_folder is None else Path(data_folder), allow_code_execution):
        found = [one for name in matched for one in _loaded(manager, name)]
    tasks = Tasks(found, manager, shots)
    loaded = manager.load(found)["tasks"].values()
    if not allow_code_execution and any(getattr(task, "UNSAFE_CODE", False) for task in loaded):
        refuse_programs()
    return tasks


def _matches(manager: Any, name: str) -> list[str]:
    if matched := manager.match_tasks([name]):
        return matched
    near = get_close_matches(name, manager.all_tasks, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them all"
    raise ValueError(f"lm_eval knows no task {name!r}: {hint}")


def _loaded(manager: Any, name: str) -> list[Any]:
    """Return a group, a task, or all tasks of a tag."""
    loaded = manager.load(name)
    return [loaded["groups"][name]] if name in loaded.get("groups", {}) else list(loaded["tasks"].values())


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> HarnessEvaluation:
    """Run tasks of lm_eval on ``model`` in its current mode. Texts are generated by :func:`lte.generate`.

    The answers are those of lm_eval's own model ``hf``, whatever the batch size, except where rounding decides.

    Args:
        model: a causal language model, on any device. Decoding is fastest after :func:`lte.optimize_`.
        tokenizer: the model's.
        tasks: the result of :func:`find_tasks`.
        limit: only the first questions of each task.
        batch_size: rows of a forward pass, or prompts that are decoded together.
        apply_chat_template: whether questions are turns of a chat, each example a turn of its own.
        progress: wraps the iteration over generated texts, while their sparsity is measured.

    Raises:
        ValueError: not a causal language model, or no chat template.
    """
    check_causal(model.config, "lm_eval's tasks ask")
    if apply_chat_template and not tokenizer.chat_template:
        raise ArgumentError("the tokenizer has no chat template: leave out ", Argument("apply_chat_template"))
    from lm_eval.evaluator import simple_evaluate

    from lte.evaluation.harness_model import LoopLM

    was_training = model.training
    lm = LoopLM(model, tokenizer, batch_size, progress)
    try:
        found: Any = simple_evaluate(
            lm,  # pyright: ignore[reportArgumentType]
            tasks=[*tasks.found],
            num_fewshot=tasks.shots,
            limit=limit,
            batch_size=batch_size,
            task_manager=tasks.manager,
            bootstrap_iters=_BOOTSTRAP,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            confirm_run_unsafe_code=True,  # find_tasks has asked
        )
    finally:
        model.train(was_training)
    return HarnessEvaluation(
        results={name: _numbers(values) for name, values in {**found["results"], **found.get("groups", {})}.items()},
        num_samples=_questions(tasks, {name: counts["effective"] for name, counts in found["n-samples"].items()}),
        shots=found["n-shot"],
        generated=_generated(model, lm),
        predictions=[_prediction(name, one) for name, several in found["samples"].items() for one in several],
        **vars(spent(model, _together(lm.meters))),
    )


def _questions(tasks: Tasks, counts: dict[str, int]) -> dict[str, int]:
    groups = tasks.manager.load(tasks.found).get("groups", {})
    return counts | {
        name: sum(counts[task.task_name] for task in group.get_all_tasks()) for name, group in groups.items()
    }


def _together(meters: Sequence[SparsityMeter]) -> SparsityMeter:
    """Return what all meters have counted: an empty meter if nothing is measured because the model is dense."""
    total, *others = meters or [SparsityMeter()]
    for one in others:
        total.include(one)
    return total


def _generated(model: PreTrainedModel, lm: Any) -> dict[str, Any] | None:
    if not lm.new_tokens:
        return None
    return {"num_tokens": lm.new_tokens, **asdict(spent(model, lm.of_new or SparsityMeter()))}


def _prediction(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    kept = ("doc_id", "filter", "target", "resps", "filtered_resps", *sample["metrics"])
    return {"task": task, **{name: sample[name] for name in kept}}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among a task's results. lm_eval also has the name there, and N/A for missing estimates."""
    return {
        name: float(value)
        for name, value in values.items()
        if "," in name and isinstance(value, int | float) and not isinstance(value, bool)
    }
