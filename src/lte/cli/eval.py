"""``lte eval``: quality, sparsity and cost of a model, by what it predicts, generates, answers, or by lm_eval."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lte.cli.console import print_json, track
from lte.cli.eval_tables import show, show_answered, show_generated, show_tasks
from lte.cli.main import parse
from lte.cli.options import DeviceOptions, Model, as_written, open_model, optimize_where_possible_
from lte.evaluation.evaluate import evaluate
from lte.evaluation.generation import evaluate_generation
from lte.evaluation.harness import evaluate_tasks, find_tasks
from lte.evaluation.inputs import Inputs, pad_alike_
from lte.evaluation.measuring import Spent
from lte.evaluation.mmlu import evaluate_mmlu
from lte.evaluation.mmlu_questions import Split, read_mmlu
from lte.evaluation.origin import evaluation_record
from lte.evaluation.record import Measured, given
from lte.files import write_whole
from lte.ops.quantise import Quantised
from lte.ops.sparse_ffn import BackendName
from lte.surgery.convert import set_mode_
from lte.surgery.loading import Head, check_causal, load_config, load_tokenizer
from lte.surgery.method import mode_of


@dataclass
class MMLUOptions:
    """MMLU, instead of your own data."""

    mmlu: str | None = None
    """Answer MMLU's questions: a folder as it was released, with dev/ and test/."""
    shots: int = 5
    """With --mmlu: number of examples before a question. There are fewer if they have no room."""
    split: Split = "test"
    """With --mmlu: the split with the questions."""
    subjects: tuple[str, ...] = ()
    """With --mmlu: only these subjects, e.g. anatomy high_school_physics."""


@dataclass
class HarnessOptions:
    """Tasks of lm-evaluation-harness, instead of your own data."""

    tasks: str | None = None
    """Run these of lm_eval's tasks, e.g. hellaswag,arc_easy, or patterns such as mmlu_*."""
    tasks_folder: str | None = None
    """With --tasks: a folder of YAML files with tasks of your own, as lm_eval --include_path."""
    num_fewshot: int | None = None
    """With --tasks: number of examples before a question. The default is each task's own number."""
    limit: int | None = None
    """With --tasks: only the first questions of each."""


@dataclass
class Eval:
    model: Model
    """A local folder, a hub id, or a .gguf file; dense or sparse."""
    mode: Literal["saved", "dense", "soft", "hard"] = "saved"
    """The mode of a sparse model; saved is the mode in which it was saved (hard after training)."""
    batch_size: int = 8
    """Rows of a forward pass, or prompts that are decoded together."""
    max_rows: int | None = None
    """Take only the first rows (blocks; with --generate prompts) of the data, or with --mmlu questions of a subject."""
    generate: bool = False
    """Task generation: also complete every prompt and compare with all its completions in the data: ROUGE, BLEU.
    Sparsity and cost are then those of prompts and generated texts."""
    max_new_tokens: int = 128
    """With --generate: the most tokens of a text."""
    num_beams: int = 1
    """With --generate: 1 is greedy."""
    predictions: str | None = None
    """With --generate: a .jsonl file to write. A line has a prompt with its prediction and references."""
    backend: BackendName = "auto"
    """The backend for the FFNs of a model in mode hard, see lte generate."""
    weights: Quantised | None = None
    """int8 or int4: quantise a sparse model before it is measured. None: as it was saved."""
    json: bool = False
    """Print one JSON object on the last line."""
    data: Inputs = field(default_factory=Inputs)
    questions: MMLUOptions = field(default_factory=MMLUOptions)
    harness: HarnessOptions = field(default_factory=HarnessOptions)
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options = parse_eval(argv)
    options.data = as_written(options.data)
    device, dtype = options.where.resolve()
    config = load_config(options.model, options.where.trust_remote_code)
    tokenizer = load_tokenizer(options.model, options.where.trust_remote_code)
    if options.questions.mmlu is not None:
        measure = _answer_mmlu
    elif options.harness.tasks is not None:
        measure = _run_tasks
    else:
        measure = _generate if options.generate else _predict
    result, further = measure(options, config, tokenizer, lambda head: _open(options, head, device, dtype))
    if options.json:
        command = shlex.join(["lte", "eval", *argv])
        record = evaluation_record(command, options.model, config, _measured(options), result, device, **further)
        print_json(record.flat_row())


Opened = Callable[[Head], PreTrainedModel]
"""The model with a head: loaded once the data has been read."""
Found = tuple[Spent, dict[str, Any]]
"""What was measured, and further values by name."""


def _predict(options: Eval, config: PretrainedConfig, tokenizer: Any, opened: Opened) -> Found:
    dataset = options.data.load(options.data.text, tokenizer, config, max_rows=options.max_rows)
    model = opened(options.data.head(config))
    pad_alike_(model, dataset)
    result = evaluate(model, dataset, options.batch_size, progress=lambda batches: track(batches, "evaluating"))
    show(result)
    return result, {}


def _generate(options: Eval, config: PretrainedConfig, tokenizer: Any, opened: Opened) -> Found:
    references, dataset = options.data.load_references(tokenizer, config, options.max_rows)
    model = opened(options.data.head(config))
    pad_alike_(model, dataset)
    generated = evaluate_generation(
        model,
        references,
        tokenizer,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        sequence_length=options.data.data.sequence_length,
        progress=lambda batches: track(batches, "generating"),
    )
    if options.predictions:
        _write_predictions(Path(options.predictions), references, generated.predictions)
    perplexity = evaluate(model, dataset, options.batch_size, lambda batches: track(batches, "references")).perplexity
    show_generated(generated, perplexity)
    return generated, {"perplexity": perplexity}


def _answer_mmlu(options: Eval, config: PretrainedConfig, tokenizer: Any, opened: Opened) -> Found:
    asked = options.questions
    assert asked.mmlu is not None
    check_causal(config, "MMLU asks")
    subjects = read_mmlu(asked.mmlu, asked.split, asked.subjects, options.max_rows, examples=asked.shots > 0)
    result = evaluate_mmlu(
        opened("causal"),
        subjects,
        tokenizer,
        shots=asked.shots,
        batch_size=options.batch_size,
        progress=lambda batches: track(batches, "answering"),
    )
    show_answered(result)
    return result, {}


def _run_tasks(options: Eval, config: PretrainedConfig, tokenizer: Any, opened: Opened) -> Found:
    asked = options.harness
    assert asked.tasks is not None
    check_causal(config, "lm_eval's tasks ask")
    tasks = find_tasks(_names(asked.tasks), asked.tasks_folder)
    result = evaluate_tasks(
        opened("causal"),
        tokenizer,
        tasks,
        shots=asked.num_fewshot,
        limit=asked.limit,
        batch_size=options.batch_size,
    )
    show_tasks(result)
    return result, {}


def _measured(options: Eval) -> Measured:
    how = {name: value for name, value in given(options).items() if name not in ("mmlu", "tasks")}
    if options.questions.mmlu is not None:
        return Measured("MMLU", (options.questions.mmlu,), how)
    if options.harness.tasks is not None:
        return Measured("lm_eval", tuple(_names(options.harness.tasks)), how)
    return Measured("data", options.data.text, how)


def _names(tasks: str) -> list[str]:
    return [name.strip() for name in tasks.split(",") if name.strip()]


def _open(options: Eval, head: Head, device: torch.device, dtype: torch.dtype | str) -> PreTrainedModel:
    """Return the model in the wanted mode. It skips idle experts if it can."""
    model = open_model(options.model, head, device, dtype, options.where.trust_remote_code)
    if options.mode != "saved":
        set_mode_(model, options.mode)
    if options.backend != "auto" or options.weights is not None or mode_of(model.config) == "hard":
        optimize_where_possible_(model, options.backend, options.weights)
    return model


def parse_eval(argv: Sequence[str]) -> Eval:
    """Return the options, checked as far as possible before a model is loaded.

    Raises:
        UsageError: the options cannot be parsed.
        ValueError: an option is out of its range, or the option that it belongs to is missing.
    """
    options: Eval = parse(Eval, "eval", argv)
    limits = {name: getattr(options, name) for name in ("max_rows", "batch_size", "max_new_tokens", "num_beams")}
    for name, value in {**limits, "limit": options.harness.limit}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: give at least 1")
    if options.harness.num_fewshot is not None and options.harness.num_fewshot < 0:
        raise ValueError(f"num_fewshot is {options.harness.num_fewshot}: give at least 0")
    if options.predictions:
        if not options.generate:
            raise ValueError("there are no predictions to write without --generate")
        if not Path(options.predictions).parent.is_dir():
            raise ValueError(f"{options.predictions}: there is no such folder to write to")
    if options.questions.mmlu is None:
        if options.questions != MMLUOptions():
            raise ValueError("shots, split and subjects are for MMLU: give its folder with --mmlu")
    elif _has_data(options) or options.harness.tasks is not None:
        raise ValueError("MMLU brings its own data and task: leave --text, --task, --tasks and --generate out")
    if options.harness.tasks is None:
        if options.harness != HarnessOptions():
            raise ValueError("tasks_folder, num_fewshot and limit are for tasks of lm_eval: name some with --tasks")
    elif _has_data(options) or options.max_rows is not None:
        raise ValueError(
            "tasks of lm_eval bring their own data: leave --text, --task and --generate out, and use --limit for "
            "--max-rows"
        )
    if options.generate and options.data.task != "generation":
        raise ValueError(f"only the task generation can be generated, not {options.data.task}: give --task generation")
    return options


def _has_data(options: Eval) -> bool:
    return bool(options.data.text) or options.generate or options.data.task != "language_modelling"


def _write_predictions(path: Path, references: dict[str, list[str]], predictions: list[str]) -> None:
    rows = (
        {"prompt": prompt, "prediction": prediction, "references": several}
        for (prompt, several), prediction in zip(references.items(), predictions, strict=True)
    )
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
