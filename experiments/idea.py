"""Draw docs/idea.png: an FFN in the stages dense, soft and hard. ``python experiments/idea.py``."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

SCORES = (0.93, 0.12, 0.71, 0.05, 0.34, 0.88, 0.08, 0.21)
NEURONS, TAU = 4, 0.5
INK, IDLE, USED = "#222222", "#e6e6e6", "#1f6fb4"
STAGES = {
    "dense": "All experts run. The router does not.",
    "soft": "Each expert is scaled by its score.\nModel and router learn together.",
    "hard": "An expert runs if its score is above 0.5.\nThe router is frozen, the model adapts.",
}


def weight(stage: str, score: float) -> float:
    return 1.0 if stage == "dense" else score if stage == "soft" else float(score > TAU)


def draw(axes: plt.Axes, stage: str) -> None:
    axes.set_title(stage, fontsize=13, fontweight="bold", color=INK)
    for expert, score in enumerate(SCORES):
        used = weight(stage, score)
        for neuron in range(NEURONS):
            place = (expert + 0.1, neuron * 0.8)
            axes.add_patch(Rectangle(place, 0.8, 0.7, facecolor=IDLE, edgecolor="none"))
            axes.add_patch(Rectangle(place, 0.8, 0.7, facecolor=USED, edgecolor="none", alpha=used))
        if stage != "dense":
            colour = INK if used > 0.3 else "#888888"
            axes.text(expert + 0.5, 4.75, f"{score:.2f}", ha="center", fontsize=8, color=colour)
            axes.add_patch(Rectangle((expert + 0.2, 3.6), 0.6, score, facecolor=colour, alpha=0.9))
    if stage == "hard":
        axes.plot((0, 8), (3.6 + TAU, 3.6 + TAU), color="#c0392b", linewidth=1, linestyle="--")
    axes.add_patch(FancyArrowPatch((4, -1.0), (4, -0.15), arrowstyle="-|>", mutation_scale=12, color=INK))
    axes.text(4.2, -0.75, "token x", fontsize=9, color=INK)
    axes.text(4, -1.35, STAGES[stage], ha="center", va="top", fontsize=9.5, color=INK)
    axes.set(xlim=(-0.2, 8.2), ylim=(-2.7, 5.3), aspect="equal")
    axes.axis("off")


figure, places = plt.subplots(1, 3, figsize=(11, 4.3))
for axes, stage in zip(places, STAGES, strict=True):
    draw(axes, stage)
places[0].text(-0.1, 1.4, "8 experts of\n4 neurons", ha="right", fontsize=9, color=INK)
places[1].text(-0.1, 4.0, "scores", ha="right", fontsize=9, color=INK)
figure.tight_layout()
figure.savefig(Path(__file__).parents[1] / "docs" / "idea.png", dpi=110, facecolor="white")
