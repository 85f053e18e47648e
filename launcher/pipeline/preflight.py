"""What can be known to go wrong before any work is done, said in one sentence each."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from data_shards.remote_files import is_remote
from launcher.data.build import ready_made_file
from launcher.cluster.gpus import count_own_gpus, require_gpus
from launcher.config.settings import Cluster, Settings, SettingsError
from mmcot.texts.prompts import split_format

MIN_FREE_BYTES = 1_000_000_000
COMPILE_LOCK_STALE_S = 600.0  # the longest of DeepSpeed's extensions takes some three minutes


def check_settings(settings: Settings) -> None:
    """Check what needs no reading of the data.

    Raises:
        SettingsError: a prompt format is unknown, data.path is not there, or features can be
            neither found nor made.
    """
    if settings.training.checkpoint_url and not is_remote(settings.training.checkpoint_url):
        raise SettingsError(f"training.checkpoint_url {settings.training.checkpoint_url!r} is no URL such as s3://bucket/folder; a folder is run.dir")
    for stage in ("rationale", "answer"):
        try:
            split_format(getattr(settings, stage).format)
        except ValueError as error:
            raise SettingsError(f"setting {stage}.format: {error}") from None
    if settings.data.path is not None and not Path(settings.data.path).exists():
        raise SettingsError(
            f"data.path {settings.data.path} does not exist; put the data there, or set data.path "
            "(known forms: ScienceQA's folder, .jsonl, .csv, a saved Hugging Face data set)"
        )
    _check_features(settings)


def check_machine(settings: Settings) -> None:
    """Check that this machine can run the settings.

    Raises:
        SettingsError: GPUs are asked for where there are none, or the disk is full.
    """
    _check_deepspeed(settings)
    _check_gpus(settings.cluster)
    _check_disk(settings.run_dir)


def fetch_pretrained(name: str) -> None:
    """Bring a Hugging Face model and its tokenizer to this machine, once; local folders are left alone.

    Raises:
        SettingsError: it is neither here nor to be had; the message says where to put it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise SettingsError(f"model.pretrained {name} has no config.json; give the folder of a saved transformers model")
        return
    try:
        snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"])
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else ""
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"model.pretrained {name!r} is no folder here and could not be fetched{offline}: {reason}. "
            f"Put its files into a folder and set model.pretrained to it, or into the cache at {HF_HUB_CACHE}"
        ) from None


def clear_compile_locks(cache: Path | None = None) -> list[Path]:
    """Remove what a killed compilation left, on which every later one would wait for ever, in silence.

    Args:
        cache: torch's folder of compiled extensions; default TORCH_EXTENSIONS_DIR or torch's own.
    """
    cache = cache or Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    stale = []
    for path in cache.glob("**/lock"):
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            if path.stat().st_mtime < time.time() - COMPILE_LOCK_STALE_S:
                path.unlink()
                stale.append(path)
    return stale


def _check_features(settings: Settings) -> None:
    from launcher.data.feature_tasks import MADE_HERE

    name = settings.data.features
    if name is None or name in MADE_HERE:
        return
    if ready_made_file(settings.data):
        return
    if settings.data.shards_dir is None:
        where = f"data.shards_dir is not set, so the shards would be built without features/{name}"
    elif is_remote(settings.data.shards_dir):
        return  # opening it will tell
    else:
        folder = Path(settings.data.shards_dir) / "features" / name
        if (folder / "manifest.json").exists():
            return
        where = f"{folder} is missing"
    raise SettingsError(
        f"features {name!r} cannot be made here (known: {', '.join(MADE_HERE)}) and {where}; set data.shards_dir to a "
        f"folder that holds features/{name} (tars of {{qid}}.npy in the order of the text shards, with manifest.json), "
        f"put the published {name}.npy (or .pth) into data.path/vision_features beside name_map.json, or set data.features=patch"
    )


def _check_deepspeed(settings: Settings) -> None:
    training = settings.training
    if training.deepspeed:
        from launcher.training.deepspeed_engine import deepspeed_config

        deepspeed_config(training, world_size=settings.cluster.num_workers)
    if training.offload == "nvme" and not Path(training.nvme_dir or "").is_dir():
        raise SettingsError(f"training.nvme_dir {training.nvme_dir} is no folder here; make one on a local NVMe disk")


def _check_gpus(cluster: Cluster) -> None:
    if cluster.use_gpu is True and cluster.address == "local":
        require_gpus(cluster, count_own_gpus(), "this machine")


def _check_disk(run_dir: Path) -> None:
    folder = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise SettingsError(
            f"{folder} has {free / 1e9:.2f} GB left, at least {MIN_FREE_BYTES / 1e9:.0f} GB are needed; free some, or set run.dir"
        )
