"""The tables of ``lte eval``."""

from lte.cli.console import table
from lte.evaluation.evaluate import Evaluation
from lte.evaluation.generation import GenerationEvaluation
from lte.evaluation.harness import HarnessEvaluation
from lte.evaluation.measuring import Spent
from lte.evaluation.mmlu import MMLUEvaluation
from lte.evaluation.mmlu_questions import CATEGORIES


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
    table(
        f"{result.num_questions:,} questions of {len(subjects)} subjects, mode {result.mode}{notes}",
        ["accuracy", "mean of subjects", *result.by_category, "sparsity", "GFLOPs per token", "dense"],
        [[*(f"{value:.4f}" for value in quality), *cost_cells(result)]],
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
    table(f"mode {result.mode}", ["sparsity", "GFLOPs per token", "dense"], [cost_cells(result)])
