"""``lte eval``: quality, sparsity and cost of a model on data, by what it predicts or by what it generates."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from lte.cli.console import print_json, table, track
from lte.cli.main import parse
from lte.cli.options import DataOptions, DeviceOptions, Model, open_model, optimize_where_possible_
from lte.evaluation.evaluate import Evaluation, evaluate
from lte.evaluation.generation import GenerationEvaluation, evaluate_generation
from lte.ops.sparse_ffn import BackendName
from lte.surgery.convert import set_mode_
from lte.surgery.loading import load_config, load_tokenizer


@dataclass
class Eval:
    model: Model
    """A local folder, a hub id, or a .gguf file; dense or sparse."""
    mode: Literal["saved", "dense", "soft", "hard"] = "saved"
    """How a sparse model runs; saved is how it was saved (hard after training)."""
    batch_size: int = 8
    """Rows a forward pass, prompts decoded together."""
    max_rows: int | None = None
    """Only the first rows (blocks; with --generate prompts) of the data."""
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
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options = parse_eval(argv)
    device, dtype = options.where.resolve()
    config, tokenizer = load_config(options.model), load_tokenizer(options.model)
    references = {}
    if options.generate:
        references, dataset = options.data.load_references(tokenizer, config, options.max_rows)
    else:
        dataset = options.data.load(options.data.text, tokenizer, config)
        dataset = dataset if options.max_rows is None else dataset.head(options.max_rows)
    model = open_model(options.model, options.data.head(config), device, dtype)
    if options.mode != "saved":
        set_mode_(model, options.mode)
    if options.backend != "auto" or (hasattr(model.config, "lte") and model.config.lte["mode"] == "hard"):
        optimize_where_possible_(model, options.backend)
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
