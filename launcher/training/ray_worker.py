"""A Ray Train worker: prepares the process, writes its log and runs the training loop."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from data_shards.atomic_files import commit_bytes
from launcher.cluster.gpu_faults import is_gpu_fault, note_fault
from launcher.config.settings import SettingsError
from launcher.runs.run_dir import RunDir
from launcher.runs.system_metrics import sampling
from launcher.stages.hub import fetch_pretrained
from launcher.stages.jobs import TrainJob
from launcher.training.compile_locks import clear_compile_locks

PLACEMENT_GROUP_FILE = "placement_group"  # in the run's logs: the resources that Ray reserved for the running training


def run_worker(job: TrainJob) -> None:
    """Run one worker of a Ray Train group."""
    # DeepSpeed imports MLflow and the Inductor compiler if it can; without them a rank starts seconds sooner.
    sys.modules.setdefault("mlflow", None)  # pyright: ignore[reportArgumentType], None blocks an import
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if job.settings.cluster.use_gpu else "cpu")
    clear_compile_locks()
    import ray.train

    from launcher.training.loop import train

    context = ray.train.get_context()
    if context.get_world_rank() == 0 and (group := ray.util.get_current_placement_group()):
        commit_bytes(RunDir(Path(job.run_dir)).logs / PLACEMENT_GROUP_FILE, group.id.hex().encode())
    rank, world_size = context.get_world_rank(), context.get_world_size()
    with _log_to(RunDir(Path(job.run_dir)).logs / f"{job.stage}-rank{rank}.log", job.attempt):
        if job.settings.model.pretrained:
            fetch_pretrained(job.settings.model.pretrained)  # the hub's own lock lets it happen once per node
        # Progress goes through the journal: ray.train.report would block every rank until the controller polls.
        with sampling(RunDir(Path(job.run_dir)).logs, f"train-{job.stage}", gpus=bool(job.settings.cluster.use_gpu)):
            train(job, rank=rank, world_size=world_size)


@contextlib.contextmanager
def _log_to(path: Path, attempt: int) -> Iterator[None]:
    """Send this process's output, and the traceback of an exception, to a file."""
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
            except Exception as error:
                with contextlib.suppress(OSError):  # on a full disk; Ray passes the error on as well
                    _write_failure(path, attempt, error)
                raise
            finally:
                faulthandler.disable()


def _write_failure(path: Path, attempt: int, error: Exception) -> None:
    """Write an exception next to the log at ``path``, for the driver to read."""
    print(traceback.format_exc(), file=sys.stderr)
    if is_gpu_fault(error):
        note_fault(path.with_suffix(f".{attempt}.gpu-fault"), error)
    elif not _is_lost_peer(error):
        text = str(error) if _is_refusal(error) else traceback.format_exc()
        failure = path.with_suffix(f".{attempt}.failure")
        failure.write_text(f"{path.stem} (process {os.getpid()}):\n{text}", encoding="utf-8")


def _is_refusal(error: Exception) -> bool:
    """Whether an error says that this machine, the settings or a rank cannot do it; its sentence is enough."""
    from launcher.training.collectives import CollectiveError
    from mmcot.models.device import DeviceError

    return isinstance(error, CollectiveError | DeviceError | SettingsError)


def _is_lost_peer(error: Exception) -> bool:
    """Whether an error only means that another process has ended."""
    from torch.distributed import DistError

    # "DataLoader worker (pid" means killed; an exception reads "Caught ... in DataLoader worker".
    parts = ("gloo", "NCCL", "Connection closed by peer", "DataLoader worker (pid")
    return isinstance(error, DistError) or any(part in str(error) for part in parts)
