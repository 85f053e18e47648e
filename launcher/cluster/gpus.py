"""The device of a run: whether it uses GPUs.

    settings = with_device(settings, run_dir, report)     # cluster.use_gpu is then True or False

``cluster.use_gpu: auto`` uses GPUs if the Ray cluster has them (for torchrun: the machine). The decision of
the first start is stored in the run's folder, so that a run never changes its device silently:

    runs/demo/device.json    {"use_gpu": true, "found": 4, "where": "this machine"}
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from data_shards.atomic_files import commit_json
from launcher.cluster.gpu_checks import check_free, num_installed, why_fewer
from launcher.cluster.ray_session import ray_session
from launcher.config.settings import Cluster, Settings, SettingsError
from launcher.runs.nvml import NvmlError, visible_gpus
from launcher.runs.records import read_device
from launcher.runs.run_dir import RunDir
from launcher.runs.run_settings import RUN_SETTINGS, read_run_settings

THIS_MACHINE = "this machine"


def with_device(
    settings: Settings,
    run_dir: RunDir | None,
    report: Callable[[str], None],
    *,
    count: Callable[[Cluster], tuple[int, str]] | None = None,
    keep: bool = True,
) -> Settings:
    """Return the same settings with ``cluster.use_gpu`` decided.

    Args:
        run_dir: the run, whose folder stores the decision; None for a command without a run.
        count: returns the number of GPUs and their place; None: ``count_gpus``.
        keep: whether to store the decision for the run's later starts.

    Raises:
        SettingsError: the run was started on another device, or there are not enough GPUs.
    """
    cluster = settings.cluster
    kept = _kept(run_dir) if run_dir else None
    wanted = cluster.use_gpu
    if run_dir is not None and kept is not None and wanted not in ("auto", kept):
        raise SettingsError(
            f"{run_dir.path} was started with cluster.use_gpu {_shown(kept)}, now it is {_shown(wanted)}; leave the "
            "setting out, or give this run a folder of its own with --set run.dir=runs/ANOTHER-NAME"
        )
    decided = kept if kept is not None else wanted
    # The nodes of an autoscaler start when they are requested, so they cannot be counted before.
    if decided is False or (wanted is True and cluster.address != "local"):
        return _decided(settings, bool(decided))
    found, where = (count or count_gpus)(cluster)
    is_new, decided = decided == "auto", found > 0 if decided == "auto" else decided
    if run_dir is not None and not found and wanted == "auto" and not is_new:
        raise SettingsError(
            f"{run_dir.path} was started on GPUs, and {where} has none; start it where GPUs are, bring the cluster's "
            "GPU nodes up (cluster.use_gpu=true waits for those of an autoscaler), or train again on CPUs in another "
            "folder: --set cluster.use_gpu=false --set run.dir=runs/ANOTHER-NAME"
        )
    if run_dir is None and wanted == "auto" and 0 < found < cluster.num_workers:
        settings = settings.model_copy(
            update={"cluster": (cluster := cluster.model_copy(update={"num_workers": found, "min_workers": None}))}
        )
    if decided and cluster.address == "local":
        require_gpus(cluster, found, where)
    if is_new:
        none = f"CPU ({where} has no GPU{_unusable(where)})"
        report(f"device: {f'{found} GPUs of {where}' if decided else none}; cluster.use_gpu chooses another")
        if run_dir and keep:
            commit_json(run_dir.device, {"use_gpu": decided, "found": found, "where": where})
    return _decided(settings, decided)


def require_gpus(cluster: Cluster, found: int, where: str) -> None:
    """Raise SettingsError where there are fewer GPUs than workers."""
    if found < cluster.num_workers:
        why = _why_fewer(found) if where == THIS_MACHINE else ""
        raise SettingsError(
            f"cluster.num_workers ({cluster.num_workers}) needs a GPU each, {where} has {found}"
            f"{f' ({why})' if why else ''}; lower "
            "cluster.num_workers, join a cluster with cluster.address, or set cluster.use_gpu=false (and "
            "training.precision=fp32)"
        )


def count_gpus(cluster: Cluster) -> tuple[int, str]:
    """Return the number of usable GPUs and their place: this machine, or the Ray cluster that is joined."""
    import ray

    if not ray.is_initialized() and cluster.address == "local":
        return count_own_gpus(), THIS_MACHINE
    with ray_session(cluster):
        return int(ray.cluster_resources().get("GPU", 0)), f"the Ray cluster {cluster.address}"


def count_own_gpus() -> int:
    """Return the number of GPUs that torch can use in this process."""
    import torch

    return torch.cuda.device_count()


def check_gpus_free(cluster: Cluster, report: Callable[[str], None], *, index: int | None = None) -> None:
    """Check that other processes have left this machine's GPUs to the run, where it starts its own workers.

    A trial of a tuning is not checked: the other trials may use the machine's other GPUs.

    Args:
        cluster: its device is decided.
        report: gets a sentence for a GPU that is partly in use.
        index: the one GPU that this process will use, among those that it sees; None: one for each worker.

    Raises:
        SettingsError: a GPU is full.
    """
    ray = sys.modules.get("ray")
    if not cluster.use_gpu or (index is None and (cluster.address != "local" or (ray and ray.is_initialized()))):
        return
    try:
        gpus = visible_gpus(os.environ)
    except NvmlError:
        return  # said where the GPUs are sampled
    used = slice(0, cluster.num_workers) if index is None else slice(index, index + 1)
    check_free(gpus[used], others=[gpu for gpu in gpus if gpu not in gpus[used]], report=report)


def _why_fewer(found: int) -> str:
    import torch

    return why_fewer(found, torch_version=torch.__version__, torch_cuda=torch.version.cuda)


def _unusable(where: str) -> str:
    """Why the GPUs that this machine has are not used."""
    return f" that torch can use: {_why_fewer(0)}" if where == THIS_MACHINE and num_installed() else ""


def computes_on_gpu(run_dir: RunDir) -> bool:
    """Whether a run was started on GPUs and this process sees one, so that its models are used there."""
    return bool(_kept(run_dir)) and count_own_gpus() > 0


def _kept(run_dir: RunDir) -> bool | None:
    if run_dir.device.exists():
        return read_device(run_dir.device)
    if not (run_dir.path / RUN_SETTINGS).exists():
        return None
    use_gpu = read_run_settings(run_dir.path).cluster.use_gpu
    return use_gpu if isinstance(use_gpu, bool) else None


def _decided(settings: Settings, use_gpu: bool) -> Settings:
    return settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"use_gpu": use_gpu})})


def _shown(use_gpu: bool | str) -> str:
    return str(use_gpu).lower()
