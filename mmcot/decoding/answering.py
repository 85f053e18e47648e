"""Answering questions with a trained pair of models: first the rationale, then the answer.

predictions, num_cut = answer_questions(rationale_stage, answer_stage, problems, features)
predictions[0]   # Prediction(qid="1", rationale="Solution: ...", answer_text="The answer is (B).", prediction=1)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from mmcot.decoding.generation import GeneratedText, generate_texts
from mmcot.models.t5 import T5ForMultimodalGeneration
from mmcot.texts.answers import parse_answer
from mmcot.texts.encoding import encode_pair
from mmcot.texts.prompts import build_pair
from mmcot.texts.sample import Sample


@dataclasses.dataclass(frozen=True)
class StageModel:
    """One stage's model, and the settings of its prompts."""

    model: T5ForMultimodalGeneration
    tokenizer: PreTrainedTokenizerBase
    format: str
    use_caption: bool
    max_source_tokens: int
    max_target_tokens: int

    def write(
        self,
        problems: Sequence[Sample],
        features: Sequence[np.ndarray | None],
        rationales: Sequence[str | None],
        *,
        feature_shape: tuple[int, int],
        batch_size: int,
    ) -> tuple[list[GeneratedText], int]:
        """Generate a text for each problem; returns the texts and the number of truncated sources."""
        pairs = [
            encode_pair(
                self.tokenizer,
                *build_pair(problem, self.format, use_caption=self.use_caption, rationale=rationale),
                max_source_tokens=self.max_source_tokens,
                max_target_tokens=self.max_target_tokens,
            )
            for problem, rationale in zip(problems, rationales, strict=True)
        ]
        texts = generate_texts(
            self.model,
            self.tokenizer,
            [pair.source_ids for pair in pairs],
            features,
            feature_shape=feature_shape,
            max_new_tokens=self.max_target_tokens,
            batch_size=batch_size,
        )
        return texts, sum(pair.source_cut > 0 for pair in pairs)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The output of the two stages; ``prediction`` is None where the answer could not be parsed."""

    qid: str
    rationale: str
    answer_text: str
    prediction: int | None


def answer_questions(
    rationale_stage: StageModel | None,
    answer_stage: StageModel | None,
    problems: Sequence[Sample],
    features: Sequence[np.ndarray | None],
    *,
    feature_shape: tuple[int, int],
    batch_size: int = 32,
) -> tuple[list[Prediction], int]:
    """Generate a rationale and an answer for each question.

    Args:
        rationale_stage: None where one model writes both; the rationales are empty.
        answer_stage: None generates the rationales alone; the answers are empty.
        features: an array [p, V] for each problem (p = 0 without a picture), or all None.
        feature_shape: [P, V] with p <= P.

    Returns:
        predictions in the order of ``problems``, and the number of truncated sources.
    """
    shape = {"feature_shape": feature_shape, "batch_size": batch_size}
    texts: list[str | None] = [None] * len(problems)
    num_cut = 0
    if rationale_stage is not None:
        rationales, num_cut = rationale_stage.write(problems, features, texts, **shape)
        texts = [rationale.text for rationale in rationales]
    if answer_stage is None:
        predictions = [
            Prediction(problem.qid, text or "", "", None) for problem, text in zip(problems, texts, strict=True)
        ]
        return predictions, num_cut
    answers, more_cut = answer_stage.write(problems, features, texts, **shape)
    predictions = [
        Prediction(problem.qid, text or "", answer.text, parse_answer(answer.text, len(problem.choices)))
        for problem, text, answer in zip(problems, texts, answers, strict=True)
    ]
    return predictions, num_cut + more_cut
