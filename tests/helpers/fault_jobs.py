"""Jobs that are disturbed at their commit points: data, texts, a replaced folder, generation, journal and ledger."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import fault_points

from data_shards import atomic_files
from data_shards.check import check_shards
from data_shards.generated_texts import (
    Task,
    close_output,
    open_output,
    reason_to_write_again,
    verified_files,
    write_task,
)
from data_shards.generation_ledger import read_ledger
from data_shards.leftovers import remove_leftovers
from data_shards.rationale_reader import read_rationales
from launcher.cluster.task_queue import TaskQueue
from launcher.config.loading import load_settings
from launcher.data.build import prepare_data
from launcher.generation import generation_worker, text_tasks
from launcher.runs.journal import Journal, JournalReader
from launcher.runs.ownership import owned
from launcher.runs.run_dir import RunDir
from launcher.runs.sample_ledger import Ledger, verify_ledger
from launcher.runs.signals import Stopped, StopRequest, sigterm_stops
from launcher.stages.jobs import GenerationJob

ALTERED = ("altered-", "damaged-")  # the product keeps a wrong file under such a name


@dataclasses.dataclass(frozen=True)
class Job:
    """A job on a folder.

    Attributes:
        run: the job, as often as it is started.
        read: what later steps read of its folder; raises where they would refuse it.
        is_owned: one process at a time owns the folder; another one takes it over.
        has_store: it uses a store or a server, which can be away.
        settle: what a user does after a former owner has continued.
        unprotected: patterns of files whose changed bytes nothing promises to notice.
        volatile: patterns of files that may differ between two good runs.
    """

    run: Callable[..., None]
    read: Callable[[Path], object]
    is_owned: bool = False
    has_store: bool = False
    settle: Callable[[Path], None] = lambda folder: None
    unprotected: tuple[str, ...] = ()
    volatile: tuple[str, ...] = ()

    def is_unprotected(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.unprotected)


def contents(folder: Path, volatile: tuple[str, ...] = ()) -> dict[str, str]:
    """The sha256 of every file that a job promises, by its path."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    parts_of = {name: Path(name).parts for name in names}
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in names
        if not any(part.startswith((".", *ALTERED)) for part in parts_of[name])
        and not any(re.search(pattern, name) for pattern in volatile)
    }


def build_data(folder: Path, **_) -> None:
    settings = load_settings(
        preset="demo",
        overrides=[
            f"data.shards_dir={folder / 'data'}",
            "data.mini_sqa.num_train=24",
            "data.mini_sqa.num_val=8",
            "data.mini_sqa.num_test=8",
            "data.samples_per_shard=12",
        ],
    )
    os.chdir(folder)
    prepare_data(settings, lambda line: None)


def read_data(folder: Path):
    """Every file, after every shard was read as `mmcot data check` does."""
    list(check_shards(folder / "data"))
    return contents(folder / "data")


def write_texts(folder: Path, **_) -> None:
    """Three tasks of a step, as the driver and its workers commit them."""
    tasks = [Task("train", "train-000000", start, 2) for start in (0, 2, 4)]
    open_output(folder, {"model": "1"})
    files = {}
    for task in tasks:
        qids, path = [f"q{task.start}", f"q{task.start + 1}"], folder / task.file_name
        while not path.exists() or reason_to_write_again(folder, task, qids):
            if path.exists():
                path.replace(path.with_name(f"altered-{path.name}"))
            write_task(folder, task, [{"qid": qid, "rationale": f"because {qid}"} for qid in qids])
        files[task.file_name] = {"sha256": atomic_files.sha256_of_file(path), "num_samples": 2}
    close_output(folder, files=files, summary={})


def read_texts(folder: Path):
    return [
        verified_files(folder),
        read_rationales(folder, "train"),
        [dataclasses.astuple(text) for text in read_ledger(folder)],
    ]


def replace_folder(folder: Path, **_) -> None:
    """A folder that replaces an older one, as an exported model does; one of the two is always there."""
    for number in range(2):
        staging = folder / ".staging-model"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        atomic_files.commit_json(staging / "model.json", {"number": number})
        atomic_files.commit_folder(staging, folder / "model")
        atomic_files.commit_json(folder / "standing.json", {"any": True})  # from here on there is a model


def read_folder(folder: Path):
    return atomic_files.read_json(folder / "model" / "model.json")


def generate(folder: Path, *, take_over: bool = False, shared: Path) -> None:
    """The tasks of a generation: the driver's queue and a worker's commits, without Ray and a model."""
    run_dir = RunDir(folder / "run")
    run_dir.path.mkdir(exist_ok=True)
    settings = load_settings(preset="demo", overrides=["generation.task_samples=8"])
    text_tasks.run_on_workers = _run_here
    generation_worker.sha256_of_weights = lambda model_dir: "0" * 64
    with sigterm_stops(), owned(run_dir, take_over=take_over) as attempt:
        remove_leftovers(run_dir.path, staging=not take_over)
        job = GenerationJob(
            stage="rationale",
            settings=settings,
            model_dir=str(folder / "model"),
            shards_dir=str(shared / "data"),
            output_dir=str(run_dir.texts("rationales")),
            run_dir=str(run_dir.path),
            attempt=attempt,
        )
        text_tasks.write_split_texts(job, ["train"], {"model": "1"})


def _run_here(worker_class, job, costs, *, max_attempts, done, **_):
    """``run_on_workers`` with one worker, in this process."""
    qids_of = text_tasks._qids_by_task(job)
    worker, queue = object.__new__(worker_class), TaskQueue(costs, max_attempts=max_attempts)
    worker.job, worker.free_since, worker.begun = job, None, {}
    worker.engine = types.SimpleNamespace(rows=types.SimpleNamespace(num_steps=0, num_row_steps=0, num_rows=1))
    worker.loader = types.SimpleNamespace(start=lambda *tasks: None)
    worker._begin = lambda task: generation_worker.BegunTask(
        _loaded(qids_of(task)), [_written(qid) for qid in qids_of(task)]
    )
    while (task := queue.take()) is not None:
        worker.following = queue.following()
        try:
            fault_points.current.at("hand-out", task.file_name, lambda: None)
            result = worker.run(task)
        except Exception as error:  # as the pool takes what a worker raises
            queue.failed(task, str(error))
            continue
        handing = functools.partial(done, task, result)
        fault_points.current.at("hand-out", f"{task.file_name} done", handing)
    return queue.set_aside


def _loaded(qids):
    return types.SimpleNamespace(qids=qids, samples=())


def _written(qid):
    text = types.SimpleNamespace(text=f"Because of {qid}.", num_tokens=4, finish="eos")
    return types.SimpleNamespace(text=text)


def read_generated(folder: Path):
    return read_texts(RunDir(folder / "run").texts("rationales"))


def write_lines(folder: Path, *, take_over: bool = False, num_steps: int = 6) -> None:
    """Journal and ledger of a training that commits its progress every second step."""
    run_dir = RunDir(folder / "run")
    run_dir.path.mkdir(exist_ok=True)
    with owned(run_dir, take_over=take_over) as attempt, StopRequest(run_dir, attempt).listening() as stop:
        progress = run_dir.checkpoints("rationale") / "progress.json"
        first = atomic_files.read_json(progress)["step"] if progress.exists() else 0
        journal, ledger = Journal(run_dir.journal("rationale")), Ledger(run_dir.ledger("rationale", 0), 3)
        journal.begin(first, num_steps)
        for step in range(first, num_steps):
            stopping = stop.seen()
            ledger.record(step, [(block, [f"q{step % 3}-{block}"]) for block in range(2)])
            journal.log(step + 1, {"loss": 1 / (step + 1)})
            if (step + 1) % 2 == 0 or stopping:
                run_dir.check_attempt(attempt)
                atomic_files.commit_json(progress, {"step": step + 1})
            if stopping and step + 1 < num_steps:
                raise Stopped("stopped")


def read_lines(folder: Path):
    """The ledger's own verification, and the first value of every (key, step), as it is sent."""
    run_dir = RunDir(folder / "run")
    said = verify_ledger(run_dir, "rationale", [f"q{step}-{block}" for step in range(3) for block in range(2)])
    points: dict[str, float] = {}
    for point in JournalReader(run_dir.journal("rationale")).read():
        for key, value in point["metrics"].items():
            points.setdefault(f"{key} {point['step']}", value)
    return [said, json.dumps(points, sort_keys=True)]
