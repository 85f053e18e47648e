"""Opening a training: data, engine, the latest checkpoint, and the best model so far."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

from data_shards.errors import ShardError
from launcher.config.settings import Training
from launcher.runs.checkpoint_names import CheckpointError, latest_checkpoint
from launcher.runs.hang_guard import HangGuard
from launcher.runs.journal import Journal
from launcher.runs.run_dir import RunDir
from launcher.stages.build_model import build_model, parameter_counts
from launcher.stages.jobs import TrainJob
from launcher.stages.samples import load_tokenizer
from launcher.training.best_model import BestLoss, kept_facts
from launcher.training.block_graphs import BlockGraphs, reason_without_graphs
from launcher.training.checkpoint_resume import VerifiedCheckpoint, check_probe, find_checkpoint, load_state
from launcher.training.checkpoint_store import checkpoint_store, fetch_best, fetch_latest, is_behind, why_silent
from launcher.training.collectives import agreed, host_sum
from launcher.training.deepspeed_engine import (
    build_engine,
)
from launcher.training.identity import facts_of_job
from launcher.training.loader import STEPS_AHEAD, StageStream
from launcher.training.shared_memory import bytes_of, check_shared_memory
from launcher.training.throughput import Meter
from launcher.training.training_state import TrainingState, probe_loss
from launcher.training.whole_gradients import no_whole_gradients
from launcher.training.zero_stage import with_zero_stage
from mmcot.models.device import DTYPES
from mmcot.models.flops import measure_peak_flops
from mmcot.models.loss import objective_named
from mmcot.models.opening import reads_text_alone
from mmcot.models.trained_parts import count_parameters

_LOG = logging.getLogger("mmcot.train")


def open_training(job: TrainJob, *, rank: int, world_size: int, hang_guard: HangGuard) -> TrainingState:
    """Open the data, build the engine and load the latest checkpoint."""
    settings, training, run_dir = job.settings, job.settings.training, RunDir(Path(job.run_dir))
    _LOG.info(
        "rank %d of %d joined its group with the code of %s, process %d",
        rank,
        world_size,
        Path(__file__).parents[1],
        os.getpid(),
    )
    streams = {split: StageStream(job, split).open() for split in ("train", "val")}
    objective = settings.chain.stage(job.stage).objective
    plan, checkpoints = streams["train"].plan(0), run_dir.checkpoints(job.stage)
    if training.loader_processes:
        longest = bytes_of(streams["train"].samples.load_block(plan.longest_block(), is_dummy=True).tensors)
        blocks = -(-plan.blocks_per_batch // world_size)
        check_shared_memory(longest, blocks_ahead=training.loader_processes * STEPS_AHEAD * blocks)
    identity = job.run_facts or agreed(lambda: facts_of_job(job))

    def may_commit() -> None:
        run_dir.check_attempt(job.attempt)

    store = checkpoint_store(settings, job.stage, identity)
    notes, silence = [], agreed(lambda: why_silent(store)) if store else None
    if silence is not None:
        notes.append(_without_store(checkpoints, silence))
    elif store:
        notes += fetch_latest(settings, job.stage, checkpoints, facts=identity, may_commit=may_commit)
    samples = streams["train"].samples
    training, note = with_zero_stage(
        training,
        run_dir,
        job.stage,
        world_size=world_size,
        count_parameters=lambda: parameter_counts(settings, samples, objective=objective),
    )
    notes += [note] if note else []
    facts = {
        "plan_fingerprint": plan.fingerprint,
        "world_size": world_size,
        "zero_stage": training.zero_stage,
        "precision": training.precision,
        "nvme": training.offload == "nvme",
        **identity,
    }
    found = find_checkpoint(checkpoints, facts=facts, may_commit=may_commit)
    engine = build_engine(
        lambda: build_model(settings, samples, objective=objective, gate_start=settings.stage(job.stage).gate_start),
        training,
        world_size=world_size,
        # What takes the place of a text-only model's fusion cannot be drawn in parts.
        random_weights=not settings.model.pretrained or reads_text_alone(settings.model.pretrained),
        load_universal=bool(found and found.is_universal),
    )
    this = TrainingState(
        job=job,
        rank=rank,
        world_size=world_size,
        engine=engine,
        tokenizer=load_tokenizer(settings, job.shards_dir),
        streams=streams,
        num_val_steps=streams["val"].plan(0).num_steps,
        steps_per_epoch=plan.num_steps,
        facts=facts,
        probe=plan.batch_blocks(0)[0].copy(),  # a view would keep the whole epoch's order in memory
        store=store,
        journal=Journal(run_dir.journal(job.stage)) if rank == 0 else None,
        last_checkpoint=0,
        meter=_meter(engine, training),
        hang_guard=hang_guard,
        objective=objective_named(objective),
        best=BestLoss.of_manifest(found.manifest) if found else BestLoss(),
        graphs=None,
        store_is_away=silence is not None,
    )
    if training.cuda_graphs and settings.cluster.use_gpu:
        if reason := reason_without_graphs(training) or no_whole_gradients(engine):
            notes.append(f"without CUDA graphs: {reason}")
        else:
            this.graphs = BlockGraphs(engine, this.objective)
    if (best := this.best).step and (lost := agreed(lambda: _restore_best(this, found))) is not None:
        this.best = BestLoss()
        notes.append(
            f"{run_dir.best_model(job.stage)} does not hold the model of step {best.step:,}, whose validation loss "
            f"{best.loss:.4f} was the lowest{lost}; the lowest from here on counts"
        )
    this.last_checkpoint = _resume(this, found)
    is_ours = found is not None and found.manifest.get("run_id") == identity["run_id"]
    if store and silence is None and found and is_ours and agreed(lambda: is_behind(store, found.step)):
        this.flight = this.new_flight(found.step)
        this.flight.upload(this.best)
    for note in [*notes, *(found.notes if found else ())]:
        _LOG.warning(note)
        this.tell(this.last_checkpoint, note)
    _LOG.info("ready to continue at step %d of %d", this.last_checkpoint, job.num_steps)
    if this.journal:
        this.journal.begin(this.last_checkpoint, job.num_steps)
    this.tell(this.last_checkpoint, _describe_parameters(this.engine.module))
    this.meter.restart()
    return this


def _without_store(checkpoints: Path, reason: str) -> str:
    """A note that the training starts without its store, from what is on disk.

    Raises:
        CheckpointError: nothing is on disk: a start from the beginning could repeat what the store has.
    """
    latest = latest_checkpoint(checkpoints)
    if latest is None or not latest.exists():
        raise CheckpointError(
            f"{reason}, and {checkpoints} holds no checkpoint; wait until the store answers, or start another "
            "run.dir without training.checkpoint_url"
        )
    return f"{reason}; the training continues from {latest} on disk, and the next checkpoint tries the store again"


def _describe_parameters(module: Any) -> str:
    """The number of parameters, and where some are frozen how many are trained, as a sentence."""
    counts = count_parameters(module)
    if not counts.frozen:
        return f"{counts.total:,} parameters"
    adapters = f" ({counts.adapters:,} in LoRA adapters)" if counts.adapters else ""
    return f"{counts.total:,} parameters, {counts.trained:,} of them trained{adapters}, {counts.frozen:,} frozen"


def _meter(engine: Any, training: Training) -> Meter:
    return Meter(peak_flops=_peak_flops(engine, training), device=engine.device)


def _peak_flops(engine: Any, training: Training) -> float:
    """Operations a second that all ranks together can do, from the setting or measured on each."""
    if training.trained != "all":
        return math.inf  # most of the backward pass is skipped: counting three forward passes would be too many
    dtype = DTYPES[training.precision]
    own = training.peak_tflops * 1e12 if training.peak_tflops else measure_peak_flops(engine.device, dtype)
    (total,) = host_sum([own])
    return total


def _restore_best(this: TrainingState, found: VerifiedCheckpoint | None) -> str | None:
    """Fetch the best model from the store if it is not kept here; returns None, or why it is lost for a sentence.

    A kept model of a later step is as good: that step comes again after this checkpoint.
    """
    folder, described = this.run_dir.best_model(this.job.stage), (found.manifest if found else {}).get("best")
    facts = kept_facts(folder)
    if facts.get("validation_loss") == this.best.loss or facts.get("step", 0) > (found.step if found else 0):
        return None
    if this.store is None or this.store_is_away or described is None:
        return ""
    try:
        fetch_best(this.store, described, folder, may_commit=this.may_commit)
    except (CheckpointError, FileNotFoundError, ShardError) as error:
        return f", and it could not be fetched ({error})"
    return None


def _resume(this: TrainingState, found: VerifiedCheckpoint | None) -> int:
    """Load a checkpoint and check its probe loss; returns the number of steps done."""
    if found is None:
        return 0
    load_state(this.engine, found)
    loss = probe_loss(this)
    check_probe(
        found.path, expected=found.manifest["probe_loss"], found=loss, precision=this.job.settings.training.precision
    )
    return found.step
