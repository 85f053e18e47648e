"""One rank of a training under torchrun, for tests: ``rank.py JOB.json [die_rank die_step]``.

Rank ``die_rank`` kills itself with -9 when step ``die_step`` is reported.
"""

import json
import os
import signal
import sys

from launcher.config import parse_settings
from launcher.jobs import TrainJob
from launcher.train import train



def main():
    with open(sys.argv[1]) as file:
        values = json.load(file)
    rank = int(os.environ["RANK"])
    die_rank, die_step = (int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 2 else (-1, -1)

    def report(metrics):
        if rank == die_rank and metrics["step"] >= die_step:
            os.kill(os.getpid(), signal.SIGKILL)

    job = TrainJob(**{**values, "settings": parse_settings(values["settings"])})
    train(job, rank=rank, world_size=int(os.environ["WORLD_SIZE"]), report=report)


if __name__ == "__main__":  # loader processes import this file
    main()
