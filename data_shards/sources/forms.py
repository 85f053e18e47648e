"""Reading a data set in any of the known forms.

read_questions("path/to/ScienceQA")     # a folder in ScienceQA's layout
read_questions("mine.jsonl")             # or .csv, or a folder with train.jsonl, val.jsonl, ...
read_questions("my-dataset-on-disk")     # saved by Hugging Face's `save_to_disk`

Everything that depends on the form is in its value of ``FORMS``; this module loads no large library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from data_shards.sources import hf_dataset, scienceqa, tables
from data_shards.sources.question_set import QuestionSet, files_with_text


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """A form of data sets.

    Attributes:
        label: what such a data set is, in words that follow "expected".
        recognizes: whether an existing path is such a data set; the first form that recognizes a path reads it.
        read: maps the path to samples of any kinds and their pictures.
        content_files: maps the path to the files whose content determines the texts, at least one. The folder of shards
            is bound to their names and sha256.
        holds_pictures: whether these files contain the pictures too. Pictures elsewhere are compared by name and size,
            encoded ones by their bytes.
    """

    label: str
    recognizes: Callable[[Path], bool]
    read: Callable[[Path], QuestionSet]
    content_files: Callable[[Path], Sequence[Path]]
    holds_pictures: bool = False


FORMS: dict[str, Form] = {
    "scienceqa": Form(
        label="a folder with problems.json and pid_splits.json (ScienceQA's)",
        recognizes=scienceqa.recognizes,
        read=scienceqa.read,
        content_files=scienceqa.content_files,
    ),
    "saved": Form(
        label="a data set saved by Hugging Face's save_to_disk",
        recognizes=hf_dataset.recognizes,
        read=hf_dataset.read,
        content_files=files_with_text,
        holds_pictures=True,
    ),
    "tables": Form(
        label=f"a {' or '.join(tables.SUFFIXES)} file, or a folder with one per split (train.jsonl, val.jsonl, ...)",
        recognizes=tables.recognizes,
        read=tables.read,
        content_files=files_with_text,
    ),
}


def known_forms() -> str:
    """All forms in words, for messages and descriptions."""
    *labels, last = (form.label for form in FORMS.values())
    return f"{', '.join(labels)}, or {last}"


def form_of(path: str | Path) -> Form:
    """Return the form of a data set.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: no form recognizes it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data.path {path} does not exist; give an existing folder or file")
    for form in FORMS.values():
        if form.recognizes(path):
            return form
    found = sorted(child.name for child in path.iterdir())[:8] if path.is_dir() else path.suffix
    raise ValueError(f"{path} is in no known form (found {found}); expected {known_forms()}")


def read_questions(path: str | Path) -> QuestionSet:
    """Read a data set in any of the known forms.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        SampleError: a question is not valid; the message names it.
        ValueError: the form is unknown.
    """
    return form_of(path).read(Path(path))
