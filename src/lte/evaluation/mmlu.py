"""MMLU: multiple choice, answered by the most likely next token, with sparsity and cost of the same passes."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lte.data.tokenise import most_tokens
from lte.evaluation.measuring import Spent, check_finite, measure, spent
from lte.evaluation.mmlu_prompts import PromptEncoder
from lte.evaluation.mmlu_questions import CATEGORIES, CATEGORY_OF, LETTERS, Subject
from lte.inference.completions import padded
from lte.surgery.loading import check_causal


@dataclass
class Score:
    """The share of right answers, and the number of questions."""

    accuracy: float
    num_questions: int


@dataclass(kw_only=True)
class MMLUEvaluation(Spent):
    """The result of MMLU. Sparsity is that of the tokens of all prompts.

    Attributes:
        accuracy: share of right answers among all questions.
        subject_mean: the mean of the subjects' accuracies.
        by_category: accuracy among all questions of each of the release's four categories.
        by_subject: accuracy by the names of the files.
        num_questions: number of questions.
        shots: examples before a question.
        fewer_shots: number of questions without room for all examples in the model's positions.
        cut: number of questions that are too long even without an example. They lost their start.
        num_tokens: number of tokens of all prompts.
        predictions: the model's letters by subject, in the order of its questions.
    """

    accuracy: float
    subject_mean: float
    by_category: dict[str, Score]
    by_subject: dict[str, Score]
    num_questions: int
    shots: int
    fewer_shots: int
    cut: int
    num_tokens: int
    predictions: dict[str, str] = field(repr=False)


@torch.no_grad()
def evaluate_mmlu(
    model: PreTrainedModel,
    subjects: Sequence[Subject],
    tokenizer: PreTrainedTokenizerBase,
    *,
    shots: int = 5,
    batch_size: int = 8,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> MMLUEvaluation:
    """Answer every question in the model's current mode.

    The first tokens that all prompts of a subject have in common run once. Each of them counts in sparsity once for
    each question, as if every prompt ran alone.

    Args:
        model: a causal language model, on any device.
        subjects: the result of :func:`~lte.evaluation.mmlu_questions.read_mmlu`.
        tokenizer: the model's.
        shots: number of examples before a question. The last ones are left out if they have no room.
        batch_size: questions of a forward pass.
        progress: wraps the iteration over batches.

    Raises:
        ValueError: the model is not a causal language model, there is no question, there are more shots than examples,
            or the tokenizer has the same token for several letters.
    """
    check_causal(model.config, "MMLU asks")
    encoder = PromptEncoder(tokenizer, most_tokens(tokenizer, model.config))
    groups = [group for subject in subjects for group in encoder.groups(subject, shots)]
    if not groups:
        raise ValueError("there is no question to answer")
    was_training = model.training
    model.eval()
    letters: dict[tuple[str, int], str] = {}
    group, prefix = None, None
    with measure(model) as meter:
        for of, first in progress([(g, i) for g in groups for i in range(0, len(g.rows), batch_size)]):
            if of is not group:
                meter.weight = len(of.rows)
                group, prefix = of, _prefix(model, of.prefix)
                meter.weight = 1
            logits_BV = _next_token(model, of.rows[first : first + batch_size], prefix)
            check_finite(model, logits_BV[:, encoder.answers])
            best = logits_BV[:, encoder.answers].argmax(-1).tolist()
            places = of.places[first : first + batch_size]
            letters |= {(of.subject, place): LETTERS[i] for place, i in zip(places, best, strict=True)}
    model.train(was_training)
    predictions = {
        subject.name: "".join(letters[subject.name, i] for i in range(len(subject.questions))) for subject in subjects
    }
    right = {
        subject.name: [q.answer == p for q, p in zip(subject.questions, predictions[subject.name], strict=True)]
        for subject in subjects
    }
    by_subject = {name: _score({name: right[name]}) for name in right}
    of_category = {c: {name: right[name] for name in right if CATEGORY_OF[name] == c} for c in CATEGORIES}
    return MMLUEvaluation(
        accuracy=_score(right).accuracy,
        subject_mean=sum(score.accuracy for score in by_subject.values()) / len(by_subject),
        by_category={category: _score(some) for category, some in of_category.items() if some},
        by_subject=by_subject,
        num_questions=len(letters),
        shots=shots,
        fewer_shots=sum(len(one.rows) for one in groups if one.shots < shots),
        cut=sum(len(one.rows) for one in groups if one.cut),
        num_tokens=sum(len(one.prefix) + len(row) for one in groups for row in one.rows),
        predictions=predictions,
        **vars(spent(model, meter)),
    )


def _score(right: Mapping[str, list[bool]]) -> Score:
    every = [one for some in right.values() for one in some]
    return Score(sum(every) / len(every), len(every))


def _prefix(model: PreTrainedModel, ids: Tensor) -> Any:
    """Return keys and values of a prefix; None without a prefix."""
    if not len(ids):
        return None
    keep = _logits_to_keep(model, torch.tensor([len(ids) - 1]))
    return model(input_ids=ids[None].to(model.device), use_cache=True, **keep).past_key_values


def _next_token(model: PreTrainedModel, rows: list[Tensor], prefix: Any) -> Tensor:
    """Return the logits ``[B, V]`` of the token after each row. Rows follow the prefix.

    Rows are padded on the right: positions continue after the prefix, and a token does not see the padding after it.
    """
    inputs = padded(rows)
    last_B = inputs["attention_mask"].sum(-1) - 1
    kept, row_B = last_B.unique(return_inverse=True)
    cache = {}
    if prefix is not None:
        several = copy.deepcopy(prefix)  # a pass changes its cache
        several.batch_repeat_interleave(len(rows))
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat([mask.new_ones(len(rows), prefix.get_seq_length()), mask], dim=1)
        cache = {"past_key_values": several, "use_cache": True}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    keep = _logits_to_keep(model, kept)
    logits_BTV = model(**inputs, **cache, **keep).logits
    return logits_BTV[torch.arange(len(rows)), row_B if keep else last_B].float()


def _logits_to_keep(model: PreTrainedModel, positions: Tensor) -> dict[str, Tensor]:
    """Return arguments that compute logits for these positions only, if the model can. All logits are large."""
    can = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": positions.to(model.device)} if can else {}
