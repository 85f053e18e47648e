"""One rank of a training without Ray, as torchrun or srun start it.

    mmcot train rationale --preset single-gpu --write-job job.json
    torchrun --nproc-per-node 8 -m launcher.rank job.json

SIGTERM, or Ctrl-C in its terminal, makes all ranks write a checkpoint and end with status 143 (torchrun itself with 1); the
same command goes on. torchrun waits 30 s for that; TORCH_ELASTIC_SHUTDOWN_TIMEOUT gives it more.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from launcher.config import parse_settings
from launcher.guards import STOPPED
from launcher.jobs import TrainJob
from launcher.preflight import clear_compile_locks


def read_job(path: str | Path) -> TrainJob:
    """Read a job that ``mmcot train ... --write-job`` wrote."""
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    return TrainJob(**{**values, "settings": parse_settings(values["settings"])})


def main(arguments: list[str]) -> int:
    """Run this process's rank; returns its exit status."""
    if len(arguments) != 1 or "RANK" not in os.environ:
        print("usage: torchrun --nproc-per-node N -m launcher.rank JOB.json", file=sys.stderr)
        return 2
    sys.modules.setdefault("mlflow", None)  # DeepSpeed imports it if it can; a rank needs it not
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    clear_compile_locks()
    job = read_job(arguments[0])
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if job.settings.cluster.use_gpu else "cpu")
    from launcher.train import train

    rank = int(os.environ["RANK"])
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    return 0 if train(job, rank=rank, world_size=int(os.environ["WORLD_SIZE"])) else STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
