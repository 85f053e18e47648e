"""Rationale metrics as ``evaluate`` modules that need no network.

``evaluate.load("rouge")`` downloads code, so these classes are instantiated directly:

    SentenceBleu().compute(predictions=["a b"], references=["a c"], max_order=1)
    -> {"bleu1": 0.5}

Each returns one score between 0 and 1, the mean over the pairs. Formulas are those of
ScienceQA's evaluation (arXiv:2209.09513); a class documents where it differs. This module
does not depend on problems or answers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import datasets
import evaluate

from mmcot.errors import MissingPackageError


class _TextPairMetric(evaluate.Metric):
    """A metric over pairs of one generated and one gold text; data is kept in memory."""

    def __init__(self, **kwargs) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions and references: lists of texts, one reference each",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )


class SentenceBleu(_TextPairMetric):
    r"""BLEU-n of each text, averaged.

    Tokens are separated by ``\s`` and ``.``. The n-gram orders up to ``max_order`` have equal
    weights and nothing is smoothed, so a text without a common n-gram of some order (an
    empty one, or one shorter than ``max_order``) scores 0.

    Differs from the reference: it yields some 1e-77 where this is 0.
    """

    def _compute(self, predictions: list[str], references: list[str], max_order: int = 4) -> dict[str, float]:
        scores = [sentence_bleu(ours, gold, max_order) for ours, gold in zip(predictions, references, strict=True)]
        return {f"bleu{max_order}": sum(scores) / len(scores)}


class RougeL(_TextPairMetric):
    """F-measure of the longest common subsequence of words, averaged.

    Words are runs of letters and digits, in lower case, not stemmed (``rouge_score``).

    Differs from the reference: the package ``rouge`` it uses keeps the case, counts a
    repeated word once, and the reference leaves empty texts out; this class scores them 0.
    """

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = rouge_l_of_each(predictions, references)
        return {"rougeL": sum(scores) / len(scores)}


class SentenceSimilarity(_TextPairMetric):
    """Cosine similarity of the two texts' sentence embeddings, averaged.

    ``model`` is a local sentence-transformers folder.
    """

    def _compute(self, predictions: list[str], references: list[str], model: str) -> dict[str, float]:
        try:
            from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports] (optional)
        except ImportError as error:
            raise MissingPackageError(
                f"the similarity model {model!r} needs the package sentence-transformers, which is not installed; "
                "run 'pip install sentence-transformers', or score without a similarity model"
            ) from error
        encoder = SentenceTransformer(model)
        ours_ND = encoder.encode(predictions, normalize_embeddings=True)
        gold_ND = encoder.encode(references, normalize_embeddings=True)
        return {"similarity": float((ours_ND * gold_ND).sum(axis=1).mean())}


def rouge_l_of_each(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L of each pair, as ``RougeL`` averages it."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return [scorer.score(gold, ours)["rougeL"].fmeasure for ours, gold in zip(predictions, references, strict=True)]


def sentence_bleu(prediction: str, reference: str, max_order: int) -> float:
    """BLEU of one text against one reference (Papineni et al. 2002), unsmoothed, uniform weights."""
    ours, gold = _tokens(prediction), _tokens(reference)
    log_precision = 0.0
    for order in range(1, max_order + 1):
        counts, gold_counts = _ngrams(ours, order), _ngrams(gold, order)
        num_common = sum((counts & gold_counts).values())
        if num_common == 0:
            return 0.0
        log_precision += math.log(num_common / sum(counts.values())) / max_order
    brevity = 1.0 if len(ours) > len(gold) else math.exp(1 - len(gold) / len(ours))
    return brevity * math.exp(log_precision)


def _tokens(text: str) -> list[str]:
    return [token for token in re.split(r"\s|\.", text) if token]


def _ngrams(tokens: list[str], order: int) -> Counter:
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))
