"""Ranks under torchrun, for tests: ``rank.py [--die RANK STEP|PHASE] JOB.json [JOB.json ...]``.

Rank ``RANK`` kills itself with -9 when step ``STEP`` is reported (a negative one: sends its process group SIGTERM), or
in a phase of a checkpoint (``PHASES``). With the phase ``away-000002`` the store refuses the files of step 2 from it.
Several jobs run one after the other in the same processes; an error that is expected is written next to its job.
"""

import os
import signal
import sys
from pathlib import Path

from data_shards.errors import ShardError
from launcher.training import checkpoint, checkpoint_store, checkpoint_writer
from launcher.training.loop import train
from launcher.training.step_checks import TrainingError
from launcher.training.torchrun import STOPPED, read_job

# Where a kill comes: before the call of a function that has this in its arguments.
PHASES = {
    "copying": (checkpoint_writer.HostCopies, "_take", ""),
    "writing": (checkpoint_writer, "sha256_of_file", ""),
    "committing": (checkpoint, "commit_folder", "step-"),
    "moving": (checkpoint, "commit_bytes", "LATEST"),
    "uploading": (checkpoint_store, "put_file", "/state/"),
    "best": (checkpoint_store, "put_file", "/best-"),
    "manifest": (checkpoint_store, "put_file", "manifest.json"),
    "latest": (checkpoint_store, "put_bytes", "LATEST"),
}


def die_in(phase):
    place, name, part = PHASES[phase]
    called = getattr(place, name)

    def call(*arguments, **options):
        if any(part in str(argument) for argument in arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return called(*arguments, **options)

    setattr(place, name, call)


def refuse(step):
    put_file = checkpoint_store.put_file

    def put(path, url):
        if f"step-{step}" in url:
            raise ShardError(f"{url} could not be written in 5 tries")
        return put_file(path, url)

    checkpoint_store.put_file = put


def main():
    arguments = sys.argv[1:]
    die_rank = die_step = -1
    if arguments[0] == "--die":
        die_rank, when = int(arguments[1]), arguments[2]
        if when.startswith("away-"):
            refuse(when.removeprefix("away-") if die_rank == int(os.environ["RANK"]) else "no step")
        elif when not in PHASES:
            die_step = int(when)
        elif die_rank == int(os.environ["RANK"]):
            die_in(when)
        arguments = arguments[3:]
    rank = int(os.environ["RANK"])

    def report(metrics):
        if rank == die_rank and die_step != -1 and metrics["step"] >= abs(die_step):
            if die_step > 0:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                os.killpg(os.getpgrp(), signal.SIGTERM)  # as torchrun does

    for path in arguments:
        try:
            if not train(read_job(path), rank=rank, world_size=int(os.environ["WORLD_SIZE"]), report=report):
                sys.exit(STOPPED)
        except TrainingError as error:
            if len(arguments) == 1:
                raise
            Path(path).with_suffix(f".error{rank}").write_text(str(error))


if __name__ == "__main__":  # loader processes import this file
    main()
