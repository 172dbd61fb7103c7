"""How data is read: the options of every task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lte.data.sources import Row, Source, read_rows


@dataclass(frozen=True)
class DataConfig:
    """How to read rows and how long a sequence is; a field not for every task says for which it is."""

    sequence_length: int = 1024
    """Language modelling: the tokens of a block. Other tasks: the most tokens of a row."""
    pad_to_multiple_of: int = 1
    """Pad the rows of a batch to a multiple of it, not for language modelling: to few lengths, or one (that of
    sequence_length), for which `--torch-compile` makes few programs."""
    text_column: str = "text"
    """The column of text, not for generation; classification and regression also take a pair, `a,b`."""
    prompt: str = "prompt"
    """Generation: a column, or a template such as `"{instruction}\\n{input}\\n"`."""
    completion: str = "completion"
    """Generation: a column, or a template such as `"{output}"`."""
    completion_end: str | None = None
    """Generation: an end marker that completions carry as text (`<|endoftext|>`), to remove: EOS is added."""
    chat: bool = False
    """Generation: put prompt and completion through the tokenizer's chat template, as user and assistant."""
    messages: str | None = None
    """Generation: in place of prompt and completion a column of chats, lists of messages with role and content, for the
    tokenizer's chat template. Each answer is a row, what comes before it is its prompt. A column `tools` beside it goes
    to the template too."""
    label_column: str = "label"
    """Classification: the column of labels, numbers or names. Regression: of numbers."""
    class_names: tuple[str, ...] | None = None
    """Classification: labels in order of their ids, for evaluation those of training; None collects them."""
    header: tuple[str, ...] = ()
    """Names of the columns, in order, for .csv and .tsv files without a header line."""
    skip_bad_rows: bool = False
    """Leave out, and count, rows of .csv and .tsv files with a wrong number of fields, and chats that the template
    refuses."""

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

    def rows(self, source: Source) -> Iterator[Row]:
        """The rows of a source, read as these options say."""
        return read_rows(source, self.header, self.skip_bad_rows)
