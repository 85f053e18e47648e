"""The share of a training's time in which it waits for data, with a thread and with processes that load."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.jobs import STAGE, make_job, prepare, small_settings, write_random_features
from benchmarks.gpu_parts.machine import DEVICE, ON_GPU, Proof
from benchmarks.gpu_parts.models import new_model, patches_of, shape_of
from benchmarks.gpu_parts.steps import PRECISION, one_rank
from launcher.config.settings import Settings
from mmcot.models.loss import OBJECTIVES, UNITS

LIMIT = 0.02  # share of time
PROCESSES = (0, 2, 4)
SECONDS, STEPS = 2.5, 200  # of each number of processes, whichever ends first
FEATURES = "random"


def loaders(proof: Proof) -> dict[str, Any]:
    """Steps of base over shards with features of ViT's shape, loaded by 0, 2 and 4 processes."""
    size, folder = "tiny" if proof.tiny else "base", proof.folder.absolute() / "loaders"
    settings, lengths = data_of(folder, size, num_train=96 if proof.tiny else 256)
    result: dict[str, Any] = {"loader_processes": {}, "checks": {}}
    with one_rank():
        engine = open_engine(settings, size)
        for processes in PROCESSES[:2] if proof.tiny else PROCESSES:
            job = make_job(settings, lengths, folder / f"run-{processes}", num_steps=STEPS, loader_processes=processes)
            found = shares_of(engine, job, seconds=1.0 if proof.tiny else SECONDS)
            result["loader_processes"][processes] = found
            if not proof.tiny:  # steps of milliseconds wait for any loader
                result["checks"][f"{processes} processes: waiting for data takes less than {LIMIT:.0%} of the time"] = (
                    found["share_waiting"] < LIMIT
                )
            result["checks"][f"{processes} processes: every loss is finite"] = math.isfinite(found["loss"])
            proof.keep(result)
    found = result["loader_processes"].items()
    shares = ", ".join(f"{number}: {shares['share_waiting']:.1%}" for number, shares in found)
    return {**result, "headline": f"waiting for data, by processes: {shares}"}


def data_of(folder: Path, size: str, *, num_train: int) -> tuple[Settings, dict[str, str]]:
    """MiniSQA's texts with random features of the size's shape."""
    shutil.rmtree(folder, ignore_errors=True)
    common = ["training.micro_batch_size=8", f"training.precision={PRECISION}", "training.zero_stage=1"]
    common += ["data.samples_per_shard=64"]
    texts = small_settings(folder, *common, num_train=num_train)
    lengths = prepare(texts, folder / "lengths")
    write_random_features(folder / "data", FEATURES, patches_of(size))
    return texts.model_copy(update={"data": texts.data.model_copy(update={"features": FEATURES})}), lengths


def open_engine(settings: Settings, size: str) -> Any:
    from launcher.training.deepspeed_engine import build_engine

    return build_engine(
        lambda: new_model(shape_of(size) | {"vocab_size": 32128}, patches=patches_of(size), device=DEVICE.type),
        settings.training,
        world_size=1,
        random_weights=True,
    )


def shares_of(engine: Any, job: Any, *, seconds: float) -> dict[str, Any]:
    """Steps of the product's loop without its checkpoints; the first two, in which loaders start, are not counted."""
    from launcher.training.engine_steps import optimizer_step
    from launcher.training.loader import load_steps
    from launcher.training.throughput import Meter, count_step

    meter, losses, num_steps, started = Meter(peak_flops=1.0), [], 0, 0.0
    steps = load_steps(job, rank=0, world_size=1, steps=range(job.num_steps), pin_memory=ON_GPU)
    for loaded in steps:
        meter.lap("data")
        counts = count_step(loaded, engine.module)
        parts = optimizer_step(
            engine,
            loaded,
            OBJECTIVES["text"],
            seed=0,
            counts=dict(zip(UNITS, counts, strict=False)),  # they come first
            world_size=1,
            meter=meter,
            observe=False,
        )
        losses.append(sum(parts.values()))
        meter.add(counts)
        num_steps += 1
        if num_steps == 2:
            meter.restart()
            started = time.perf_counter()
        elif num_steps > 2 and time.perf_counter() - started > seconds:
            break
        meter.lap("own")
    found = meter.collect()
    close = getattr(steps, "close", None)
    if close:
        close()
    del steps
    return {
        "stage": STAGE,
        "steps": num_steps - 2,
        "loss": losses[-1],
        "share_waiting": found.get("time_share_data", 0.0),
        "step_s": found["step_time_s"],
        "questions_per_s": found["questions_per_s"],
    }
