"""The data set from which shards are built: a user's, or generated MiniSQA."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from data_shards.atomic_files import commit_folder, exclusive, fingerprint
from data_shards.mini_sqa.generate import VERSION as MINI_SQA_VERSION
from data_shards.mini_sqa.generate import write_mini_sqa
from data_shards.sources import scienceqa
from data_shards.sources.forms import read_questions
from data_shards.sources.question_set import QuestionSet, with_captions, with_lists
from launcher.config.settings import Data
from launcher.data.hub_source import fetch, hub_folder, is_on_hub
from launcher.runs.progress import Phase


def source_folder(data: Data, report: Callable[[str], None]) -> Path:
    """Return the folder or file of the data set: generated MiniSQA where no path is given, and a folder of the Hub's.

    Raises:
        InputError: a data set of the Hub cannot be read.
    """
    if data.path is not None and is_on_hub(data.path):
        return fetch(data.path, _parent(data), report)
    if data.path is not None:
        return Path(data.path)
    folder = mini_sqa_folder(data)
    if scienceqa.recognizes(folder):  # no lock, because the folder may be read-only
        return folder
    with exclusive(folder.parent):
        if not scienceqa.recognizes(folder):
            report(Phase("  drawing MiniSQA"))
            staging = folder.with_name(f".staging-{folder.name}")
            shutil.rmtree(staging, ignore_errors=True)  # of a killed process
            write_mini_sqa(staging, **data.mini_sqa_arguments)
            commit_folder(staging, folder)
            report(f"MiniSQA: drawn into {folder}")
    return folder


def mini_sqa_folder(data: Data) -> Path:
    """Return the folder of MiniSQA with these settings, next to the shards, where all workers can read it."""
    return _parent(data) / f"mini_sqa-source-{fingerprint({**data.mini_sqa_arguments, 'version': MINI_SQA_VERSION})}"


def kept_source(data: Data) -> Path:
    """Return where the data set of ``data.path`` is, or would be if it were read from the Hub."""
    path = str(data.path)
    return hub_folder(path, _parent(data)) if is_on_hub(path) else Path(path)


def _parent(data: Data) -> Path:
    return Path(data.shards_dir).parent if data.shards_dir else Path("data")


def local_path(path: str, report: Callable[[str], None]) -> Path:
    """Return the file or folder that a command's argument names; a data set of the Hub is kept in ``data/``.

    Raises:
        InputError: a data set of the Hub cannot be read.
    """
    return fetch(path, Path("data"), report) if is_on_hub(path) else Path(path)


def read_source(data: Data, source: Path) -> QuestionSet:
    """Read the questions of a data set, with the captions and lists of the settings."""
    questions = read_questions(source, leave_out=data.unanswered == "leave-out", columns=data.columns)
    if data.captions:
        questions = with_captions(questions, data.captions)
    return with_lists(questions, {**data.splits}) if data.splits else questions
