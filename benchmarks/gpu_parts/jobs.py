"""Data and jobs of small trainings, as the command line makes them, without Ray."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_parts.machine import ON_GPU
from data_shards.atomic_files import commit_json
from data_shards.writer import write_feature_shards
from launcher.config.loading import load_settings
from launcher.config.settings import Settings
from launcher.data.build import prepare_data
from launcher.stages.jobs import TrainJob
from launcher.stages.token_lengths import LengthsOf, cached_lengths
from mmcot.texts.sample import Sample

STAGE = "rationale"


def small_settings(folder: Path, *overrides: str, num_train: int = 64) -> Settings:
    """The demo's settings at a size of seconds, with data in ``folder``."""
    return load_settings(
        preset="demo",
        overrides=[
            f"data.shards_dir={folder / 'data'}",
            f"data.mini_sqa.num_train={num_train}",
            "data.mini_sqa.num_val=16",
            "data.mini_sqa.num_test=16",
            "data.samples_per_shard=24",
            "training.log_every=1",
            "training.micro_batch_size=4",
            "training.global_batch_size=8",
            f"cluster.use_gpu={str(ON_GPU).lower()}",
            "rationale.max_target_tokens=48",
            *overrides,
        ],
    )


def prepare(settings: Settings, cache: Path) -> dict[str, str]:
    """Build the data; returns the files of token counts by split."""
    data = prepare_data(settings, lambda line: None)
    lengths = {}
    for split in ("train", "val"):
        key = LengthsOf(settings, STAGE, split, str(data.path), {})
        lengths[split] = str(cached_lengths(key, key.open(), cache, {"split": split}).absolute())
    return lengths


def write_random_features(shards_dir: Path, name: str, shape: tuple[int, int]) -> None:
    """Write random features of every question, float16 [P, D]."""
    random = np.random.default_rng(0)

    def features_of(problem: Sample, counts: Counter[str]) -> np.ndarray:
        counts["num_with_features"] += 1
        return random.standard_normal(shape).astype(np.float16)

    write_feature_shards(shards_dir, name=name, features_of=features_of, shape=shape)


def make_job(settings: Settings, lengths: dict[str, str], folder: Path, *, num_steps: int, **training: Any) -> TrainJob:
    """A job whose run folder is new; ``training`` has fields of ``Training``."""
    shutil.rmtree(folder, ignore_errors=True)
    commit_json(folder / "lock.json", {"attempt": 1})
    changed = settings.training.model_validate(settings.training.model_dump() | training)
    job = TrainJob(
        stage=STAGE,
        settings=settings.model_copy(update={"training": changed}),
        run_dir=str(folder.absolute()),
        shards_dir=str(settings.data.shards_dir),
        lengths=lengths,
        num_steps=num_steps,
        attempt=1,
    )
    return written(job)


def written(job: TrainJob, **changes: Any) -> TrainJob:
    """The same job with some fields changed, written to ``job.json`` in its run folder."""
    job = dataclasses.replace(job, **changes)
    commit_json(Path(job.run_dir) / "job.json", job.to_json())
    return job
