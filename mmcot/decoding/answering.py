"""Answering questions with the trained models of a chain, one after the other, such as rationale and answer.

predictions, num_cut = answer_questions([rationale_stage, answer_stage], problems, features)
predictions[0]   # Prediction(qid="1", rationale="Solution: ...", answer_text="The answer is (B).", prediction=1)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from mmcot.decoding.engine import Engine, open_engine
from mmcot.decoding.requests import GeneratedText, Request, Source
from mmcot.models.contract import Model
from mmcot.texts.answers import parse_prediction
from mmcot.texts.encoding import encode_pair
from mmcot.texts.prompts import build_pair, split_format
from mmcot.texts.sample import Sample


@dataclasses.dataclass(frozen=True)
class StageModel:
    """One stage's model, and the settings of its prompts.

    ``reads`` names the texts of earlier stages that its prompt contains, and ``writes`` its own text; None for the
    stage that answers. The engine of ``write`` is kept for the next call: the model must not change.
    """

    model: Model
    tokenizer: PreTrainedTokenizerBase
    format: str
    use_caption: bool
    max_source_tokens: int
    max_target_tokens: int
    reads: tuple[str, ...] = ()
    writes: str | None = None
    _engines: list[Engine] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)

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
        pictures = self.model.config.picture_tokens
        pairs = [
            encode_pair(
                self.tokenizer,
                *build_pair(
                    problem,
                    self.format,
                    use_caption=self.use_caption,
                    rationale=rationale,
                    marks_pictures=pictures is not None,
                ),
                max_source_tokens=self.max_source_tokens,
                max_target_tokens=self.max_target_tokens,
                pictures=pictures,
            )
            for problem, rationale in zip(problems, rationales, strict=True)
        ]
        requests = [Request(Source(pair.source_ids, own)) for pair, own in zip(pairs, features, strict=True)]
        texts = self._engine(min(batch_size, len(pairs)), feature_shape).write(requests) if requests else []
        return texts, sum(pair.source_cut > 0 for pair in pairs)

    def _engine(self, num_rows: int, feature_shape: tuple[int, int]) -> Engine:
        """The engine of earlier calls, or one of more rows in its place."""
        if not self._engines or self._engines[0].rows.num_rows < num_rows:
            self._engines.clear()
            self._engines.append(
                open_engine(
                    self.model,
                    self.tokenizer,
                    num_rows=num_rows,
                    max_source_tokens=self.max_source_tokens,
                    max_new_tokens=self.max_target_tokens,
                    feature_shape=feature_shape,
                )
            )
        return self._engines[0]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The output of all stages; ``prediction`` is None where the answer could not be parsed.

    ``texts`` are those of the stages before the answer, by their names; ``rationale`` is the last that the answering
    stage reads (without that stage: the last that was written).
    """

    qid: str
    rationale: str
    answer_text: str
    prediction: int | str | None
    texts: dict[str, str] = dataclasses.field(default_factory=dict)


def answer_questions(
    stages: Sequence[StageModel],
    problems: Sequence[Sample],
    features: Sequence[np.ndarray | None],
    *,
    feature_shape: tuple[int, int],
    batch_size: int = 32,
) -> tuple[list[Prediction], int]:
    """Generate the text of each stage for each question, and parse the answer from that of the answering stage.

    Args:
        stages: in their order; without a stage that answers, the answers are empty.
        features: an array [p, V] for each problem (p = 0 without a picture), or all None.
        feature_shape: [P, V] with p <= P.

    Returns:
        predictions in the order of ``problems``, and the number of truncated sources.
    """
    written: dict[str, list[str]] = {}
    answers, shown, num_cut, output = [""] * len(problems), (), 0, "A"
    for stage in stages:
        read = [" ".join(texts) for texts in zip(*(written[name] for name in stage.reads), strict=True)]
        texts, cut = stage.write(
            problems,
            features,
            read if stage.reads else [None] * len(problems),
            feature_shape=feature_shape,
            batch_size=batch_size,
        )
        num_cut += cut
        if stage.writes is None:
            answers, shown = [text.text for text in texts], stage.reads[-1:]
            output = split_format(stage.format)[1]
        else:
            written[stage.writes], shown = [text.text for text in texts], (stage.writes,)
    predictions = []
    for number, problem in enumerate(problems):
        texts_of = {name: texts[number] for name, texts in written.items()}
        rationale = "".join(texts_of[name] for name in shown)
        answer = answers[number]
        predictions.append(
            Prediction(problem.qid, rationale, answer, parse_prediction(problem, answer, output=output), texts_of)
        )
    return predictions, num_cut
