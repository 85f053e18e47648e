"""Reading a data set in any of the known forms.

read_questions("path/to/ScienceQA")     # a folder in ScienceQA's layout
read_questions("mine.jsonl")             # or .csv, or a folder with train.jsonl, val.jsonl, ...
read_questions("my-dataset-on-disk")     # saved by Hugging Face's `save_to_disk`
"""

from __future__ import annotations

from pathlib import Path

from data_shards.sources import hf_dataset, scienceqa, tables
from data_shards.sources.question_set import QuestionSet


def read_questions(path: str | Path) -> QuestionSet:
    """Read a data set in any of the known forms.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        SampleError: a question is not valid; the message names it.
        ValueError: the form is unknown.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data.path {path} does not exist; give an existing folder or file")
    for form in (scienceqa, hf_dataset, tables):
        if form.recognizes(path):
            return form.read(path)
    found = sorted(child.name for child in path.iterdir())[:8] if path.is_dir() else path.suffix
    raise ValueError(
        f"{path} is in no known form (found {found}); expected a folder with problems.json and pid_splits.json "
        "(ScienceQA), a folder saved by datasets' save_to_disk, a .jsonl or .csv file, or a folder with train.jsonl, "
        "val.jsonl and test.jsonl"
    )
