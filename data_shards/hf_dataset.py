"""Reading a data set that Hugging Face's ``save_to_disk`` wrote.

Columns are those of the tables (``tables.py``), such as the hub's ScienceQA copies have:
question, choices, answer, hint, image, lecture, solution, ... A row without a qid gets
its split and position: ``train-17``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_shards.questions import SPLITS, Picture, QuestionSet
from data_shards.tables import row_to_record
from mmcot.problem import Problem, ProblemError

_SPLIT_NAMES = {"train": "train", "validation": "val", "val": "val", "test": "test"}


def recognizes(path: Path) -> bool:
    """Whether a path looks like this form."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def read(path: Path) -> QuestionSet:
    """Read a saved DatasetDict with train, validation and test, or a single Dataset as train.

    Raises:
        ProblemError: a split is unknown, or a row cannot be used.
    """
    import datasets

    loaded = datasets.load_from_disk(str(path))
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    problems: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    where: dict[str, tuple[Any, int]] = {}
    for name, part in parts.items():
        if name not in _SPLIT_NAMES:
            raise ProblemError(f"{path}: split {name!r} is unknown; expected {', '.join(_SPLIT_NAMES)}")
        if "image" in part.column_names and isinstance(part.features["image"], datasets.Image):
            part = part.cast_column("image", datasets.Image(decode=False))
        for index, row in enumerate(part):
            problem = _problem(row, _SPLIT_NAMES[name], index)
            problems[problem.split].append(problem)
            where[problem.qid] = (part, index)

    def pictures(problem: Problem) -> list[Picture]:
        part, index = where[problem.qid]
        image = part[index].get("image") if problem.images else None
        if isinstance(image, dict) and image.get("bytes"):
            return [image["bytes"]]
        return [path / name for name in problem.images]

    return QuestionSet(problems, pictures)


def _problem(row: dict[str, Any], split: str, index: int) -> Problem:
    qid = str(row.get("qid") or row.get("id") or f"{split}-{index}")
    image = row.get("image")
    if isinstance(image, dict):
        name = image.get("path") or "no-picture"
        row = {**row, "image": Path(name).name if image.get("bytes") else name}  # a path is followed, so it is checked whole
    return Problem.from_scienceqa(qid, row_to_record(row) | {"split": split})
