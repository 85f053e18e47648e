"""The known forms of data sets, and reading one in any of them.

read_questions("path/to/ScienceQA")     # a folder in ScienceQA's layout
read_questions("mine.jsonl")             # or .json, .csv, .parquet, or a folder with train.jsonl, val.jsonl, ...
read_questions("my-dataset-on-disk")     # saved by Hugging Face's `save_to_disk`
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from data_shards.sources import hf_dataset, scienceqa, tables
from data_shards.sources.question_set import QuestionSet, answered
from mmcot.errors import InputError, MissingFileError


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of data sets.

    Attributes:
        label: its human-readable name.
        recognizes: whether a path has this form.
        read: reads a path; its samples may be of any kinds, and it says where their pictures are.
        content_files: the files of a path whose content determines the texts, at least one.
        renames_columns: whether ``read`` takes a second argument, the columns of fields that have other names.
        holds_pictures: whether these files also contain the pictures. Others are compared by name and size, encoded
            ones by their bytes.
    """

    label: str
    recognizes: Callable[[Path], bool]
    read: Callable[..., QuestionSet]
    content_files: Callable[[Path], Sequence[Path]]
    holds_pictures: bool = False
    renames_columns: bool = False

    def questions(self, path: Path, columns: Mapping[str, str] | None = None) -> QuestionSet:
        """Read a path, with the columns of fields that have other names.

        Raises:
            InputError: as ``read``; or this form has no columns.
        """
        if not columns:
            return self.read(path)
        if not self.renames_columns:
            raise InputError(
                f"data.columns ({', '.join(columns)}) is given, and {path} is {self.label}, which has no columns; "
                "leave data.columns out"
            )
        return self.read(path, columns)


# By name, in the order in which they are tried; a plain dict, to which extensions add theirs.
FORMS: dict[str, Form] = {
    "scienceqa": Form(
        "ScienceQA's folder (with problems.json and pid_splits.json)",
        scienceqa.recognizes,
        scienceqa.read,
        scienceqa.content_files,
    ),
    "hf_dataset": Form(
        "a data set saved by Hugging Face's save_to_disk",
        hf_dataset.recognizes,
        hf_dataset.read,
        hf_dataset.content_files,
        holds_pictures=True,
        renames_columns=True,
    ),
    "tables": Form(
        ".jsonl, .json, .csv or .parquet (a file, or a folder with one for each of train, val and test)",
        tables.recognizes,
        tables.read,
        tables.content_files,
        renames_columns=True,
    ),
}


def form_labels() -> str:
    """The names of all forms, for messages."""
    return ", ".join(form.label for form in FORMS.values())


def form_of(path: str | Path) -> Form:
    """Return the form of a data set.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: the form is unknown.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"data.path {path} does not exist; give an existing folder or file")
    for form in FORMS.values():
        if form.recognizes(path):
            return form
    found = sorted(child.name for child in path.iterdir())[:8] if path.is_dir() else path.suffix
    raise InputError(
        f"{path} is in no known form (found {found}); expected one of: {form_labels()}; webdataset tars are "
        "first indexed: `mmcot data index --help`"
    )


def read_questions(
    path: str | Path, *, leave_out: bool = False, columns: Mapping[str, str] | None = None
) -> QuestionSet:
    """Read a data set in any of the known forms.

    Args:
        columns: the columns of fields that have other names, such as ``{"question": "text"}``.
        leave_out: leave out training samples without an answer, which are otherwise refused.

    Raises:
        MissingFileError: ``path`` does not exist.
        InputError: questions are not valid, the message names each; or the form is unknown.
    """
    form = form_of(path)
    with _without_collector():
        return answered(form.questions(Path(path), columns), leave_out=leave_out)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Stop Python's search for cycles of objects: a reading makes many objects, all of which stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
