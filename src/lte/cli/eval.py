"""``lte eval``: quality, sparsity and cost of a model on data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from lte.cli.console import print_json, table, track
from lte.cli.main import parse
from lte.cli.options import DataOptions, DeviceOptions, Model, open_model, optimize_where_possible_
from lte.evaluation.evaluate import Evaluation, evaluate
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
    """Rows a forward pass."""
    max_rows: int | None = None
    """Only the first rows (blocks) of the data."""
    backend: BackendName = "auto"
    """What computes the FFNs of a model in mode hard: what is evaluated is what decodes."""
    json: bool = False
    """Print one JSON object on the last line."""
    data: DataOptions = field(default_factory=DataOptions)
    where: DeviceOptions = field(default_factory=DeviceOptions)


def main(argv: Sequence[str]) -> None:
    options: Eval = parse(Eval, "eval", argv)
    if options.max_rows is not None and options.max_rows < 1:
        raise ValueError(f"max_rows is {options.max_rows}: give at least 1")
    device, dtype = options.where.resolve()
    config = load_config(options.model)
    dataset = options.data.load(options.data.text, load_tokenizer(options.model), config)
    if options.max_rows is not None:
        dataset = dataset.head(options.max_rows)
    model = open_model(options.model, options.data.head(config), device, dtype)
    if options.mode != "saved":
        set_mode_(model, options.mode)
    if options.backend != "auto" or (hasattr(model.config, "lte") and model.config.lte["mode"] == "hard"):
        optimize_where_possible_(model, options.backend)
    result = evaluate(model, dataset, options.batch_size, progress=lambda batches: track(batches, "evaluating"))
    show(result)
    if options.json:
        print_json(asdict(result))


def show(result: Evaluation) -> None:
    """Print an evaluation as a table."""
    quality = f"{result.accuracy:.4f}" if result.perplexity is None else f"{result.perplexity:.3f}"
    table(
        f"{result.num_tokens:,} labels, mode {result.mode}",
        ["accuracy" if result.perplexity is None else "perplexity", "sparsity", "GFLOPs per token", "dense"],
        [[quality, f"{result.sparsity:.1%}", f"{result.gflops_per_token:.4g}", f"{result.gflops_per_token_dense:.4g}"]],
    )
