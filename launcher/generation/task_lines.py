"""The lines of a task's file: from generated texts, and what is counted over them.

    task_lines("rationale", ["10"], [[text]], search="none")
    [{"qid": "10", "rationale": "Solution: ...", "num_tokens": 31, "finish": "eos"}]

With several candidates a question, the line has the chosen one and all of them in their order:

    [{"qid": "10", "rationale": "Why.", "num_tokens": 3, "finish": "eos", "log_prob": -4.2, "agreement": 0.75,
      "candidates": [{"candidate": 0, "rationale": "Why.", "num_tokens": 3, "finish": "eos", "log_prob": -4.2}, ...]}]

``log_prob`` is the natural logarithm of a text's probability under the model. ``agreement`` is there after a vote: the
share of the candidates that have the chosen answer, or, of texts without answers, the chosen text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from data_shards.json_shapes import Between, Whole
from mmcot.decoding.repetition import is_repetitive
from mmcot.decoding.voting import vote
from mmcot.texts.answers import normalize, parse_prediction
from mmcot.texts.prompts import split_format
from mmcot.texts.sample import Sample

if TYPE_CHECKING:
    from mmcot.decoding.requests import GeneratedText

_AGREEMENT = Between(0, 1)
_SUMMED = ("num_samples", "num_tokens", "num_truncated", "num_empty", "num_repetitive", "num_candidates")
AnswerOf = Callable[[int, str], Hashable | None]


def answers_of(format: str, samples: Sequence[Sample]) -> AnswerOf | None:
    """A function from a question's index and a text to the answer in it; None where the format's texts hold none.

    A free answer counts as the same where ``normalize`` makes it equal, as in the score.
    """
    output = split_format(format)[1]
    if "A" not in output and output != "T":
        return None

    def answer_of(index: int, text: str) -> Hashable | None:
        answer = parse_prediction(samples[index], text, output=output)
        return normalize(answer) if isinstance(answer, str) else answer

    return answer_of


def task_lines(
    stage: str,
    qids: Sequence[str],
    texts: Sequence[Sequence[GeneratedText]],
    *,
    search: str,
    answer_of: AnswerOf | None = None,
) -> list[dict[str, Any]]:
    """The lines of a task's file.

    Args:
        stage: the key of the text in a line.
        texts: the candidates of every question, in their order; equally many for each.
        search: "none" takes candidate 0, "vote" the one that a vote chooses.
        answer_of: as ``answers_of`` returns it; without it the texts vote by their words.

    Raises:
        ValueError: a question has no candidate, or candidates have no log-probabilities.
    """
    return [
        {"qid": qid, **_choose(stage, candidates, search, lambda text, index=index: _ballot(answer_of, index, text))}
        for index, (qid, candidates) in enumerate(zip(qids, texts, strict=True))
    ]


def _ballot(answer_of: AnswerOf | None, index: int, text: str) -> Hashable | None:
    return " ".join(text.split()) if answer_of is None else answer_of(index, text)


def _choose(
    stage: str, candidates: Sequence[GeneratedText], search: str, answer_of: Callable[[str], Hashable | None]
) -> dict[str, Any]:
    """A line without its qid."""
    if len(candidates) == 1:
        return _describe_text(stage, candidates[0])
    described = [_describe_text(stage, text) | {"log_prob": _log_prob(text)} for text in candidates]
    chosen, agreement = 0, {}
    if search == "vote":
        found = vote([answer_of(text.text) for text in candidates], [each["log_prob"] for each in described])
        chosen, agreement = found.chosen, {"agreement": found.agreement}
    numbered = [{"candidate": number, **each} for number, each in enumerate(described)]
    return described[chosen] | agreement | {"candidates": numbered}


def _describe_text(stage: str, text: GeneratedText) -> dict[str, Any]:
    return {stage: text.text, "num_tokens": text.num_tokens, "finish": text.finish}


def _log_prob(text: GeneratedText) -> float:
    if len(text.log_probs) != text.num_tokens:
        raise ValueError(
            f"a candidate of {text.num_tokens} tokens has {len(text.log_probs)} log-probabilities; generate candidates "
            "with them"
        )
    return math.fsum(text.log_probs)


def line_shape(stage: str) -> dict[str, Any]:
    """The shape of a line, for ``data_shards.generated_texts.read_lines``."""
    text = {stage: str, "num_tokens": Whole(), "finish": str}
    candidate = {"candidate": Whole(), **text, "log_prob": float}
    return {"qid": str, **text, "log_prob?": float, "agreement?": _AGREEMENT, "candidates?": [candidate]}


def count_lines(stage: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over a file's chosen texts; with candidates also their number, and after a vote the mean agreement."""
    counts: dict[str, Any] = {
        "num_samples": len(lines),
        "num_tokens": sum(line["num_tokens"] for line in lines),
        "num_truncated": sum(line["finish"] == "length" for line in lines),
        "num_empty": sum(not line[stage].strip() for line in lines),
        "num_repetitive": sum(is_repetitive(line[stage]) for line in lines),
    }
    if num_candidates := sum(len(line.get("candidates", ())) for line in lines):
        counts["num_candidates"] = num_candidates
    if agreements := [line["agreement"] for line in lines if "agreement" in line]:
        counts["agreement"] = math.fsum(agreements) / len(agreements)
    return counts


def add_counts(files: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The counts over all files of an output; its agreement is the mean over the questions."""
    files = list(files)
    total: dict[str, Any] = {name: sum(file.get(name, 0) for file in files) for name in _SUMMED}
    if voted := [file for file in files if "agreement" in file]:
        num_voted = sum(file["num_samples"] for file in voted)
        total["agreement"] = math.fsum(file["agreement"] * file["num_samples"] for file in voted) / num_voted
    return {name: value for name, value in total.items() if value or name != "num_candidates"}


def describe_summary(counts: dict[str, Any]) -> str:
    """The counts over all files as a human-readable sentence."""
    candidates = f" of {counts['num_candidates']:,} candidates" if "num_candidates" in counts else ""
    agreement = f"; mean agreement {counts['agreement']:.3f}" if "agreement" in counts else ""
    return (
        f"{counts['num_samples']:,} texts{candidates}, {counts['num_tokens']:,} tokens; "
        f"{counts['num_truncated']:,} cut at the length limit, "
        f"{counts['num_empty']:,} empty, {counts['num_repetitive']:,} repetitive{agreement}"
    )
