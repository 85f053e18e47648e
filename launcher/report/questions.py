"""Questions, answers and pictures for the report's page.

A question, and what a run wrote for it:

    {"qid": "4402", "question": "...", "choices": ["...", "..."], "answer": 1, "context": "...",
     "gold": "Solution: ...", "subject": "natural science", "columns": ["NAT", "TXT", "IMG", "G1-6", "AVG"],
     "num_pictures": 1, "picture": 17}
    {"rationale": "Solution: ...", "rationale_right": true, "rouge_l": 1.0, "answer_text": "The answer is (B).",
     "prediction": 1, "right": true, "agreement": 0.75, "rationale_agreement": null}

``picture`` is an index into the page's pictures, or null. A rationale is right if it equals
the gold one word for word; the words are what white space separates.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_shards.atomic_files import sha256_of_file
from data_shards.indexed_tars import pictures_in_tars
from data_shards.json_shapes import read_record
from data_shards.mirror import local_folder
from data_shards.remote_files import is_remote
from data_shards.sources.pictures import PictureError, open_picture
from data_shards.sources.question_set import Picture
from data_shards.text_lines import read_lines
from launcher.config.chains import Chain
from launcher.config.settings import Settings
from launcher.data.dataset import kept_source, mini_sqa_folder, read_source
from launcher.evaluation.agreement import ANSWERS, RATIONALES
from launcher.evaluation.predictions import PREDICTION
from launcher.report.run_facts import wilson
from launcher.runs.places import place_around
from launcher.runs.run_dir import RunDir
from launcher.stages.data_folder import is_indexed
from mmcot.metrics.metrics import COLUMNS, columns_of
from mmcot.texts.answers import is_right
from mmcot.texts.prompts import build_pair
from mmcot.texts.sample import Sample

MAX_TEXT = 20_000  # characters of one text on the page
LONGEST_SIDE = 256  # pixels
FIELDS = ("subject", "topic", "category", "skill", "grade")


def find_shards(run_dir: RunDir, settings: Settings) -> Path | None:
    """The data folder of a run, at its path or next to the run if both were moved; None if it is missing."""
    marker = run_dir.marker("data", needs=("shards_dir",))
    location = marker["outputs"]["shards_dir"] if marker else settings.data.shards_dir
    if location is None:
        return None
    location = place_around(run_dir.path, location)
    if is_remote(location):
        return local_folder(location, settings.data.cache_dir, features=settings.data.features)
    return _find(Path(location), run_dir, "text/manifest.json")


def find_pictures(
    run_dir: RunDir, settings: Settings, shards_dir: Path
) -> Callable[[Sample], Sequence[Picture]] | None:
    """The function from a problem to its pictures, from the data set itself.

    None if the data set is missing or is not the one that the shards were built from: a wrong
    picture under the same question id would be worse than none.
    """
    if is_indexed(shards_dir):
        return pictures_in_tars(shards_dir)
    if settings.data.path is not None:
        source = _find(kept_source(settings.data), run_dir, "")
    else:
        drawn = [
            shards_dir.parent / mini_sqa_folder(settings.data).name,
            *sorted(shards_dir.parent.glob("mini_sqa-source-*")),  # of an earlier version
        ]
        source = next(
            (
                found
                for folder in drawn
                if (found := _find(folder, run_dir, "problems.json")) and _is_source_of(shards_dir, found)
            ),
            None,
        )
    data = settings.data.model_copy(update={"captions": None})  # the file may be missing
    return read_source(data, source).pictures if source and _is_source_of(shards_dir, source) else None


def describe_question(problem: Sample, gold: str | None) -> dict[str, Any]:
    """A question as the page shows it."""
    return {
        "qid": problem.qid,
        "question": cut(build_pair(problem, "P-T")[0] if problem.kind in ("pair", "document") else problem.question),
        "choices": [cut(choice) for choice in problem.choices],
        "answer": problem.answer,
        "accepted": [cut(text) for text in problem.accepted],
        "context": cut(problem.hint),
        "gold": cut(gold),
        **{field: getattr(problem, field) for field in FIELDS},
        "columns": list(columns_of(problem)),
        "num_pictures": len(problem.images),
        "picture": None,
    }


def read_outputs(run_dir: RunDir, split: str, chain: Chain) -> dict[str, dict[str, Any]]:
    """What a run has written for the questions of a split: its predictions, or the rationales so far."""
    path = run_dir.predictions / f"{split}.jsonl"
    if path.exists():
        return {line["qid"]: line for line in read_lines(path, PREDICTION)}
    if not chain.stages[-1].reads:
        return {}
    text = chain.stages[-1].reads[-1]
    files, field = sorted((run_dir.texts(text) / split).glob("[0-9]*.jsonl")), chain.field_of(text)
    return {
        line["qid"]: {"rationale": line[field]} for file in files for line in read_lines(file, {"qid": str, field: str})
    }


def judge(
    outputs: Mapping[str, dict[str, Any]],
    problems: Mapping[str, Sample],
    gold_reasons: Callable[[Sample], str | None],
) -> dict[str, dict[str, Any]]:
    """Compare a run's outputs with the gold rationales and answers."""
    from mmcot.metrics.rationale_metrics import rouge_l_of_each

    outputs = {qid: line for qid, line in outputs.items() if qid in problems}
    gold = {qid: gold_reasons(problems[qid]) for qid in outputs}
    is_exact = {qid: _words(line.get("rationale")) == _words(gold[qid]) for qid, line in outputs.items()}
    others = [qid for qid in outputs if not is_exact[qid] and gold[qid] and outputs[qid].get("rationale")]
    rouge = dict(
        zip(
            others,
            rouge_l_of_each([outputs[qid]["rationale"] for qid in others], [gold[qid] or "" for qid in others]),
            strict=True,
        )
    )
    judged = {}
    for qid, line in outputs.items():
        has_rationale = bool(gold[qid]) and line.get("rationale") is not None
        judged[qid] = {
            "rationale": cut(line.get("rationale")),
            "rationale_right": is_exact[qid] if has_rationale else None,
            "rouge_l": (1.0 if is_exact[qid] else round(rouge.get(qid, 0.0), 4)) if has_rationale else None,
            "answer_text": cut(line.get("answer_text")),
            "prediction": line.get("prediction"),
            "right": is_right(problems[qid], line["prediction"]) if "prediction" in line else None,
            **{key: line.get(key) for key in (ANSWERS, RATIONALES)},
        }
    return judged


def break_down(problems: Mapping[str, Sample], judged: Mapping[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Accuracy with its 95 % interval, by class of the table and by each field."""
    answered = [(problems[qid], line["right"]) for qid, line in judged.items() if line["right"] is not None]
    groups: dict[str, dict[str, list[bool]]] = {"class": {column: [] for column in COLUMNS}} | {
        field: {} for field in FIELDS
    }
    for problem, right in answered:
        for column in columns_of(problem):
            groups["class"][column].append(right)
        for field in FIELDS:
            groups[field].setdefault(getattr(problem, field), []).append(right)
    return {
        field: [_describe_group(name, outcomes) for name, outcomes in parts.items() if outcomes]
        for field, parts in groups.items()
    }


def choose_qids(qids: Iterable[str], is_wrong: Callable[[str], bool], limit: int) -> list[str]:
    """Up to ``limit`` of them: wrong ones first, each part in a fixed random order."""
    drawn = sorted(qids, key=lambda qid: hashlib.sha256(qid.encode()).digest())
    return sorted(drawn, key=lambda qid: not is_wrong(qid))[:limit]


def embed_picture(pictures: Sequence[Picture], name: str) -> str | None:
    """The first picture that exists, small, as a data URI; None where none exists or it cannot be read."""
    for picture in pictures:
        if not isinstance(picture, bytes) and not picture.is_file():
            continue
        try:
            return to_data_uri(open_picture(picture, name=name, longest_side=LONGEST_SIDE))
        except PictureError:
            return None
    return None


def to_data_uri(image: Image.Image) -> str:
    """A thumbnail as PNG or JPEG, whichever is smaller."""
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    encoded = {}
    for kind, options in {"png": {"optimize": True}, "jpeg": {"quality": 82}}.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda name: len(encoded[name]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


def cut(text: Any) -> str | None:
    """A text cut to the length that a page can show, with the number of characters cut."""
    if text is None:
        return None
    text = str(text)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} [… {len(text) - MAX_TEXT:,} characters more]"


def _find(folder: Path, run_dir: RunDir, member: str) -> Path | None:
    parents = run_dir.path.absolute().parents
    candidates = [folder, Path("data") / folder.name, *(above / "data" / folder.name for above in parents[1:2])]
    return next((path for path in candidates if (path / member if member else path).exists()), None)


def _is_source_of(shards_dir: Path, source: Path) -> bool:
    """Whether the text shards were built from these files, by the sha256s in their record."""
    path = shards_dir / "inputs.json"
    shape = {"files?": {str: str}}
    files = (
        read_record(path, shape, remedy=f"restore it, or delete {shards_dir}").get("files", {}) if path.exists() else {}
    )
    paths = {source if source.is_file() else source / name: sha256 for name, sha256 in files.items()}
    return bool(paths) and all(path.is_file() and sha256_of_file(path) == sha256 for path, sha256 in paths.items())


def _describe_group(name: str, outcomes: list[bool]) -> dict[str, Any]:
    low, high = wilson(sum(outcomes), len(outcomes))
    return {
        "name": name,
        "num": len(outcomes),
        "num_right": sum(outcomes),
        "accuracy": round(100 * sum(outcomes) / len(outcomes), 2),
        "low": low,
        "high": high,
    }


def _words(text: str | None) -> list[str]:
    return (text or "").split()
