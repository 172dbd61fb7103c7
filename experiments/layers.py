"""Draws docs/layers.png, sparsity by layer, from results/: python experiments/layers.py."""

import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
LINES = {  # file, words of the command, label
    "SmolLM2-135M, 30 layers": [
        ("paper", "--separability-weight 0.5 --eta 0.5", "paper's schedule: lambda 0.5, eta 0.5"),
        ("paper", "--separability-weight 1 --eta 2", "lambda 1, eta 2"),
        ("paper", "--separability-weight 0 --eta 0.5", "lambda 0, eta 0.5"),
        ("wikitext2", "--max-steps 1200 --seed 42 --target-sparsity 0.5", "the default schedule at 50 %"),
    ],
    "GPT-2-like, 8 layers": [
        ("paper", "--separability-weight 0.5 --eta 0.5", "paper's schedule: lambda 0.5, eta 0.5"),
        ("paper", "--separability-weight 1 --eta 2", "lambda 1, eta 2"),
        ("paper", "--separability-weight 0 --eta 0.1", "lambda 0, eta 0.1"),
    ],
}


def main() -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for ax, (title, lines), gpt2 in zip(axes, LINES.items(), (False, True), strict=True):
        for file, words, label in lines:
            sparsity = layers(file, words, gpt2=gpt2)
            ax.plot(range(len(sparsity)), sparsity, marker=".", label=f"{label} ({sum(sparsity) / len(sparsity):.0%})")
        ax.set(title=title, xlabel="layer", ylim=(0, 1))
        ax.legend(fontsize="small", loc="upper center" if gpt2 else "lower center")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of experts idle on test")
    figure.savefig(ROOT / "docs" / "layers.png", dpi=110)


def layers(file: str, words: str, *, gpt2: bool) -> list[float]:
    """Of the last line of the file whose command has these words."""
    rows = map(json.loads, (ROOT / "results" / f"{file}.jsonl").read_text().splitlines())
    found = [row for row in rows if words in row["command"] and ("gpt2" in row["command"]) == gpt2]
    return found[-1]["evaluation"]["layer_sparsity"]


if __name__ == "__main__":
    main()
