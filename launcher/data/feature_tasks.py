"""Building vision features: the patches of a picture, or an encoder's features by Ray workers.

    features/vit/train-000000.tar          {qid}.npy, float16 [p, D]
    features/vit/train-000000.done.json    marks a complete shard, with its counts; until the manifest exists

A task is a text shard. Finished tasks are kept: after a kill the same command writes only the missing ones.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.indexed_tars import pictures_in_tars
from data_shards.manifest import Shard, manifest_shards, read_manifest
from data_shards.picture_features import features_of_pictures, open_pictures_of
from data_shards.writer import (
    close_feature,
    missing_feature_shards,
    write_feature_shard,
)
from launcher.cluster.gpus import with_device
from launcher.cluster.ray_session import ray_session
from launcher.cluster.worker_pool import Worker, run_on_workers
from launcher.config.settings import Data, Settings, SettingsError
from launcher.data.dataset import read_source
from mmcot.errors import Faults, OperationError
from mmcot.texts.sample import Sample
from mmcot.vision import encoder_kinds
from mmcot.vision.encoder_kinds import ENCODERS, HalfEncoder

BATCH_SIZE = {"cuda": 64, "cpu": 8}  # pictures; 32 do not fit a CPU's cache


class FeaturesError(OperationError):
    """Features could not be built; the message names the shard and the reason."""


@dataclasses.dataclass(frozen=True)
class FeaturesJob:
    """The job of a worker: plain values that can be sent to its process.

    ``source`` is the data set with the pictures; None: the tars that the data folder indexes.
    """

    settings: Settings
    source: str | None
    shards_dir: str


class FeaturesWorker(Worker):
    """Runs tasks with one encoder in a Ray actor."""

    def __init__(self, job: FeaturesJob) -> None:
        import torch

        from mmcot.models.device import open_device

        torch.set_num_threads(job.settings.cluster.cpus_per_worker)
        self.job = job
        on_gpu = job.settings.cluster.use_gpu and not ENCODERS[job.settings.data.require_features()].in_driver
        self.device = open_device(use_gpu=bool(on_gpu)).type
        self.encode, self.shape = open_encoder(job.settings.data, device=self.device)
        self.pictures = (
            read_source(job.settings.data, Path(job.source)).pictures
            if job.source
            else pictures_in_tars(job.shards_dir)
        )

    def run(self, shard: Shard) -> tuple[int, tuple[int, int]]:
        """Write the features of a shard; returns the number of questions with features, and [P, D] of a picture."""
        data, faults = self.job.settings.data, Faults()
        open_pictures = open_pictures_of(
            self.pictures, max_pictures=data.max_pictures, count_unreadable=data.unreadable_pictures == "count"
        )

        def arrays_of(problems: Iterable[Sample], counts: Counter[str]) -> Iterator[np.ndarray]:
            yield from features_of_pictures(
                problems,
                counts,
                open_pictures=open_pictures,
                encode=self.encode,
                shape=self.shape,
                batch_size=BATCH_SIZE[self.device],
                prepare=self.encode.prepare,
                num_threads=self.job.settings.cluster.cpus_per_worker,
                on_problem=self.progress,
                faults=faults,
            )
            faults.raise_any()  # before the shard is committed

        name = data.require_features()
        counts = write_feature_shard(self.job.shards_dir, name=name, shard=shard, arrays_of=arrays_of)
        return counts["num_with_features"], self.shape


def open_encoder(data: Data, *, device: str = "cpu") -> tuple[HalfEncoder, tuple[int, int]]:
    """Return the function that makes ``data.features`` of pictures, and the shape [P, D] of one picture.

    Raises:
        SettingsError: features of that name cannot be made from pictures.
    """
    name = data.require_features()
    if name not in ENCODERS:
        raise SettingsError(f"features {name!r} cannot be made from pictures; expected one of {', '.join(ENCODERS)}")
    return encoder_kinds.open_encoder(name, data.patch_sizes or data.vision_model, device=device)


def make_features(
    settings: Settings, source: Path | None, shards_dir: Path, report: Callable[[str], None]
) -> dict[str, Any]:
    """Write the missing feature shards and return the manifest.

    Raises:
        FeaturesError: shards failed ``generation.max_attempts`` times; the others are committed.
    """
    data, name = settings.data, settings.data.require_features()
    job = FeaturesJob(
        _with_absolute_paths(settings), str(source.absolute()) if source else None, str(shards_dir.absolute())
    )
    missing = missing_feature_shards(shards_dir, name=name)
    shape: tuple[int, int] | None = None
    if ENCODERS[name].in_driver:
        worker = FeaturesWorker(job)
        for shard in missing:
            worker.run(shard)
        shape = worker.shape
    elif missing:
        shape = _by_workers(job, missing, report)
    shape = shape or open_encoder(data)[1]
    return close_feature(shards_dir, name=name, shape=(shape[0] * data.max_pictures, shape[1]))


def _with_absolute_paths(settings: Settings) -> Settings:
    """Make paths absolute, because workers run in other folders."""
    data = settings.data
    files = {
        name: str(Path(path).absolute())
        for name in ("captions", "vision_model")
        if (path := getattr(data, name)) and Path(path).exists()
    }
    return settings.model_copy(update={"data": data.model_copy(update=files)})


def _by_workers(job: FeaturesJob, missing: list[Shard], report: Callable[[str], None]) -> tuple[int, int] | None:
    """Build the missing shards by Ray workers; returns the shape that a worker reported, if any."""
    name = job.settings.data.require_features()
    folder = Path(job.shards_dir) / "features" / name
    total = len(manifest_shards(read_manifest(Path(job.shards_dir) / "text")))
    state: dict[str, Any] = {"done": total - len(missing), "pictures": 0, "shape": None, "started": time.perf_counter()}

    def done(shard: Shard, result: tuple[int, tuple[int, int]] | None) -> None:
        state["done"] += 1
        if result is not None:
            state["pictures"] += result[0]
            state["shape"] = result[1]
        rate = state["pictures"] / (time.perf_counter() - state["started"])
        report(f"  features {name}: {state['done']}/{total} shards, {rate:,.1f} pictures/s")

    settings = with_device(job.settings, None, report)
    job, cluster = dataclasses.replace(job, settings=settings), settings.cluster
    with ray_session(cluster):
        set_aside = run_on_workers(
            FeaturesWorker,
            job,
            {shard: shard.num_samples for shard in missing},
            cluster=cluster,
            gpus_per_worker=1,
            max_attempts=job.settings.generation.max_attempts,
            hang_timeout_s=job.settings.generation.hang_timeout_s,
            is_committed=lambda shard: (folder / f"{shard.name}.done.json").exists(),
            done=done,
            report=report,
        )
    if set_aside:
        shard, error = next(iter(set_aside.items()))
        raise FeaturesError(
            f"features {name} of {len(set_aside)} of {total} shards failed {job.settings.generation.max_attempts} "
            f"times; the others are committed, run again to retry. The first, {shard.name}:\n{error}"
        )
    return state["shape"]
