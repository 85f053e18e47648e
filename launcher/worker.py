"""A Ray Train worker: assembles what the training loop needs and keeps its log.

    launch_training(job)     # in the driver: starts the workers, returns when they are done

The first rank that fails leaves its traceback in ``logs/<stage>-rank<r>.log``; the driver
prints it last.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from launcher.jobs import TrainJob
from launcher.preflight import fetch_pretrained
from launcher.run_dir import RunDir


class WorkersFailed(RuntimeError):
    """The training's workers failed; the message ends in the first rank's traceback."""


def run_worker(job: TrainJob) -> None:
    """One worker of a Ray Train group."""
    # DeepSpeed imports MLflow and the Inductor compiler if it can; a rank needs neither and starts seconds sooner.
    sys.modules.setdefault("mlflow", None)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import ray.train

    from launcher.train import train

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    with _log_to(RunDir(Path(job.run_dir)).logs / f"{job.stage}-rank{rank}.log"):
        if job.settings.model.pretrained:
            fetch_pretrained(job.settings.model.pretrained)  # the hub's own lock makes it once a node
        train(job, rank=rank, world_size=world_size, report=lambda metrics: ray.train.report(metrics))


def launch_training(job: TrainJob) -> None:
    """Run a training on Ray workers; lost workers are replaced and go on from LATEST.

    Raises:
        WorkersFailed: a worker raised, or more workers were lost than allowed.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster, training = job.settings.cluster, job.settings.training
    started = time.time()
    trainer = TorchTrainer(
        run_worker,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=f"{job.stage}-attempt{job.attempt}",  # a name used before would silently resume Ray's own state
            storage_path=str((Path(job.run_dir) / "logs" / "ray").absolute()),
            failure_config=FailureConfig(max_failures=training.max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        text = _first_traceback(RunDir(Path(job.run_dir)).logs, job.stage, since=started)
        raise WorkersFailed(f"training of stage {job.stage!r} failed.\n{text or error}") from None


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Send this process's output to a file; an exception leaves its traceback there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", buffering=1) as file:
        faulthandler.enable(file)
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logging.getLogger("mmcot").addHandler(handler)
        logging.getLogger("mmcot").setLevel(logging.INFO)
        logging.getLogger("mmcot").propagate = False
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                yield
            except BaseException:
                failure = path.with_suffix(".failure")
                failure.write_text(f"{path.stem} (process {os.getpid()}):\n{traceback.format_exc()}", encoding="utf-8")
                print(traceback.format_exc(), file=sys.stderr)
                raise
            finally:
                faulthandler.disable()


def _first_traceback(logs: Path, stage: str, *, since: float) -> str:
    failures = [path for path in logs.glob(f"{stage}-rank*.failure") if path.stat().st_mtime >= since]
    return min(failures, key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8") if failures else ""
