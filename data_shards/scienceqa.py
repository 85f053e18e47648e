"""Reading ScienceQA's official layout, complete or in part.

    problems.json      {qid: {"question": ..., "choices": [...], "answer": 0, ...}}
    pid_splits.json    {"train": [qid, ...], "val": [...], "test": [...], "minitrain": [...], ...}
    captions.json      {"captions": {qid: "..."}}                      (may be absent)
    images/<split>/<qid>/<name>                                        (may be absent)
    ceilings.json      accuracy bounds of a generated data set          (may be absent)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from data_shards.storage import read_json
from mmcot.problem import Problem, ProblemError

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class ScienceQA:
    """A data set in memory: text only, pictures stay on disk.

    ``problems`` holds the three splits in the order of ``pid_splits.json``; ``lists`` the
    other lists of qids there (trainval and the mini splits).
    """

    folder: Path
    problems: dict[str, list[Problem]]
    lists: dict[str, list[str]]
    num_captions: int
    ceilings: dict[str, Any] | None

    def image_paths(self, problem: Problem) -> list[Path]:
        """Where the pictures of a problem should lie."""
        return [self.folder / "images" / problem.split / problem.qid / name for name in problem.images]


def read_scienceqa(folder: str | Path) -> ScienceQA:
    """Read a folder in ScienceQA's layout.

    Raises:
        FileNotFoundError: problems.json or pid_splits.json is missing.
        ProblemError: a problem cannot be used, or a split lists a qid that has none.
    """
    folder = Path(folder)
    records = _required(folder, "problems.json")
    splits = _required(folder, "pid_splits.json")
    captions_path = folder / "captions.json"
    captions = read_json(captions_path)["captions"] if captions_path.exists() else {}
    problems: dict[str, list[Problem]] = {}
    seen: dict[str, str] = {}
    for split in SPLITS:
        problems[split] = []
        for qid in splits.get(split, []):
            if qid not in records:
                raise ProblemError(
                    f"{folder / 'pid_splits.json'}: split {split!r} lists question {qid!r}, which problems.json does "
                    "not have; remove it from the split or add the problem"
                )
            if qid in seen:
                raise ProblemError(
                    f"{folder / 'pid_splits.json'}: question {qid!r} is in {seen[qid]!r} and in {split!r}; "
                    "every question belongs to one of train, val and test"
                )
            seen[qid] = split
            problems[split].append(Problem.from_scienceqa(qid, {**records[qid], "split": split}, captions.get(qid, "")))
    ceilings_path = folder / "ceilings.json"
    return ScienceQA(
        folder=folder,
        problems=problems,
        lists={name: list(qids) for name, qids in splits.items() if name not in SPLITS},
        num_captions=sum(bool(problem.caption) for split in problems.values() for problem in split),
        ceilings=read_json(ceilings_path) if ceilings_path.exists() else None,
    )


def _required(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; data.path must be a folder in ScienceQA's layout with problems.json and "
            "pid_splits.json"
        )
    value = read_json(path)
    if not isinstance(value, dict):
        raise ProblemError(f"{path} holds a {type(value).__name__}; expected an object")
    return value
