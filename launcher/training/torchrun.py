"""One rank of a training without Ray, as torchrun or srun start it.

    mmcot train rationale --preset single-gpu --write-job job.json
    torchrun --nproc-per-node 8 -m launcher.rank job.json
    MASTER_ADDR=... MASTER_PORT=... srun --ntasks-per-node 8 --gpus-per-task 1 python -m launcher.rank job.json

SIGTERM, or Ctrl-C in its terminal, makes all ranks write a checkpoint and end with status 143 (torchrun itself with
1); the same command resumes. torchrun waits 30 s for that; TORCH_ELASTIC_SHUTDOWN_TIMEOUT gives it more.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path

from data_shards.strict_json import read_json_file
from launcher.cluster.gpus import check_gpus_free, count_own_gpus, with_device
from launcher.cluster.ray_session import worker_variables
from launcher.config.loading import parse_settings
from launcher.config.settings import SettingsError
from launcher.runs.run_dir import RunDir
from launcher.runs.signals import STOPPED
from launcher.runs.system_metrics import sampling
from launcher.stages.jobs import TrainJob
from launcher.training.collectives import CollectiveError
from launcher.training.compile_locks import clear_compile_locks
from mmcot.errors import InputError
from mmcot.models.device import DeviceError


def read_job(path: str | Path) -> TrainJob:
    """Read a job that ``mmcot train ... --write-job`` wrote, of this or of an earlier version.

    Raises:
        SettingsError: there is no such file, or it is no such job.
    """
    again = "write it again with `mmcot train STAGE --write-job FILE`"
    try:
        values = read_json_file(path)
    except OSError as error:
        raise SettingsError(f"job file {path} cannot be read: {error.strerror}; {again}") from None
    except InputError as error:
        raise SettingsError(f"job file {error}; {again}") from None
    if not isinstance(values, dict) or not isinstance(values.get("settings"), dict):
        raise SettingsError(f"job file {path} is no object with the settings of a job; {again}")
    if "rationales_dir" in values:  # of an earlier version, whose stages read no other text
        folder = values.pop("rationales_dir")
        values["texts"] = {"rationales": folder} if folder else {}
    fields = {field.name: field for field in dataclasses.fields(TrainJob)}
    needed = {name for name, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING}
    if wrong := sorted({*(needed - values.keys()), *(values.keys() - fields.keys())}):
        what = "has no" if wrong[0] in needed else "has the unknown"
        raise SettingsError(f"job file {path} {what} {wrong[0]!r}; {again}")
    return TrainJob(**{**values, "settings": parse_settings(values["settings"], [(str(path), values["settings"])])})


def main(arguments: list[str]) -> int:
    """Run this process's rank; returns its exit status."""
    names = {"RANK": "PROCID", "WORLD_SIZE": "NTASKS", "LOCAL_RANK": "LOCALID", "LOCAL_WORLD_SIZE": "NTASKS_PER_NODE"}
    for name, slurm in names.items():
        if "MASTER_ADDR" in os.environ and f"SLURM_{slurm}" in os.environ:
            os.environ.setdefault(name, os.environ[f"SLURM_{slurm}"])
    if len(arguments) != 1 or "RANK" not in os.environ:
        print(
            "usage: torchrun --nproc-per-node N -m launcher.rank JOB.json, "
            "or srun with MASTER_ADDR and MASTER_PORT set",
            file=sys.stderr,
        )
        return 2
    rank = int(os.environ["RANK"])
    try:
        job = read_job(arguments[0])
    except InputError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return 2
    # DeepSpeed imports MLflow if it can; a rank does not need it.
    sys.modules.setdefault("mlflow", None)  # pyright: ignore[reportArgumentType], None blocks an import
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    clear_compile_locks()
    os.environ.update(worker_variables(job.settings.cluster))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    try:
        job = _on_this_machine(job, rank)
        use_gpu = bool(job.settings.cluster.use_gpu)
        index = gpu_index() if use_gpu else None
        check_gpus_free(job.settings.cluster, logging.getLogger("mmcot.rank").warning, index=index)
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_gpu else "cpu")
        from launcher.training.loop import train

        with sampling(RunDir(Path(job.run_dir)).logs, f"train-{job.stage}", gpus=use_gpu):
            finished = train(job, rank=rank, world_size=int(os.environ["WORLD_SIZE"]), gpu_index=index)
    except (CollectiveError, DeviceError, SettingsError) as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return 2
    return 0 if finished else STOPPED


def _on_this_machine(job: TrainJob, rank: int) -> TrainJob:
    """Decide the job's device by this machine's GPUs; rank 0 stores the decision for later starts of the run."""
    run_dir = RunDir(Path(job.run_dir))
    report = logging.getLogger("mmcot.rank").info
    settings = job.settings.model_copy(
        update={
            "cluster": job.settings.cluster.model_copy(
                update={"address": "local", "num_workers": 1, "min_workers": None}
            )
        }
    )
    settings = with_device(
        settings, run_dir, report, count=lambda cluster: (count_own_gpus(), "this machine"), keep=rank == 0
    )
    cluster = job.settings.cluster.model_copy(update={"use_gpu": settings.cluster.use_gpu})
    return dataclasses.replace(job, settings=job.settings.model_copy(update={"cluster": cluster}))


def gpu_index() -> int:
    """The index of this process's GPU among those it sees; under srun it may see only its own."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    only_its_own = "TORCHELASTIC_RUN_ID" not in os.environ and count_own_gpus() == 1
    return 0 if only_its_own else local_rank


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
