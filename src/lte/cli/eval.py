"""``lte eval``: quality, sparsity and cost of a model, by what it predicts, generates, or answers to MMLU."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lte.cli.console import print_json, table, track
from lte.cli.main import parse
from lte.cli.options import DataOptions, DeviceOptions, Model, open_model, optimize_where_possible_
from lte.evaluation.evaluate import Evaluation, evaluate
from lte.evaluation.generation import GenerationEvaluation, evaluate_generation
from lte.evaluation.mmlu import MMLUEvaluation, check_causal, evaluate_mmlu
from lte.evaluation.mmlu_questions import CATEGORIES, Split, read_mmlu
from lte.ops.sparse_ffn import BackendName
from lte.surgery.convert import set_mode_
from lte.surgery.loading import Head, load_config, load_tokenizer


@dataclass
class MMLUOptions:
    """MMLU, instead of data of one's own."""

    mmlu: str | None = None
    """Answer MMLU's questions: a folder as it was released, with dev/ and test/."""
    shots: int = 5
    """With --mmlu: examples before a question, fewer where they have no room."""
    split: Split = "test"
    """With --mmlu: which questions."""
    subjects: tuple[str, ...] = ()
    """With --mmlu: only these, e.g. anatomy high_school_physics."""


@dataclass
class Eval:
    model: Model
    """A local folder, a hub id, or a .gguf file; dense or sparse."""
    mode: Literal["saved", "dense", "soft", "hard"] = "saved"
    """How a sparse model runs; saved is how it was saved (hard after training)."""
    batch_size: int = 8
    """Rows a forward pass, prompts decoded together."""
    max_rows: int | None = None
    """Only the first rows (blocks; with --generate prompts) of the data; with --mmlu, questions of each subject."""
    generate: bool = False
    """Task generation: complete every prompt too, and compare with all its completions in the data: ROUGE, BLEU.
    Sparsity and cost are then those of prompts and texts."""
    max_new_tokens: int = 128
    """With --generate: where a text is cut that does not end."""
    num_beams: int = 1
    """With --generate: 1 is greedy."""
    predictions: str | None = None
    """With --generate: a .jsonl file to write, a prompt with its prediction and references a line."""
    backend: BackendName = "auto"
    """What computes the FFNs of a model in mode hard, see lte generate."""
    json: bool = False
    """Print one JSON object on the last line."""
    data: DataOptions = field(default_factory=DataOptions)
    questions: MMLUOptions = field(default_factory=MMLUOptions)
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options = parse_eval(argv)
    device, dtype = options.where.resolve()
    config, tokenizer = load_config(options.model), load_tokenizer(options.model)
    if options.questions.mmlu is not None:
        _mmlu(options, options.questions.mmlu, config, tokenizer, device, dtype)
        return
    references = {}
    if options.generate:
        references, dataset = options.data.load_references(tokenizer, config, options.max_rows)
    else:
        dataset = options.data.load(options.data.text, tokenizer, config)
        dataset = dataset if options.max_rows is None else dataset.head(options.max_rows)
    model = _open(options, options.data.head(config), device, dtype)
    if not options.generate:
        result = evaluate(model, dataset, options.batch_size, progress=lambda batches: track(batches, "evaluating"))
        show(result)
        if options.json:
            print_json(asdict(result))
        return
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
    if options.json:
        values = {name: value for name, value in asdict(generated).items() if name != "predictions"}
        print_json({**values, "perplexity": perplexity})


def _mmlu(
    options: Eval,
    folder: str,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype | str,
) -> None:
    asked = options.questions
    check_causal(config)
    subjects = read_mmlu(folder, asked.split, asked.subjects, options.max_rows)
    result = evaluate_mmlu(
        _open(options, "causal", device, dtype),
        subjects,
        tokenizer,
        shots=asked.shots,
        batch_size=options.batch_size,
        progress=lambda batches: track(batches, "answering"),
    )
    show_answered(result)
    if options.json:
        print_json({name: value for name, value in asdict(result).items() if name != "predictions"})


def _open(options: Eval, head: Head, device: torch.device, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model in the mode asked for, skipping idle experts where it can."""
    model = open_model(options.model, head, device, dtype)
    if options.mode != "saved":
        set_mode_(model, options.mode)
    if options.backend != "auto" or (hasattr(model.config, "lte") and model.config.lte["mode"] == "hard"):
        optimize_where_possible_(model, options.backend)
    return model


def parse_eval(argv: Sequence[str]) -> Eval:
    """The options, checked as far as they can be before a model is loaded.

    Raises:
        UsageError: options that do not parse.
        ValueError: an option out of its range, or without the option it belongs to.
    """
    options: Eval = parse(Eval, "eval", argv)
    for name in ("max_rows", "batch_size", "max_new_tokens", "num_beams"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: give at least 1")
    if options.predictions:
        if not options.generate:
            raise ValueError("there are no predictions to write without --generate")
        if not Path(options.predictions).parent.is_dir():
            raise ValueError(f"{options.predictions}: there is no such folder to write to")
    if options.questions.mmlu is None:
        if options.questions != MMLUOptions():
            raise ValueError("shots, split and subjects are for MMLU: give its folder with --mmlu")
    elif options.data.text or options.generate or options.data.task != "language_modelling":
        raise ValueError("MMLU brings its own data and task: leave --text, --task and --generate away")
    return options


def _write_predictions(path: Path, references: dict[str, list[str]], predictions: list[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for (prompt, several), prediction in zip(references.items(), predictions, strict=True):
            row = {"prompt": prompt, "prediction": prediction, "references": several}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def show(result: Evaluation) -> None:
    """Print an evaluation as a table."""
    quality = f"{result.accuracy:.4f}" if result.perplexity is None else f"{result.perplexity:.3f}"
    table(
        f"{result.num_tokens:,} labels, mode {result.mode}",
        ["accuracy" if result.perplexity is None else "perplexity", "sparsity", "GFLOPs per token", "dense"],
        [[quality, f"{result.sparsity:.1%}", f"{result.gflops_per_token:.4g}", f"{result.gflops_per_token_dense:.4g}"]],
    )


def show_generated(result: GenerationEvaluation, perplexity: float | None) -> None:
    """Print an evaluation of generated texts as a table."""
    quality = [result.rougeL, result.rouge1, result.rouge2, result.bleu, perplexity]
    cost = [f"{result.sparsity:.1%}", f"{result.gflops_per_token:.4g}", f"{result.gflops_per_token_dense:.4g}"]
    table(
        f"{result.num_prompts:,} prompts, {result.num_references:,} references, mode {result.mode}; "
        f"{result.ended:.0%} of the texts ended",
        ["ROUGE-L", "ROUGE-1", "ROUGE-2", "BLEU", "perplexity", "sparsity", "GFLOPs per token", "dense"],
        [[*(f"{value:.2f}" for value in quality), *cost]],
    )


def show_answered(result: MMLUEvaluation) -> None:
    """Print an evaluation on MMLU as two tables, the second without the subjects."""
    subjects = [name for some in CATEGORIES.values() for name in some if name in result.by_subject]
    scores = [result.by_subject[name] for name in subjects]
    table(
        f"MMLU, {result.shots} shots",
        ["subject", "accuracy", "questions"],
        [[name, f"{one.accuracy:.4f}", one.num_questions] for name, one in zip(subjects, scores, strict=True)],
    )
    notes = f"; {result.fewer_shots:,} with fewer shots" if result.fewer_shots else ""
    notes += f", {result.cut:,} without their start" if result.cut else ""
    quality = [result.accuracy, result.subject_mean, *(score.accuracy for score in result.by_category.values())]
    cost = [f"{result.sparsity:.1%}", f"{result.gflops_per_token:.4g}", f"{result.gflops_per_token_dense:.4g}"]
    table(
        f"{result.num_questions:,} questions of {len(subjects)} subjects, mode {result.mode}{notes}",
        ["accuracy", "mean of subjects", *result.by_category, "sparsity", "GFLOPs per token", "dense"],
        [[*(f"{value:.4f}" for value in quality), *cost]],
    )
