"""The tables of ``lte eval``."""

from lte.cli.console import table
from lte.evaluation.evaluate import Evaluation
from lte.evaluation.generation import GenerationEvaluation
from lte.evaluation.harness import HarnessEvaluation
from lte.evaluation.measuring import Spent


def show(result: Evaluation) -> None:
    """Print an evaluation as a table."""
    names = {"perplexity": 3, "accuracy": 4, "f1": 4, "matthews": 4, "pearson": 4, "spearman": 4}
    quality = {
        name: f"{value:.{places}f}" for name, places in names.items() if (value := getattr(result, name)) is not None
    }
    table(
        f"{result.num_tokens:,} labels, mode {result.mode}",
        [*quality, "sparsity", "GFLOPs per token", "dense"],
        [[*quality.values(), *cost_cells(result)]],
    )


def cost_cells(result: Spent) -> list[str]:
    """Return the cells for sparsity, GFLOPs of a token, and GFLOPs of a token of the dense model."""
    further = f", attention {result.attention_sparsity:.1%}" if result.attention_sparsity else ""
    further += f", weights {result.weight_sparsity:.1%}" if result.weight_sparsity >= 0.0005 else ""
    cost = [result.gflops_per_token, result.gflops_per_token_dense]
    return [f"{result.sparsity:.1%}{further}", *(f"{value:.4g}" for value in cost)]


def show_generated(result: GenerationEvaluation, perplexity: float | None) -> None:
    """Print an evaluation of generated texts as a table."""
    quality = [result.rougeL, result.rouge1, result.rouge2, result.bleu, perplexity]
    table(
        f"{result.num_prompts:,} prompts, {result.num_references:,} references, mode {result.mode}; "
        f"{result.ended:.0%} of the texts ended",
        ["ROUGE-L", "ROUGE-1", "ROUGE-2", "BLEU", "perplexity", "sparsity", "GFLOPs per token", "dense"],
        [[*(f"{value:.2f}" for value in quality), *cost_cells(result)]],
    )


def show_tasks(result: HarnessEvaluation) -> None:
    """Print an evaluation on lm_eval's tasks as two tables, results and cost."""
    rows = []
    for task, values in result.results.items():
        for key in (key for key in values if "_stderr," not in key):
            metric, _, filtered = key.partition(",")
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            spread = "" if error is None else f"{error:.4f}"
            rows.append(
                [task, name, f"{values[key]:.4f}", spread, result.num_samples.get(task, ""), result.shots.get(task, "")]
            )
    table("tasks of lm_eval", ["task", "metric", "value", "standard error", "questions", "shots"], rows)
    costs = [["all tokens", *cost_cells(result)]]
    if made := result.generated:
        cost = Spent(**{name: value for name, value in made.items() if name != "num_tokens"})
        costs.append([f"{made['num_tokens']:,} generated tokens", *cost_cells(cost)])
    table(f"mode {result.mode}", ["", "sparsity", "GFLOPs per token", "dense"], costs)
