"""Predictions and scores from generated answers.

predictions/test.jsonl   {"qid": "10", "rationale": "Solution: ...", "answer_text": "The answer is (B).",
                          "prediction": 1, "agreement": 0.75, "rationale_agreement": 0.5}
scores.json              nine columns, rationale scores, parse-failure rate, in percent; accuracy by agreement

The agreements are there where the text was chosen by a vote of candidates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_shards import writer
from data_shards.atomic_files import commit_bytes
from data_shards.generated_texts import Task
from data_shards.manifest import manifest_shards, read_manifest
from data_shards.text_lines import read_lines
from launcher.config.chains import Chain
from launcher.evaluation.agreement import AGREEMENT, ANSWERS, RATIONALES, agreement_report
from mmcot.errors import InputError
from mmcot.metrics.metrics import score_report
from mmcot.texts.answers import parse_prediction
from mmcot.texts.prompts import split_format
from mmcot.texts.sample import Sample

# A line of a run's predictions.
PREDICTION = {
    "qid": str,
    "rationale?": (str, None),
    "answer_text?": (str, None),
    "prediction?": (int, str, None),
    "texts?": {str: (str, None)},
    "agreement?": AGREEMENT,
    "rationale_agreement?": AGREEMENT,
}


def read_problems(shards_dir: str | Path, split: str) -> dict[str, Sample]:
    """Read the questions of a split by qid, in shard order."""
    folder = Path(shards_dir) / "text"
    shards = manifest_shards(read_manifest(folder), split)
    return {problem.qid: problem for shard in shards for problem in writer.read_problems(folder, shard)}


def write_predictions(
    path: Path,
    *,
    parts_dir: Path,
    tasks: list[Task],
    problems: Mapping[str, Sample],
    texts: Mapping[str, Mapping[str, str]],
    chain: Chain,
    format: str,
    rationale_agreements: Mapping[str, float] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Join the answers of all tasks into one file, one line per question in shard order.

    Args:
        texts: those of earlier stages by name and qid. The last that the answering stage reads is the rationale; in a
            chain without one it is parsed from the answer.
        format: the prompt format of the answering stage.
        rationale_agreements: by qid, of the rationales that were chosen by a vote.
    """
    output = split_format(format)[1]
    lines, reads, field = [], chain.stages[-1].reads, chain.stages[-1].name
    for task in tasks:
        for answer in read_lines(parts_dir / task.file_name, {"qid": str, field: str, "agreement?": AGREEMENT}):
            qid, text = answer["qid"], answer[field]
            if qid not in problems:
                raise InputError(f"question {qid!r} is not in the data; delete the file and run again").at(
                    parts_dir / task.file_name
                )
            prediction = parse_prediction(problems[qid], text, output=output)
            reasons = texts[reads[-1]].get(qid) if reads else chain.reasons(text, problems[qid])
            line = {"qid": qid, "rationale": reasons, "answer_text": text, "prediction": prediction}
            line |= other_texts(chain, {name: part.get(qid) for name, part in texts.items()})
            agreements = {ANSWERS: answer.get("agreement"), RATIONALES: rationale_agreements.get(qid)}
            lines.append(line | {key: value for key, value in agreements.items() if value is not None})
    commit_bytes(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return lines


def other_texts(chain: Chain, texts: Mapping[str, str | None]) -> dict[str, Any]:
    """The texts of a question that are not its rationale, as the key "texts" of a line, if there are any."""
    reads = chain.stages[-1].reads
    others = {name: text for name, text in texts.items() if name != (reads[-1] if reads else None)}
    return {"texts": others} if others and len(texts) > 1 else {}


def score(
    lines: list[dict[str, Any]],
    problems: Mapping[str, Sample],
    *,
    split: str,
    gold_reasons: Callable[[Sample], str | None],
) -> dict[str, Any]:
    """Compare predictions with the gold answers, and rationales, if there are any, with the gold ones.

    After a vote there are also the sections of ``agreement_report``.
    """
    found = {qid: gold_reasons(problem) for qid, problem in problems.items()}
    references = {qid: reasons for qid, reasons in found.items() if reasons is not None}
    has_reasons = len(references) == len(problems)
    report = score_report(
        problems,
        {line["qid"]: line["prediction"] for line in lines},
        split=split,
        rationales={line["qid"]: line["rationale"] for line in lines} if has_reasons else None,
        references=references if has_reasons else None,
    )
    sections = {key: agreement_report(lines, problems, key=key) for key in (ANSWERS, RATIONALES)}
    return report | {key: section for key, section in sections.items() if section is not None}
