"""Captions of a data set's pictures, by a local captioning model on Ray workers.

    mmcot data caption SCIENCEQA --model Salesforce/blip-image-captioning-base --out captions.json

    captions.json          {"captions": {qid: "a compass on a map"}, "made_by": "..."}   ScienceQA's layout
    captions.json.parts/   one file per task until all are done; a second run writes only missing ones

``data.captions=captions.json`` uses them for a data set, ``data.use_caption=true`` puts them into the prompts.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_shards.atomic_files import commit_json, read_json
from data_shards.open_ahead import open_ahead
from data_shards.picture_features import is_batch, open_pictures_of
from data_shards.sources.forms import read_questions
from data_shards.sources.question_set import SPLITS
from launcher.cluster.gpus import with_device
from launcher.cluster.ray_session import ray_session
from launcher.cluster.worker_pool import Worker, run_on_workers
from launcher.config.chains import ANSWER, RATIONALE
from launcher.config.loading import merge_override, parse_settings
from launcher.config.settings import Settings, SettingsError
from launcher.runs.signals import sigterm_stops
from mmcot.errors import OperationError

TASK_PICTURES = 64
BATCH_SIZE = 16


class CaptionsError(OperationError):
    """Captions could not be generated; the message names the questions and the reason."""


@dataclasses.dataclass(frozen=True)
class CaptionsJob:
    """The job of a worker: plain values that can be sent to its process."""

    settings: Settings
    source: str
    model: str
    parts_dir: str


@dataclasses.dataclass(frozen=True, order=True)
class CaptionsTask:
    """The questions of one file of captions."""

    number: int
    qids: tuple[str, ...]

    @property
    def file_name(self) -> str:
        """Such as ``000012.json``."""
        return f"{self.number:06d}.json"


class CaptionsWorker(Worker):
    """Runs tasks with one captioning model in a Ray actor."""

    def __init__(self, job: CaptionsJob) -> None:
        import torch

        from mmcot.models.device import open_device
        from mmcot.vision.captioning import Captioner

        torch.set_num_threads(job.settings.cluster.cpus_per_worker)
        self.job = job
        self.captioner = Captioner(job.model, device=open_device(use_gpu=bool(job.settings.cluster.use_gpu)).type)
        questions = read_questions(job.source, columns=job.settings.data.columns)
        self.problems = {problem.qid: problem for split in SPLITS for problem in questions.problems[split]}
        self.open_pictures = open_pictures_of(questions.pictures)

    def run(self, task: CaptionsTask) -> int:
        """Write the captions of a task; returns their number."""
        captions: dict[str, str] = {}
        seen: dict[str, Image.Image] = {}
        opened = open_ahead(
            (self.problems[qid] for qid in task.qids),
            Counter(),
            open_pictures=self.open_pictures,
            num_threads=self.job.settings.cluster.cpus_per_worker,
            num_ahead=2 * BATCH_SIZE,
        )
        for problem, pictures in opened:
            self.progress()
            qid = problem.qid
            if pictures:  # empty for missing files
                seen[qid] = pictures[0]
            if seen and (qid == task.qids[-1] or is_batch(list(seen.values()), BATCH_SIZE)):
                captions |= dict(zip(seen, self.captioner.caption(list(seen.values())), strict=True))
                seen.clear()
        commit_json(Path(self.job.parts_dir) / task.file_name, captions)
        return len(captions)


def write_captions(
    source: Path, model: str, out: Path, *, overrides: Sequence[str] = (), report: Callable[[str], None] = print
) -> int:
    """Write captions of the first picture of every question; returns their number.

    Args:
        overrides: ``section.key=value`` of ``cluster``, such as its number of workers, or of ``data.columns``.

    Raises:
        SettingsError: ``out`` exists, or its parts are of another model or data set.
        CaptionsError: tasks failed; the output of the others is committed.
    """
    model = str(Path(model).absolute()) if Path(model).exists() else model  # workers run in other folders
    if out.exists():
        raise SettingsError(f"{out} exists; delete it, or give another --out")
    values: dict[str, Any] = {RATIONALE: {"num_steps": 1}, ANSWER: {"num_steps": 1}}
    for override in overrides:
        values = merge_override(values, override)
    settings = with_device(parse_settings(values), None, report)
    questions = read_questions(source, columns=settings.data.columns)
    qids = [problem.qid for split in SPLITS for problem in questions.problems[split] if questions.pictures(problem)]
    tasks = [
        CaptionsTask(number, tuple(qids[start : start + TASK_PICTURES]))
        for number, start in enumerate(range(0, len(qids), TASK_PICTURES))
    ]
    parts = out.with_name(f"{out.name}.parts")
    inputs = {"model": model, "qids": qids}
    if (parts / "inputs.json").exists() and read_json(parts / "inputs.json") != inputs:
        raise SettingsError(f"{parts} holds captions of another model or data set; delete it, or give another --out")
    commit_json(parts / "inputs.json", inputs)
    missing = [task for task in tasks if not (parts / task.file_name).exists()]
    if missing:
        _run(CaptionsJob(settings, str(source.absolute()), model, str(parts.absolute())), missing, len(tasks), report)
    captions = {qid: caption for task in tasks for qid, caption in read_json(parts / task.file_name).items()}
    commit_json(out, {"captions": captions, "made_by": model})
    shutil.rmtree(parts)
    report(
        f"{out}: {len(captions):,} captions"
        + (
            f"; {len(qids) - len(captions):,} questions whose picture is absent have none"
            if len(captions) < len(qids)
            else ""
        )
    )
    return len(captions)


def _run(job: CaptionsJob, missing: list[CaptionsTask], total: int, report: Callable[[str], None]) -> None:
    finished = total - len(missing)

    def done(task: CaptionsTask, result: int | None) -> None:
        nonlocal finished
        finished += 1
        report(f"  captions: {finished}/{total} tasks")

    with sigterm_stops(), ray_session(job.settings.cluster):
        set_aside = run_on_workers(
            CaptionsWorker,
            job,
            {task: len(task.qids) for task in missing},
            cluster=job.settings.cluster,
            gpus_per_worker=1,
            max_attempts=job.settings.generation.max_attempts,
            hang_timeout_s=job.settings.generation.hang_timeout_s,
            is_committed=lambda task: (Path(job.parts_dir) / task.file_name).exists(),
            done=done,
            report=report,
        )
    if set_aside:
        task, error = next(iter(set_aside.items()))
        raise CaptionsError(
            f"captions of {len(set_aside)} of {total} tasks failed; the others are committed, run again to retry. "
            f"Questions {', '.join(task.qids[:4])} ...:\n{error}"
        )
