"""ROUGE and BLEU of texts. Each text has one or several references."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

ROUGE = ("rouge1", "rouge2", "rougeL")


class TextMetrics:
    """Computes ROUGE and BLEU. Make this object before texts are generated: it raises if a package is missing.

    Raises:
        ImportError: rouge-score or sacrebleu is not installed.
    """

    def __init__(self) -> None:
        self._rouge = _imported("rouge_score.rouge_scorer", "rouge-score").RougeScorer(ROUGE, use_stemmer=True)
        self._sacrebleu = _imported("sacrebleu", "sacrebleu")

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        """Return the metrics in points of 100. White space around texts does not count.

        ``rouge1``, ``rouge2``, ``rougeL``: F1 with stemming, the best over a text's references, mean over texts.
        ``bleu``: of all texts together, by sacrebleu's default (13a tokens, with case). Texts may have different
        numbers of references.
        """
        texts = [text.strip() for text in predictions]
        against = [[text.strip() for text in some] for some in references]
        scores = [self._rouge.score_multi(some, text) for text, some in zip(texts, against, strict=True)]
        most = max(map(len, against))
        streams = [[some[i] if i < len(some) else None for some in against] for i in range(most)]
        found = {name: 100 * sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}
        return {**found, "bleu": self._sacrebleu.corpus_bleu(texts, streams).score}


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f'ROUGE and BLEU need the package {package}: pip install "lte[eval]"') from error
