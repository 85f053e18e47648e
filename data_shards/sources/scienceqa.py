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

import json
from collections import Counter
from pathlib import Path
from typing import Any

from data_shards.sources.columns import notes_on_fields
from data_shards.sources.folder_files import SPLIT_NAMES
from data_shards.sources.gathering import Gathering
from data_shards.sources.question_set import SPLITS, QuestionSet, read_captions
from data_shards.sources.row_samples import FIELDS, sample_of_row
from data_shards.strict_json import read_json_file
from mmcot.errors import Faults, InputError, MissingFileError
from mmcot.texts.sample import Sample, SampleError

_NAMES = ("problems.json", "pid_splits.json", "captions.json", "ceilings.json")


def recognizes(path: Path) -> bool:
    """Whether a path looks like this form."""
    return (path / "problems.json").exists() or (path / "pid_splits.json").exists()


def content_files(path: Path) -> list[Path]:
    """Return the files whose content determines the texts."""
    return [path / name for name in _NAMES if (path / name).exists()]


def read(path: Path) -> QuestionSet:
    """Read a folder in ScienceQA's layout.

    Raises:
        MissingFileError: problems.json or pid_splits.json is missing.
        InputError: a problem is not valid, or a split names a qid that has no problem.
    """
    records, lists = _required(path, "problems.json"), _read_lists(path)
    captions = read_captions(path / "captions.json") if (path / "captions.json").exists() else {}
    gathered = Gathering()
    problems_file, lists_file = str(path / "problems.json"), str(path / "pid_splits.json")
    for split in SPLITS:
        for qid in lists.get(split, ()):
            place = (problems_file, None, f"question {qid!r}")
            try:
                if qid not in records:
                    place = (lists_file, None, f"split {split!r}")
                    raise SampleError(
                        f"question {qid!r} is not in problems.json; remove it from the split or add the problem"
                    )
                gathered.add(_sample(qid, records[qid], split, captions.get(qid, "")), place)
            except InputError as error:
                gathered.refuse(error, place)
    return gathered.question_set(
        pictures=lambda problem: [path / "images" / problem.split / problem.qid / name for name in problem.images],
        lists={name: qids for name, qids in lists.items() if name not in SPLITS},
        ceilings=_required(path, "ceilings.json") if (path / "ceilings.json").exists() else None,
        notes=[*_unlisted(records, gathered), *_unused(records, captions)],
    )


def _sample(qid: str, record: Any, split: str, caption: str) -> Sample:
    if not isinstance(record, dict):
        shown = json.dumps(record, ensure_ascii=False)[:80]
        raise SampleError(f"it is {shown}; expected an object with a question's fields")
    record = {**record, "split": split}
    if "choices" in record:
        return Sample.from_scienceqa(qid, record, caption)
    return sample_of_row(qid, record | ({"caption": caption} if caption else {}))


def _unlisted(records: dict[str, Any], gathered: Gathering) -> list[str]:
    unlisted = [qid for qid in records if qid not in gathered.places] if len(records) > len(gathered.places) else []
    if not unlisted:
        return []
    return [
        f"note: {len(unlisted):,} questions of problems.json are in no split of pid_splits.json and are not used, such "
        f"as {unlisted[0]!r}"
    ]


def _unused(records: dict[str, Any], captions: dict[str, str]) -> list[str]:
    """Sentences on captions of unknown questions, and on fields that are not used."""
    notes = []
    if left_out := len(captions.keys() - records.keys()):
        notes.append(f"note: captions.json has captions of {left_out:,} unknown questions, which are left out")
    shapes, unknown = Counter(tuple(record) for record in records.values() if isinstance(record, dict)), Counter[str]()
    for names, times in shapes.items():
        unknown.update(dict.fromkeys(set(names) - FIELDS, times))
    return [*notes, *notes_on_fields(unknown)]


def _read_lists(folder: Path) -> dict[str, list[str]]:
    """The lists of pid_splits.json; ids that are integers become texts, as they are in problems.json."""
    path, found = folder / "pid_splits.json", {}
    for name, qids in _required(folder, "pid_splits.json").items():
        if not isinstance(qids, list):
            raise SampleError(f"it is {str(qids)[:80]!r}; expected a list of question ids").at(
                path, member=f"split {name!r}"
            )
        if not set(map(type, qids)) <= {str, int}:
            wrong = [qid for qid in qids if type(qid) not in (str, int)]
            raise SampleError(f"{str(wrong[0])[:80]!r} is no question id; expected texts such as '12'").at(
                path, member=f"split {name!r}"
            )
        split = SPLIT_NAMES.get(name.lower(), name)
        if split in found:
            raise SampleError(f"the split {split!r} has two lists, one of them {name!r}; keep one").at(path)
        found[split] = list(map(str, qids))
    _check_lists(path, found)
    return found


def _check_lists(path: Path, lists: dict[str, list[str]]) -> None:
    """Check that no question is twice in the splits."""
    if len({qid for split in SPLITS for qid in lists.get(split, ())}) == sum(len(lists.get(s, ())) for s in SPLITS):
        return
    faults, where = Faults(), dict[str, str]()
    for split in SPLITS:
        for qid in lists.get(split, ()):
            if qid in where:
                places = f"twice in {split!r}" if where[qid] == split else f"in {where[qid]!r} and in {split!r}"
                faults.add(SampleError(f"question {qid!r} is {places}; keep it in one split, once").at(path))
            where[qid] = split
    faults.raise_any()


def _required(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.exists():
        raise MissingFileError(
            f"{path} does not exist; a folder in ScienceQA's layout has problems.json and pid_splits.json; restore "
            "it, or give another folder"
        )
    value = read_json_file(path)
    if not isinstance(value, dict):
        raise SampleError(f"it contains a {type(value).__name__}; expected an object").at(path)
    return value
