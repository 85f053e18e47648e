"""Ranks under torchrun, for tests: ``rank.py [--die RANK STEP] JOB.json [JOB.json ...]``.

Rank ``RANK`` kills itself with -9 when step ``STEP`` is reported (a negative one: sends its process group SIGTERM).
Several jobs run one after the other in the same processes; an error that is expected is written next to its job.
"""

import os
import signal
import sys
from pathlib import Path

from launcher.training.loop import train
from launcher.training.step_checks import TrainingError
from launcher.training.torchrun import STOPPED, read_job


def main():
    arguments = sys.argv[1:]
    die_rank = die_step = -1
    if arguments[0] == "--die":
        die_rank, die_step = map(int, arguments[1:3])
        arguments = arguments[3:]
    rank = int(os.environ["RANK"])

    def report(metrics):
        if rank == die_rank and metrics["step"] >= abs(die_step):
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
