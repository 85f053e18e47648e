"""Joining or starting Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from launcher.config.settings import Cluster
from launcher.runs.signals import sparing_children


class ClusterError(RuntimeError):
    """Ray cannot give what the settings ask for."""


@contextlib.contextmanager
def ray_session(cluster: Cluster) -> Iterator[None]:
    """Be connected to Ray while the block lasts; a local Ray ends with it.

    Raises:
        ClusterError: the cluster has fewer processors or GPUs than the workers need.
    """
    # Ray hands these on to every worker it starts.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", str(cluster.cpus_per_worker))
    import ray

    if ray.is_initialized():  # within a tuning's trial
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    needed = cluster.num_workers * cluster.cpus_per_worker
    if cluster.address == "local":
        keep_token_private()
        with sparing_children():  # Ray itself spares them Ctrl-C
            ray.init(
                address="local",
                num_cpus=max(needed, os.cpu_count() or 1),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    else:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own in place, which exits with another status
    try:
        if cluster.address == "local" and cluster.use_gpu is True:
            found = int(ray.cluster_resources().get("GPU", 0))
            if found < cluster.num_workers:
                raise ClusterError(
                    f"cluster.num_workers ({cluster.num_workers}) needs a GPU each, this machine has {found}; "
                    "lower cluster.num_workers, or set cluster.use_gpu=false"
                )
        yield
    finally:
        ray.shutdown()


def keep_token_private() -> None:
    """Have the token of a local Ray in a file that its user alone can read, or in the environment where no file can be.

    A local Ray listens on every interface and runs what it is sent by whoever has the token. It makes the
    token itself, in a file that every user of the machine could read.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    try:
        path = Path.home() / ".ray" / "auth_token"
    except RuntimeError:  # a container's user may have no home
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        return
    temporary = path.with_name(f".tmp-{secrets.token_hex(6)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # whole, and never in place of one that others use
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError:
        if not path.exists():  # a home that cannot be written to
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
