"""Data for a model: rows that fit its head, its tokenizer and its positions."""

import logging
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedModel

from lte.argument_error import Argument, ArgumentError
from lte.data.batches import PaddedRows
from lte.data.config import DataConfig
from lte.data.prompts import load_prompts
from lte.data.tasks import Task, generation_rows, load_dataset_for
from lte.data.tokenise import most_tokens
from lte.evaluation.generation import group_references
from lte.surgery.families import check_family
from lte.surgery.loading import Head, check_causal, class_names_of, classifies

logger = logging.getLogger(__name__)


@dataclass
class Inputs:
    """The data for a model and its task. It is also a group of command line options."""

    text: tuple[str, ...] = ()
    """Data: .txt, .jsonl, .csv, .tsv (also .gz), .parquet, .arrow, .npy (token ids), or a hub id[:name][:split]."""
    task: Task = "language_modelling"
    """The kind of data: running text, prompts with completions, texts with classes, or texts with numbers."""
    data: DataConfig = field(default_factory=DataConfig)

    def head(self, model_config: Any, new: bool = False) -> Head:
        """Return the head that the task needs.

        Args:
            new: whether a model with another head may get this one.

        Raises:
            ValueError: the model's head is for another task.
        """
        if not new and classifies(model_config):
            own = "regression" if model_config.num_labels == 1 else "classification"
            if self.task != own:
                given = f"the model's head is for {own}, but the task is {self.task}: give "
                raise ArgumentError(given, Argument("task", own))
        if self.task in ("classification", "regression"):
            return "classification"
        if not model_config.is_encoder_decoder:
            check_causal(model_config, f"task {self.task} asks")
        return generating_head(model_config)

    def kept_head(self, model_config: Any) -> Head:
        """Return the head for a conversion: the model's own.

        Raises:
            ValueError: the family cannot be converted, or the data is not for the head.
        """
        check_family(model_config)
        if self.text and classifies(model_config):
            self.head(model_config)  # raises ValueError if the data does not fit the head
        return "own"

    def load(
        self,
        sources: tuple[str, ...],
        tokenizer: Any,
        model_config: Any,
        data: DataConfig | None = None,
        labelled: bool = True,
        new_head: bool = False,
        max_rows: int | None = None,
    ) -> Any:
        """Return the rows of ``sources``. A classifier's classes are in its own order, unless it may get a new head.

        Only the first ``max_rows`` rows are taken. Later rows are read only to find the classes.
        """
        data = data or self.data
        if self.task == "classification" and data.class_names is None and not new_head:
            data = replace(data, class_names=class_names_of(model_config))
        longest = most_tokens(tokenizer, model_config)
        all_classes = self.task == "classification" and data.class_names is None
        dataset = load_dataset_for(
            self.task,
            _given(sources),
            tokenizer,
            replace(data, sequence_length=min(longest, data.sequence_length)),
            is_encoder_decoder=bool(model_config.is_encoder_decoder),
            vocab_size=model_config.get_text_config().vocab_size,
            labelled=labelled,
            max_rows=None if all_classes else max_rows,
        )
        if self.task == "classification" and classifies(model_config) and labelled and not new_head:
            names = dataset.class_names or ()
            if data.class_names is None and not all(name.isdigit() for name in names):
                raise ArgumentError(
                    f"the model does not say which of its classes are {', '.join(names)}: name them in its order, ",
                    *("with ", Argument("class_names")),
                )
            if len(names) != model_config.num_labels:
                raise ArgumentError(
                    f"the data has {len(names)} classes and the model {model_config.num_labels}: name the model's, in "
                    "their order, with ",
                    Argument("class_names"),
                )
        if data.sequence_length > longest:
            logger.warning(
                "sequence_length %d is above the model's %d positions, which are used instead",
                data.sequence_length,
                longest,
            )
        return dataset if max_rows is None else dataset.head(max_rows)

    def load_references(
        self, tokenizer: Any, model_config: Any, max_prompts: int | None
    ) -> tuple[dict[str, list[str]], PaddedRows]:
        """Return each prompt of ``text`` once, with all its completions, and the rows of ``load``."""
        data = self.data
        texts = load_prompts(_given(self.text), data, tokenizer)
        references = dict(islice(group_references(*texts).items(), max_prompts))
        rows = generation_rows(
            [prompt for prompt, several in references.items() for _ in several],
            [one for several in references.values() for one in several],
            tokenizer,
            replace(data, sequence_length=min(most_tokens(tokenizer, model_config), data.sequence_length)),
            bool(model_config.is_encoder_decoder),
            model_config.get_text_config().vocab_size,
        )
        return references, rows


def _given(sources: tuple[str, ...]) -> tuple[str, ...]:
    if not sources:
        raise ArgumentError("no data: give ", Argument("data", "FILE"), " (or a hub data set id)")
    return sources


def generating_head(model_config: Any) -> Head:
    return "seq2seq" if model_config.is_encoder_decoder else "causal"


def pad_alike_(model: PreTrainedModel, dataset: Any) -> None:
    """Set the padding token of a model with one answer for each row: a decoder's answer is at the last real token."""
    if dataset.class_names is not None:
        model.config.get_text_config().pad_token_id = dataset.collator.pad_token_id
