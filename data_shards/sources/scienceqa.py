"""Reading ScienceQA's official layout, with or without its optional files.

problems.json      {qid: {"question": ..., "choices": [...], "answer": 0, ...}}
pid_splits.json    {"train": [qid, ...], "val": [...], "test": [...], "minitrain": [...], ...}
captions.json      {"captions": {qid: "..."}}                      (may be absent)
images/<split>/<qid>/<name>                                        (may be absent)
ceilings.json      accuracy bounds of a generated data set          (may be absent)

A record without ``choices`` is of another kind, with the fields of ``tables.py``: accepted ``answers``, the ``text`` of
an image-text pair, or a ``document``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_shards.sources.question_set import SPLITS, QuestionSet
from data_shards.sources.tables import sample_of_row
from data_shards.strict_json import read_json_file
from mmcot.errors import MissingFileError
from mmcot.texts.sample import Sample, SampleError


def recognizes(path: Path) -> bool:
    """Whether a path looks like this form."""
    return (path / "problems.json").exists() or (path / "pid_splits.json").exists()


def content_files(path: Path) -> list[Path]:
    """Return the files whose content determines the texts."""
    names = ("problems.json", "pid_splits.json", "captions.json", "ceilings.json")
    return [path / name for name in names if (path / name).exists()]


def read(path: Path) -> QuestionSet:
    """Read a folder in ScienceQA's layout.

    Raises:
        FileNotFoundError: problems.json or pid_splits.json is missing.
        SampleError: a problem is not valid, or a split names a qid that has no problem.
    """
    records, splits = _required(path, "problems.json"), _required(path, "pid_splits.json")
    captions_path, ceilings_path = path / "captions.json", path / "ceilings.json"
    captions = read_json_file(captions_path)["captions"] if captions_path.exists() else {}

    def build(split: str, qid: str) -> Sample:
        if qid not in records:
            raise SampleError(
                f"{path / 'pid_splits.json'}: split {split!r} names question {qid!r}, which is not in "
                "problems.json; remove it from the split or add the problem"
            )
        record, caption = {**records[qid], "split": split}, captions.get(qid, "")
        if "choices" in record:
            return Sample.from_scienceqa(qid, record, caption)
        return sample_of_row(qid, record | ({"caption": caption} if caption else {}))

    return QuestionSet(
        problems={split: [build(split, qid) for qid in splits.get(split, [])] for split in SPLITS},
        pictures=lambda problem: [path / "images" / problem.split / problem.qid / name for name in problem.images],
        lists={name: list(qids) for name, qids in splits.items() if name not in SPLITS},
        ceilings=read_json_file(ceilings_path) if ceilings_path.exists() else None,
    )


def _required(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.exists():
        raise MissingFileError(
            f"{path} does not exist; a folder in ScienceQA's layout has problems.json and pid_splits.json"
        )
    value = read_json_file(path)
    if not isinstance(value, dict):
        raise SampleError(f"{path} contains a {type(value).__name__}; expected an object")
    return value
