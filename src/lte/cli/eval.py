"""``lte eval``: quality, sparsity and cost of a model, by what it predicts, by what it generates, or by lm_eval."""

import json
import logging
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lte.cli.console import print_json, track
from lte.cli.eval_tables import show, show_generated, show_tasks
from lte.cli.main import parse
from lte.cli.options import DeviceOptions, Model, as_written, open_model, optimize_where_possible_
from lte.evaluation.evaluate import evaluate
from lte.evaluation.generation import evaluate_generation
from lte.evaluation.harness import evaluate_tasks, find_tasks
from lte.evaluation.inputs import Inputs, pad_alike_
from lte.evaluation.measuring import Spent
from lte.evaluation.origin import evaluation_record
from lte.evaluation.record import Measured, given
from lte.files import write_whole
from lte.ops.quantise import Quantised
from lte.ops.sparse_ffn import BackendName
from lte.surgery.convert import set_mode_
from lte.surgery.loading import Head, check_causal, load_config, load_tokenizer
from lte.surgery.method import mode_of

logger = logging.getLogger(__name__)


@dataclass
class HarnessOptions:
    """Tasks of lm-evaluation-harness, instead of your own data."""

    tasks: str | None = None
    """Run these of lm_eval's tasks, e.g. mmlu,gsm8k,humaneval, or patterns such as mmlu_*."""
    data_folder: str | None = None
    """With --tasks: read data here, not from the hub: gsm8k/*.jsonl, humaneval/HumanEval.jsonl.gz, mmlu/{dev,test}/ as
    released, and other data sets in folders of their hub names."""
    include_path: str | None = None
    """With --tasks: a folder of YAML files with tasks of your own, as lm_eval --include_path."""
    num_fewshot: int | None = None
    """With --tasks: number of examples before a question. The default is each task's own number."""
    limit: int | None = None
    """With --tasks: only the first questions of each."""
    apply_chat_template: bool = False
    """With --tasks: put questions into the tokenizer's chat template, as lm_eval --apply_chat_template."""
    allow_code_execution: bool = False
    """With --tasks: run programs that the model writes (HumanEval), in processes with limits (docs/evaluation.md)."""


@dataclass
class Eval:
    model: Model
    """A local folder, a hub id, or a .gguf file; dense or sparse."""
    mode: Literal["saved", "dense", "soft", "hard"] = "saved"
    """The mode of a sparse model; saved is the mode in which it was saved (hard after training)."""
    batch_size: int = 8
    """Rows of a forward pass, or prompts that are decoded together."""
    max_rows: int | None = None
    """Take only the first rows (blocks; with --generate prompts) of the data."""
    generate: bool = False
    """Task generation: also complete every prompt and compare with all its completions in the data: ROUGE, BLEU.
    Sparsity and cost are then those of prompts and generated texts."""
    max_new_tokens: int = 128
    """With --generate: the most tokens of a text."""
    num_beams: int = 1
    """With --generate: 1 is greedy."""
    predictions: str | None = None
    """With --generate or --tasks: a .jsonl file to write. A line has a prompt with its prediction and references, or a
    question's answer and its score."""
    backend: BackendName = "auto"
    """The backend for the FFNs of a model in mode hard, see lte generate."""
    weights: Quantised | None = None
    """int8 or int4: quantise a sparse model before it is measured. None: as it was saved."""
    json: bool = False
    """Print one JSON object on the last line."""
    data: Inputs = field(default_factory=Inputs)
    harness: HarnessOptions = field(default_factory=HarnessOptions)
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options = parse_eval(argv)
    options.data = as_written(options.data)
    device, dtype = options.where.resolve()
    config = load_config(options.model, options.where.trust_remote_code)
    tokenizer = load_tokenizer(options.model, options.where.trust_remote_code)
    measure = _run_tasks if options.harness.tasks is not None else _generate if options.generate else _predict
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
        pairs = zip(references.items(), generated.predictions, strict=True)
        rows = ({"prompt": one, "prediction": made, "references": right} for (one, right), made in pairs)
        _write_rows(Path(options.predictions), rows)
    perplexity = evaluate(model, dataset, options.batch_size, lambda batches: track(batches, "references")).perplexity
    show_generated(generated, perplexity)
    return generated, {"perplexity": perplexity}


def _run_tasks(options: Eval, config: PretrainedConfig, tokenizer: Any, opened: Opened) -> Found:
    asked = options.harness
    assert asked.tasks is not None
    check_causal(config, "lm_eval's tasks ask")
    tasks = find_tasks(
        _names(asked.tasks),
        asked.include_path,
        asked.data_folder,
        shots=asked.num_fewshot,
        allow_code_execution=asked.allow_code_execution,
    )
    if tokenizer.chat_template and not asked.apply_chat_template:
        logger.warning("the tokenizer has a chat template: an instruct model wants --apply-chat-template")
    result = evaluate_tasks(
        opened("causal"),
        tokenizer,
        tasks,
        limit=asked.limit,
        batch_size=options.batch_size,
        apply_chat_template=asked.apply_chat_template,
        progress=lambda batches: track(batches, "measuring sparsity"),
    )
    if options.predictions:
        _write_rows(Path(options.predictions), result.predictions)
    show_tasks(result)
    return result, {}


def _measured(options: Eval) -> Measured:
    if options.harness.tasks is None:
        return Measured("data", options.data.text, given(options))
    elsewhere = ("tasks", "data_folder", "allow_code_execution")
    how = {name: value for name, value in given(options).items() if name not in elsewhere}
    return Measured("lm_eval", tuple(_names(options.harness.tasks)), how)


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
        if not (options.generate or options.harness.tasks):
            raise ValueError("there are no predictions to write without --generate or --tasks")
        if not Path(options.predictions).parent.is_dir():
            raise ValueError(f"{options.predictions}: there is no such folder to write to")
    if options.harness.tasks is None:
        if options.harness != HarnessOptions():
            given_without = ", ".join(given(options.harness))
            raise ValueError(f"{given_without}: this is for tasks of lm_eval: name some with --tasks")
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


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
