"""`DataConfig`: the options that say how data is read, for every task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lte.data.sources import DataRow, Source, read_rows


@dataclass(frozen=True)
class DataConfig:
    """How rows are read, and how long a sequence is. If a field is for some tasks only, its text names them."""

    sequence_length: int = 1024
    """Language modelling: the tokens of a block. Other tasks: the most tokens of a row."""
    pad_to_multiple_of: int = 1
    """Pad the rows of a batch to a multiple of this number (not for language modelling). Batches then have few lengths,
    or one if the number is sequence_length, so that `--torch-compile` makes few programs."""
    text_column: str = "text"
    """The column of text (not for generation). Classification and regression also take a pair, `a,b`."""
    prompt: str = "prompt"
    """Generation: a column, or a template such as `"{instruction}\\n{input}\\n"`."""
    completion: str = "completion"
    """Generation: a column, or a template such as `"{output}"`."""
    completion_end: str | None = None
    """Generation: an end marker in the text of completions (`<|endoftext|>`). It is removed, and EOS is added."""
    chat: bool = False
    """Generation: format prompt and completion by the tokenizer's chat template, as user and assistant."""
    messages: str | None = None
    """Generation: a column of chats, instead of prompt and completion. A chat is a list of messages with role and
    content, and the tokenizer's chat template formats it. Each answer is a row, and the messages before it are the
    prompt. If there is a column `tools`, the template gets it too."""
    label_column: str = "label"
    """Classification: the column of labels, numbers or names. Regression: of numbers."""
    class_names: tuple[str, ...] | None = None
    """Classification: labels in order of their ids. Give those of training for evaluation. None collects them."""
    header: tuple[str, ...] = ()
    """Names of the columns, in order, for .csv and .tsv files without a header line."""
    skip_bad_rows: bool = False
    """Leave out rows of .csv and .tsv files with a wrong number of fields, and chats that the template refuses. A
    warning says how many."""

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length is {self.sequence_length}: it must be at least 2")
        if self.pad_to_multiple_of < 1 or self.sequence_length % self.pad_to_multiple_of:
            raise ValueError(
                f"pad_to_multiple_of is {self.pad_to_multiple_of}, but it must be at least 1 and divide "
                f"sequence_length, {self.sequence_length}"
            )
        for name in ("class_names", "header"):
            given = getattr(self, name)
            if given is not None and len(set(given)) < len(given):
                raise ValueError(f"{name} has a name twice: {', '.join(given)}")

    def rows(self, source: Source) -> Iterator[DataRow]:
        """The rows of a source, read as these options say."""
        return read_rows(source, self.header, self.skip_bad_rows)
