"""A made-up MMLU, laid out as the release."""

import csv
from pathlib import Path

SUBJECTS = ("anatomy", "astronomy", "high_school_physics", "philosophy")


def made_up_row(number: int, answer: str) -> list[str]:
    """A question of a length of its own."""
    return [
        f"What is {'very ' * (number % 4)}{number}?",
        f"{number}",
        "none, or one",
        '"a"',
        "x" * (number % 3),
        answer,
    ]


def write_mmlu(folder: Path, questions: int = 6) -> Path:
    """Five examples a subject, and more questions from subject to subject."""
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
    for index, subject in enumerate(SUBJECTS):
        for split, count in (("dev", 5), ("test", questions + index)):
            rows = [made_up_row(10 * index + i, "ABCD"[(index + i) % 4]) for i in range(count)]
            with (folder / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(rows)
    return folder
