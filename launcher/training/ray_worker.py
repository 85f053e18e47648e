"""The process of a rank under Ray: it is prepared, then writes its log and runs the training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import faulthandler
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import psutil

from launcher.cluster.gpu_faults import is_gpu_fault, note_fault
from launcher.config.settings import SettingsError
from launcher.runs.run_dir import RunDir
from launcher.runs.system_metrics import sampling
from launcher.stages.hub import fetch_pretrained
from launcher.stages.jobs import TrainJob
from launcher.training.compile_locks import clear_compile_locks

_LEAVE_S = 30.0


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A process that can run a rank: where it is, and what Ray has assigned to it."""

    name: str
    node: str
    pid: int
    created: float  # when it started, which tells it from a later process of the same number
    address: str
    gpus: list[str]


@dataclasses.dataclass(frozen=True)
class RankPlace:
    """A rank's place in its group."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    address: str  # of rank 0
    port: int
    gpus: list[str]  # of all ranks of this node, in their order


class RayTrainWorker:
    """The actor of a rank. It loads its modules before it is needed, so it can take the place of a lost one."""

    def __init__(self) -> None:
        self._num_answers = 0
        self._name = f"process {os.getpid()} on {socket.gethostname()}"

    def prepare(self, *, use_gpu: bool, num_threads: int) -> Prepared:
        """Load everything that a training imports; uses no GPU."""
        os.environ["OMP_NUM_THREADS"] = str(num_threads)  # Ray sets it by the processors of an actor, which has none
        # DeepSpeed imports MLflow and the Inductor compiler if it can; without them a rank starts seconds sooner.
        sys.modules.setdefault("mlflow", None)  # pyright: ignore[reportArgumentType], None blocks an import
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_gpu else "cpu")
        clear_compile_locks()
        import_module("launcher.training.loop")
        import ray

        process = psutil.Process()
        return Prepared(
            name=self._name,
            node=ray.get_runtime_context().get_node_id(),
            pid=process.pid,
            created=process.create_time(),
            address=ray.util.get_node_ip_address(),
            gpus=ray.get_runtime_context().get_accelerator_ids().get("GPU", []),
        )

    def free_port(self, address: str) -> int:
        """Return a port of this node on which nothing listens."""
        with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
            return server.getsockname()[1]

    def run(self, work: Callable[..., None], job: TrainJob, place: RankPlace, replaces: Prepared | None) -> None:
        """Run a rank to its end, once the process that it replaces is gone."""
        if replaces is not None:
            _end_process(replaces)
        variables = {
            "RANK": place.rank,
            "WORLD_SIZE": place.world_size,
            "LOCAL_RANK": place.local_rank,
            "LOCAL_WORLD_SIZE": place.local_world_size,
            "NODE_RANK": place.node_rank,
            "MASTER_ADDR": place.address,
            "MASTER_PORT": place.port,
        }
        os.environ.update({name: str(value) for name, value in variables.items()})
        # Ray names the process after the class at every call; one that stood by is called a worker from now on.
        type(self).__name__ = f"RayTrainWorker {job.stage} rank {place.rank}"
        with contextlib.suppress(ImportError):
            from ray._raylet import setproctitle  # pyright: ignore[reportAttributeAccessIssue]

            setproctitle(f"ray::{type(self).__name__}")
        if place.gpus:  # those of the whole node: NCCL copies between GPUs that each process can see
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus)
        work(job, rank=place.rank, world_size=place.world_size, gpu_index=place.local_rank if place.gpus else None)
        _leave_group()

    def progress_of(self) -> tuple[int, str]:
        """Return a number that grows with each answer, and the name of this process: a stopped process gives none."""
        self._num_answers += 1
        return self._num_answers, self._name


def _leave_group() -> None:
    """Leave the process group, if that succeeds soon: the work is done, and the process ends anyway."""
    from torch import distributed

    def leave() -> None:
        with contextlib.suppress(Exception):
            distributed.destroy_process_group()

    if distributed.is_initialized():
        (thread := threading.Thread(target=leave, daemon=True)).start()
        thread.join(_LEAVE_S)


def _end_process(process: Prepared) -> None:
    """End a process of this node that Ray was asked to end: a stopped one does not, and would keep its memory."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        former = psutil.Process(process.pid)
        if abs(former.create_time() - process.created) < 2.0:  # it moves a little where the clock is set
            former.kill()
            former.wait(10.0)


def run_worker(job: TrainJob, *, rank: int, world_size: int, gpu_index: int | None) -> None:
    """Run one rank, with its log."""
    from launcher.training.loop import train

    with _log_to(RunDir(Path(job.run_dir)).logs / f"{job.stage}-rank{rank}.log", job.attempt):
        if job.settings.model.pretrained:
            fetch_pretrained(job.settings.model.pretrained)  # the hub's own lock lets it happen once per node
        # Progress goes through the journal, which the driver follows.
        with sampling(RunDir(Path(job.run_dir)).logs, f"train-{job.stage}", gpus=bool(job.settings.cluster.use_gpu)):
            train(job, rank=rank, world_size=world_size, gpu_index=gpu_index)


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
    """Whether an error only means that another process has ended, or came first."""
    from torch.distributed import DistError

    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:  # another process took rank 0's port
        return True
    # "DataLoader worker (pid" means killed; an exception reads "Caught ... in DataLoader worker".
    parts = ("gloo", "NCCL", "Connection closed by peer", "DataLoader worker (pid")
    return isinstance(error, DistError) or any(part in str(error) for part in parts)
