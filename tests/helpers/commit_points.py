"""Faults at every commit point of jobs: ``commit_points.py FOLDER SEED SHARE [JOB ...]`` prints what was tried.

A commit point is a call by which ``data_shards/atomic_files.py`` makes a file durable or visible: fsync, rename,
exchange. At the chosen ones a process of its own is killed, gets a signal, or the call fails; then the job runs again,
undisturbed, and its folder must be the same, byte by byte. Every trial is a fork of this process.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

from data_shards import atomic_files
from data_shards.generated_texts import (
    Task,
    close_output,
    open_output,
    reason_to_write_again,
    verified_files,
    write_task,
)
from launcher.config.loading import load_settings
from launcher.data.build import prepare_data

FAULTS = ("kill -9", "SIGTERM", "SIGHUP", "EIO", "ENOSPC", "kill -9 after")
DONE, NOT_REACHED = 0, 7


def build_data(folder: Path) -> None:
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


def write_texts(folder: Path) -> None:
    """Three tasks of a step, as the driver and its workers commit them."""
    tasks = [Task("train", "train-000000", start, 2) for start in (0, 2, 4)]
    open_output(folder, {"model": "1"})
    files = {}
    for task in tasks:
        qids, path = [f"q{task.start}", f"q{task.start + 1}"], folder / task.file_name
        if not path.exists() or reason_to_write_again(folder, task, qids):
            write_task(folder, task, [{"qid": qid, "rationale": f"because {qid}"} for qid in qids])
        files[task.file_name] = {"sha256": atomic_files.sha256_of_file(path)}
    close_output(folder, files=files, summary={})
    verified_files(folder)


def replace_folder(folder: Path) -> None:
    """A folder that replaces an older one, as an exported model does; one of the two is always there."""
    for number in range(2):
        staging = folder / ".staging-model"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        atomic_files.commit_json(staging / "model.json", {"number": number})
        atomic_files.commit_folder(staging, folder / "model")


JOBS = {"data": build_data, "texts": write_texts, "folder": replace_folder}


def digest(folder: Path) -> str:
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and not path.name.startswith((".tmp-", ".lock"))
    )
    total = hashlib.sha256()
    for path in files:
        total.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def install(fault: str, number: int) -> list[int]:
    """Let the ``number``-th commit point have the fault; the list counts the points that were reached."""
    reached: list[int] = []

    def at(call):
        def point(*arguments):
            reached.append(1)
            is_it = len(reached) == number + 1
            if is_it and fault.startswith("E"):
                raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))
            if is_it and not fault.endswith("after"):
                os.kill(os.getpid(), getattr(signal, fault, signal.SIGKILL))
            result = call(*arguments)
            if is_it:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return point

    atomic_files._fsync = at(atomic_files._fsync)
    atomic_files._exchange = at(atomic_files._exchange)
    atomic_files.os = type("os_with_faults", (), {**vars(os), "replace": staticmethod(at(os.replace))})
    return reached


def forked(job, folder: Path, fault: str | None = None, number: int = 0) -> int:
    """Run a job in a child; its status."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            reached = install(fault, number) if fault else []
            job(folder)
            status = NOT_REACHED if fault and len(reached) <= number else DONE
        except OSError:
            status = 3
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def main() -> None:
    place, seed, share = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    jobs = {name: JOBS[name] for name in sys.argv[4:] or JOBS}
    chance, found = random.Random(seed), {"tried": {}, "points": {}, "wrong": []}
    os.setpgrp()
    for name, job in jobs.items():
        (place / name).mkdir(parents=True)
        assert forked(job, place / name) == 0
        expected = digest(place / name)
        for fault in FAULTS:
            number = 0
            while True:
                if chance.random() > share and number:
                    number += 1
                    if number > found["points"].get(name, 10**9):
                        break
                    continue
                folder = place / "trial"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                status = forked(job, folder, fault, number)
                if os.WIFEXITED(status) and os.WEXITSTATUS(status) == NOT_REACHED:
                    found["points"][name] = min(number, found["points"].get(name, 10**9))
                    break
                if name == "folder" and number > 8 and not (folder / "model" / "model.json").exists():
                    found["wrong"].append(f"{name}, {fault} at {number}: neither the old folder nor the new one")
                again = forked(job, folder)
                found["tried"][fault] = found["tried"].get(fault, 0) + 1
                if again != 0 or digest(folder) != expected:
                    found["wrong"].append(f"{name}, {fault} at point {number}: status {again}")
                number += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main()
