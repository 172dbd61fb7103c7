"""The questions of MMLU (Hendrycks et al., 2021): subjects, files, and the prompt of a question."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

LETTERS = ("A", "B", "C", "D")
Split = Literal["test", "val"]

CATEGORIES: dict[str, tuple[str, ...]] = {
    "STEM": (
        *("abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science"),
        *("college_mathematics", "college_physics", "computer_security", "conceptual_physics"),
        *("electrical_engineering", "elementary_mathematics", "high_school_biology", "high_school_chemistry"),
        *("high_school_computer_science", "high_school_mathematics", "high_school_physics", "high_school_statistics"),
        "machine_learning",
    ),
    "humanities": (
        *("formal_logic", "high_school_european_history", "high_school_us_history", "high_school_world_history"),
        *("international_law", "jurisprudence", "logical_fallacies", "moral_disputes", "moral_scenarios"),
        *("philosophy", "prehistory", "professional_law", "world_religions"),
    ),
    "social sciences": (
        *("econometrics", "high_school_geography", "high_school_government_and_politics"),
        *("high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology", "human_sexuality"),
        *("professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy"),
    ),
    "other": (
        *("anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging"),
        *("management", "marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting"),
        *("professional_medicine", "virology"),
    ),
}
"""The four categories of the release, with their subjects."""


_CURE = "give the folder of MMLU as released, with dev/, test/ and val/"
CATEGORY_OF = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects}


@dataclass(frozen=True)
class Question:
    """A question, its four choices, and the letter of the right choice."""

    text: str
    choices: tuple[str, ...]
    answer: str

    def asked(self) -> str:
        choices = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return "\n".join([self.text, *choices, "Answer:"])


@dataclass(frozen=True)
class Subject:
    """The questions about a subject, and the examples for its prompts."""

    name: str
    examples: list[Question]
    questions: list[Question]

    def prompt(self, question: Question, shots: int) -> str:
        """Return the prompt: the first ``shots`` examples and the question. It ends in ``Answer:``."""
        title = self.name.replace("_", " ")
        header = f"The following are multiple choice questions (with answers) about {title}."
        examples = [f"{example.asked()} {example.answer}" for example in self.examples[:shots]]
        return "\n\n".join([header, *examples, question.asked()])


def read_mmlu(
    folder: str | Path,
    split: Split = "test",
    subjects: Sequence[str] = (),
    max_questions: int | None = None,
    examples: bool = True,
) -> list[Subject]:
    """Read the subjects of MMLU's folder: ``dev/*_dev.csv`` with examples, ``test/*_test.csv`` with questions.

    Args:
        folder: has dev/ and the split.
        split: the name of the split with the questions.
        subjects: the names of their files, e.g. ``"high_school_physics"``. None given means all subjects of the folder.
        max_questions: the number of first questions of each subject; None takes all.
        examples: False if prompts have no examples. Then dev/ is not needed.

    Raises:
        ValueError: there is no such subject, there are no questions, or a file is not as released.
        FileNotFoundError: the folder or one of its files is missing.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    names = sorted(set(subjects)) or sorted(
        path.name.removesuffix(f"_{split}.csv") for path in (folder / split).glob(f"*_{split}.csv")
    )
    if not names:
        raise FileNotFoundError(
            f"{folder} has no {split}/*_{split}.csv: give the folder of MMLU, with dev/ and {split}/"
        )
    for name in names:
        if name not in CATEGORY_OF:
            near = get_close_matches(name, CATEGORY_OF, n=3)
            raise ValueError(
                f"MMLU has no subject {name!r}: "
                + (f"do you mean {' or '.join(near)}?" if near else f"its names are those of the files in {split}/")
            )
    return [
        Subject(name, _read(folder, "dev", name) if examples else [], _read(folder, split, name)[:max_questions])
        for name in names
    ]


def _read(folder: Path, split: str, subject: str) -> list[Question]:
    path = folder / split / f"{subject}_{split}.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {split}/{path.name}: give the folder of MMLU, with dev/ and its split"
        )
    with path.open(newline="", encoding="utf-8") as file:
        try:
            rows = list(csv.reader(file, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {error}: it has to be CSV in UTF-8, as released") from None
    for number, row in enumerate(rows, 1):
        if len(row) != len(LETTERS) + 2 or row[-1] not in LETTERS:
            found = f"{len(row)} columns" if len(row) != len(LETTERS) + 2 else f"the answer {row[-1]!r}"
            raise ValueError(
                f"{path}, row {number}: {found}, but a row is a question, four choices and a letter A to D, "
                "and there is no header"
            )
    if not rows:
        raise ValueError(f"{path} is empty")
    return [Question(row[0], tuple(row[1:-1]), row[-1]) for row in rows]
