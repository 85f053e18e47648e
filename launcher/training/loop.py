"""The training loop of a stage, as one rank runs it.

It does not use Ray: its arguments are a rank, a world size and a ``report`` callable, so that any
launcher that makes a process group can start it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from data_shards.stream import Step
from launcher.config.chains import MATCHING
from launcher.runs.checkpoint_names import CheckpointError
from launcher.runs.hang_guard import HangGuard, collective_timeout
from launcher.runs.run_dir import RunDir
from launcher.runs.sample_ledger import Ledger
from launcher.runs.signals import StopRequest
from launcher.stages.jobs import TrainJob, model_facts
from launcher.training.checkpoint import (
    full_disk_explained,
    reserve_memory,
)
from launcher.training.collectives import check_every_group, gather_json, host_sum
from launcher.training.deepspeed_engine import (
    init_distributed,
    set_learning_rate,
)
from launcher.training.engine_steps import named_losses, optimizer_step, validation_loss
from launcher.training.export import export_best, export_model
from launcher.training.flight_recorder import choose_place, write_collectives
from launcher.training.like_gpus import check_alike, describe_gpu
from launcher.training.loader import load_steps
from launcher.training.offload_needs import check_offload
from launcher.training.opening import open_training
from launcher.training.profiling import StepProfile
from launcher.training.retrieval import measure_retrieval
from launcher.training.schedule import learning_rate
from launcher.training.step_checks import (
    check_finite,
    full_memory_explained,
    gradient_norm,
    raise_not_applied,
    was_applied,
)
from launcher.training.throughput import count_step
from launcher.training.training_state import TrainingState, probe_loss
from launcher.training.work_guard import ended_without_work
from mmcot.models.loss import UNITS

_LOG = logging.getLogger("mmcot.train")
POLL_S = 0.1  # between two looks at a checkpoint in flight for which the training waits
STORE_WAIT_S = 300.0  # for the object store, before the next checkpoint or the end
STORE_NOTE_S = 30.0  # between two notes that it is waited for


def train(
    job: TrainJob,
    *,
    rank: int,
    world_size: int,
    gpu_index: int | None = None,
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> bool:
    """Train a stage from its latest checkpoint (or the start) to its end and export the model.

    Args:
        gpu_index: which of the GPUs that this process sees is its own; None where the launcher has chosen it.
        report: called on every rank alike with step and validation loss.

    Returns:
        False if a stop was requested before its end; the checkpoint holds all steps done.
    """
    settings, training = job.settings, job.settings.training
    torch.set_num_threads(settings.cluster.cpus_per_worker)
    logs = RunDir(Path(job.run_dir)).logs
    choose_place(logs, job.stage)
    hang_guard = HangGuard(
        training.hang_timeout_s, before_end=functools.partial(write_collectives, logs, job.stage, rank)
    )
    hang_guard.progress()  # also a rank that waits for others at the start ends
    use_gpu = bool(settings.cluster.use_gpu)
    check_offload(training, use_gpu=use_gpu)
    init_distributed(
        use_gpu=use_gpu,
        gpu_index=gpu_index,
        precision=training.precision,
        tf32=training.tf32,
        timeout_s=collective_timeout(training.hang_timeout_s),
    )
    check_every_group(RunDir(Path(job.run_dir)).rank_token())
    notes = check_alike(gather_json(describe_gpu())) if use_gpu else []
    hang_guard.close()  # reading a model or a checkpoint may take longer, and others wait for it
    guard = functools.partial(ended_without_work, logs, job.stage, rank, timeout_s=training.hang_timeout_s)
    with guard(phase="the start"):
        this = open_training(job, rank=rank, world_size=world_size, hang_guard=hang_guard)
    for note in notes:
        this.tell(this.last_checkpoint, note)
    engine, meter = this.engine, this.meter
    ledger = Ledger(this.run_dir.ledger(job.stage, rank), this.steps_per_epoch) if training.ledger else None
    trace = this.run_dir.logs / f"{job.stage}-rank{rank}-trace.json.gz"
    profile = StepProfile(trace, training.profile_steps)
    stop_request = StopRequest(this.run_dir, job.attempt)
    steps = range(this.last_checkpoint, this.last_checkpoint if this.best.has_ended else job.num_steps)
    with (
        stop_request.listening(),
        contextlib.closing(profile),
        contextlib.closing(this.hang_guard),
        full_disk_explained(this.checkpoints),
    ):
        for loaded in load_steps(job, rank=rank, world_size=world_size, steps=steps, pin_memory=use_gpu):
            meter.lap("data")
            this.hang_guard.progress()
            step, done = loaded.number, loaded.number + 1
            profile.before(step)
            *counts, num_stop_requests, num_ready = host_sum(
                [*count_step(loaded, engine.module), float(stop_request.seen()), float(this.is_ready)]
            )
            if num_ready == world_size:
                _advance(this)
            stopping = num_stop_requests > 0
            rate = learning_rate(step, training=training, total_steps=job.num_steps)
            set_learning_rate(engine, rate)
            logging_now = _due(done, training.log_every, job) or stopping
            with full_memory_explained(loaded := _with_longest(this, loaded) if step == steps.start else loaded):
                parts = optimizer_step(
                    engine,
                    loaded,
                    this.objective,
                    seed=settings.run.seed,
                    counts=dict(zip(UNITS, counts, strict=False)),  # they come first
                    world_size=world_size,
                    meter=meter,
                    observe=logging_now,
                    graphs=this.graphs,
                )
            _check_graphs(this, done)
            loss = sum(parts.values())
            if not was_applied(engine, loss):
                _commit(this)  # what was begun is whole
                raise_not_applied(engine, loaded, loss, this.last_checkpoint)
            if step == steps.start:
                reserve_memory(engine)  # the optimizer has its state now
            profile.after(done)
            meter.add(counts)
            if ledger:
                ledger.record(step, [(index, block.qids) for index, block in loaded.blocks if block.qids])
            if logging_now:
                point = {
                    **named_losses(parts, "loss"),
                    "learning_rate": rate,
                    "epoch": done / this.steps_per_epoch,
                    **gradient_norm(engine),
                }
                this.note(done, point | meter.collect() | engine.module.watch())
            if _due(done, training.validate_every, job):
                report({"step": done, "validation_loss": _validate(this, done)})
            if _due(done, training.checkpoint_every, job) or stopping or this.best.has_ended:
                _checkpoint(this, done)
                if stopping or this.best.has_ended or done == job.num_steps:
                    _commit(this)
            if this.best.has_ended:
                this.tell(done, f"ended after step {done:,}, {this.best.reason}")
                break
            if stopping and done < job.num_steps:
                this.tell(done, f"stopped after step {done:,}, as requested; its checkpoint is committed")
                return False
            meter.lap("own")  # else this time would count as waiting for data
        _commit(this)
    with guard(phase="the export"):
        _export(this)
    return True


def _export(this: TrainingState) -> None:
    """Export the last model, or the best one; every rank calls it."""
    job, settings = this.job, this.job.settings
    model = this.run_dir.model(job.stage)
    if settings.training.export == "best":
        export_best(this.run_dir.best_model(job.stage), model, may_commit=this.may_commit)
        this.tell(job.num_steps, f"the model is that of step {this.best.step:,}, validation loss {this.best.loss:.4f}")
    else:
        facts = model_facts(settings, job.stage)
        export_model(this.engine, this.tokenizer, model, facts=facts, may_commit=this.may_commit)


def _with_longest(this: TrainingState, loaded: Step) -> Step:
    """The first step, on a GPU with the epoch's longest block before its own, so that a lack of memory shows at once.

    It is a dummy block, whose gradient is zero.
    """
    if not this.job.settings.cluster.use_gpu:
        return loaded
    train = this.streams["train"]
    longest = train.samples.load_block(train.plan(0).longest_block(), is_dummy=True)
    return dataclasses.replace(loaded, blocks=[(len(loaded.blocks), longest), *loaded.blocks])


def _check_graphs(this: TrainingState, done: int) -> None:
    """Go on without graphs after one failed, and say so."""
    if this.graphs and this.graphs.failure:
        _LOG.warning("without CUDA graphs: %s", this.graphs.failure)
        this.tell(done, f"without CUDA graphs from here on: {this.graphs.failure}")
        this.graphs = None


def _validate(this: TrainingState, done: int) -> float:
    """Measure the validation loss, and keep the model if it is the lowest so far."""
    ranks = {"rank": this.rank, "world_size": this.world_size, "hang_guard": this.hang_guard}
    stream, num_steps = this.streams["val"], this.num_val_steps
    losses = named_losses(validation_loss(this.engine, stream, this.objective, num_steps, **ranks), "validation_loss")
    is_matching = this.job.settings.chain.stage(this.job.stage).objective == MATCHING
    this.note(done, losses | (measure_retrieval(this.engine, stream, num_steps, **ranks) if is_matching else {}))
    loss = losses["validation_loss"]
    if this.best.add(done, loss, patience=this.job.settings.training.early_stopping_patience):
        _keep_best(this, done, loss)
    this.meter.lap("validation")
    return loss


def _keep_best(this: TrainingState, done: int, loss: float) -> None:
    """Keep the present model as the best; where it cannot be written, only ``training.export=best`` needs it."""
    facts = model_facts(this.job.settings, this.job.stage) | {"step": done, "validation_loss": loss}
    folder = this.run_dir.best_model(this.job.stage)
    this.hang_guard.close()  # a slow disk is no hang
    try:
        export_model(this.engine, this.tokenizer, folder, facts=facts, may_commit=this.may_commit)
    except CheckpointError as error:
        if this.job.settings.training.export == "best":
            raise
        this.tell(done, f"the best model so far was not kept: {error}")
    this.hang_guard.progress()


def _checkpoint(this: TrainingState, done: int) -> None:
    """Begin a checkpoint after its loss on the probe batch is finite; the one before is committed first."""
    this.hang_guard.progress()
    _commit(this)
    this.facts |= {"probe_loss": probe_loss(this), "validation": this.best.as_fact()}
    check_finite({"loss of the probe batch after the update": this.facts["probe_loss"]}, done - 1, this.last_checkpoint)
    this.flight = this.new_flight(done)
    this.flight.begin(this.engine, facts=this.facts, best=this.best)
    this.meter.lap("checkpoint")


def _commit(this: TrainingState) -> None:
    """Wait until the checkpoint in flight, if there is one, is on disk and in the store; every rank calls it."""
    started = noted = time.monotonic()
    while this.flight is not None:
        # A slow disk or store is no hang: threads write and copy, and all ranks keep looking at them together.
        this.hang_guard.progress()
        waited = time.monotonic() - started
        is_late = this.flight.is_committed and waited > STORE_WAIT_S
        num_ready, num_late = host_sum([float(this.is_ready), float(is_late)])
        if num_ready == this.world_size:
            _advance(this)
        elif num_late:
            this.late_upload = this.flight.give_up_store(f"no answer in {STORE_WAIT_S:.0f} s")
            _end_flight(this)
        else:
            if time.monotonic() - noted > STORE_NOTE_S:
                noted, where = time.monotonic(), "object store" if this.flight.is_committed else "disk"
                this.tell(this.flight.step, f"waiting for the {where} to take this checkpoint, {waited:.0f} s")
            time.sleep(POLL_S)


def _advance(this: TrainingState) -> None:
    """Bring the checkpoint in flight to its next phase (``checkpoint_flight.py``); every rank calls it."""
    flight = this.flight
    assert flight is not None
    this.hang_guard.progress()
    flight.wait()
    was_committed = flight.is_committed
    flight.advance()
    this.hang_guard.progress()
    if not was_committed:
        this.last_checkpoint = flight.step
        _LOG.info("checkpoint after step %d", flight.step)
    if flight.is_done:
        _end_flight(this)
    this.meter.lap("checkpoint")


def _end_flight(this: TrainingState) -> None:
    """Say whether the store has not taken the checkpoint, or takes them again."""
    flight, this.flight = this.flight, None
    assert flight is not None
    if reason := flight.store_failure:
        this.tell(
            flight.step,
            f"the checkpoint of step {flight.step:,} is on disk and not in the object store ({reason}); the training "
            "continues, and the next checkpoint tries again",
        )
    elif this.store_is_away and flight.is_stored:
        this.tell(flight.step, f"the object store has the checkpoint of step {flight.step:,} again")
    if reason or flight.is_stored:
        this.store_is_away = bool(reason)


def _due(done: int, every: int, job: TrainJob) -> bool:
    return done % every == 0 or done == job.num_steps
