"""The training loop of a stage, as one rank runs it.

It knows no Ray: it is handed a rank, a world size and a ``report`` callable, so that any
launcher that makes a process group can start it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_shards.storage import commit_folder, commit_json
from data_shards.stream import Step
from launcher.checkpoint import Found, check_probe, find_checkpoint, load_state, save_checkpoint
from launcher.checkpoint_store import checkpoint_store, fetch_checkpoint, upload_checkpoint
from launcher.config import Settings
from launcher.engine import build_engine, full_state_dict, init_distributed, learning_rate, set_learning_rate
from launcher.guards import HangGuard, Meter, StopRequest
from launcher.jobs import MODEL_FACTS_FILE, TrainJob, model_facts
from launcher.journal import Journal
from launcher.ledger import Ledger
from launcher.loader import StageStream, load_steps
from launcher.run_dir import RunDir
from launcher.samples import Block, StageSamples, load_tokenizer
from mmcot.loss import count_target_tokens, token_loss_sum
from mmcot.model import MultimodalT5Config, T5ForMultimodalGeneration

_LOG = logging.getLogger("mmcot.train")


class TrainingError(RuntimeError):
    """The training stopped itself; the message says at which step and why."""


def train(
    job: TrainJob, *, rank: int, world_size: int, report: Callable[[dict[str, float]], None] = lambda metrics: None
) -> bool:
    """Train a stage from its latest checkpoint (or the start) to its end and export the model.

    Args:
        report: called on every rank alike with step and validation loss.

    Returns:
        False if it was asked to stop before its end; a checkpoint holds all that was done.
    """
    settings, training, run_dir = job.settings, job.settings.training, RunDir(Path(job.run_dir))
    torch.set_num_threads(settings.cluster.cpus_per_worker)
    init_distributed(use_gpu=settings.cluster.use_gpu)
    _LOG.info("rank %d of %d joined its group, process %d", rank, world_size, os.getpid())
    tokenizer = load_tokenizer(settings, job.shards_dir)
    streams = {split: StageStream(job, split).open() for split in ("train", "val")}
    samples = streams["train"].samples
    first_plan, num_val_steps = streams["train"].plan(0), streams["val"].plan(0).num_steps
    facts = {
        "plan_fingerprint": first_plan.fingerprint,
        "world_size": world_size, "zero_stage": training.zero_stage, "precision": training.precision,
        "nvme": training.offload == "nvme",
    }  # fmt: skip
    checkpoints, probe = run_dir.checkpoints(job.stage), first_plan.batch_blocks(0)[0]

    def may_commit() -> None:
        run_dir.check_attempt(job.attempt)

    store = checkpoint_store(settings, job.stage)
    if store:
        fetch_checkpoint(store, checkpoints, may_commit=may_commit)
    found = find_checkpoint(checkpoints, facts=facts, may_commit=may_commit)
    engine = build_engine(
        lambda: build_model(settings, samples), training, world_size=world_size, load_universal=bool(found and found.is_universal)
    )
    journal = Journal(run_dir.journal(job.stage)) if rank == 0 else None
    ledger = Ledger(run_dir.ledger(job.stage, rank), first_plan.num_steps) if training.ledger else None
    first_step = last_checkpoint = _resume(engine, found, samples, probe, precision=training.precision, journal=journal)
    _LOG.info("ready to go on at step %d of %d", first_step, job.num_steps)
    meter, hang_guard, stop_request = Meter(), HangGuard(training.hang_timeout_s), StopRequest(run_dir, job.attempt)

    with stop_request.listening(), contextlib.closing(hang_guard):
        for loaded in load_steps(
            job, rank=rank, world_size=world_size, steps=range(first_step, job.num_steps), pin_memory=settings.cluster.use_gpu
        ):
            meter.lap("data")
            hang_guard.progress()
            step, done = loaded.number, loaded.number + 1
            sums = _global_sum(engine, [*_count(loaded), float(stop_request.seen())])
            stopping = sums.pop() > 0
            rate = learning_rate(step, training=training, total_steps=job.num_steps)
            set_learning_rate(engine, rate)
            loss = _step(engine, loaded, seed=settings.run.seed, scale=world_size / sums[0], meter=meter) / sums[0]
            _check_applied(engine, loaded, loss, last_checkpoint)
            meter.add(*sums)
            if ledger:
                ledger.record(step, [(index, block.qids) for index, block in loaded.blocks if block.qids])
            if journal and (_due(done, training.log_every, job) or stopping):
                point = {"loss": loss, "learning_rate": rate, "epoch": done / first_plan.num_steps, **_gradient_norm(engine)}
                journal.log(done, point | meter.take())
            if _due(done, training.validate_every, job):
                validation = validation_loss(
                    engine, streams["val"], num_val_steps, rank=rank, world_size=world_size, hang_guard=hang_guard
                )
                if journal:
                    journal.log(done, {"validation_loss": validation})
                report({"step": done, "validation_loss": validation})
                meter.lap("validation")
            if _due(done, training.checkpoint_every, job) or stopping:
                hang_guard.progress()
                facts["probe_loss"] = _probe_loss(engine, samples, probe)
                _check_finite({"loss of the probe batch after the update": facts["probe_loss"]}, step, last_checkpoint)
                save_checkpoint(engine, checkpoints, step=done, facts=facts, keep=training.keep_checkpoints, may_commit=may_commit)
                hang_guard.close()  # copying to a store has retries of its own and may take its time
                if store:
                    upload_checkpoint(checkpoints, store, step=done, keep=training.keep_checkpoints)
                last_checkpoint = done
                _LOG.info("checkpoint after step %d", done)
                meter.lap("checkpoint")
            if stopping and done < job.num_steps:
                if journal:
                    journal.note(done, f"stopped after step {done:,}, as asked; its checkpoint stands")
                return False
            meter.lap("own")  # else the next wait for data would be charged for it

    export_model(engine, tokenizer, run_dir.model(job.stage), facts=model_facts(settings, job.stage), may_commit=may_commit)
    return True


def _step(engine: Any, loaded: Step, *, seed: int, scale: float, meter: Meter) -> float:
    """One optimizer step over this rank's blocks; returns the loss summed over the global batch.

    Args:
        scale: world size over the target tokens of the global batch; DeepSpeed averages over ranks.
    """
    engine.train()
    loss_sum = 0.0
    for index, block in loaded.blocks:
        torch.manual_seed(_dropout_seed(seed, loaded.number, index))
        meter.lap("own")
        loss = _block_loss(engine, block)
        loss_sum += loss.item()
        meter.lap("forward")
        engine.backward(loss * scale, scale_wrt_gas=False)
        meter.lap("backward")
    engine.step()
    meter.lap("update")
    (global_sum,) = _global_sum(engine, [loss_sum])
    meter.lap("wait")
    return global_sum


def build_model(settings: Settings, samples: StageSamples) -> T5ForMultimodalGeneration:
    """A pretrained T5 with new fusion layers, or one of random weights; seeded."""
    torch.manual_seed(settings.run.seed)
    num_patches, dim = samples.reader.feature_shape if settings.data.features else (1, 1)
    vision = {
        "vision_num_patches": num_patches, "vision_dim": dim,
        "fusion": settings.model.fusion, "mask_absent_patches": settings.model.mask_absent_patches,
    }  # fmt: skip
    if settings.model.pretrained:
        _check_vision_dim(settings.model.pretrained, dim)
        return T5ForMultimodalGeneration.from_pretrained(settings.model.pretrained, dtype=torch.float32, **vision)
    tokenizer = samples.tokenizer
    shape = settings.model.shape.model_dump() | {"vocab_size": settings.model.shape.vocab_size or len(tokenizer)}
    config = MultimodalT5Config(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id, **shape, **vision,
    )  # fmt: skip
    return T5ForMultimodalGeneration._from_config(config)


def _check_vision_dim(pretrained: str, dim: int) -> None:
    trained = MultimodalT5Config.get_config_dict(pretrained)[0].get("vision_dim", dim)
    if trained != dim:
        raise TrainingError(
            f"{pretrained} was trained on features of width {trained}, data.features has width {dim}; "
            "use the features it was trained on, or a text-only backbone"
        )


def validation_loss(
    engine: Any, stream: StageStream, num_steps: int, *, rank: int, world_size: int, hang_guard: HangGuard
) -> float:
    """Teacher-forced loss a target token over a whole split."""
    engine.eval()
    total = [0.0, 0.0]
    for step in stream.steps(rank=rank, world_size=world_size, steps=range(num_steps)):
        hang_guard.progress()
        for _, block in step.blocks:
            with torch.no_grad():
                total[0] += _block_loss(engine, block).item()
            total[1] += count_target_tokens(block.labels)
    loss_sum, num_tokens = _global_sum(engine, total)
    return loss_sum / num_tokens


def export_model(
    engine: Any, tokenizer: Any, folder: Path, *, facts: dict[str, Any], may_commit: Callable[[], None]
) -> None:
    """Commit the model and tokenizer as a folder that ``from_pretrained`` opens; ``facts`` say how it is prompted."""
    state = full_state_dict(engine)
    if dist.get_rank() == 0:
        staging = folder.with_name(".staging-model")
        shutil.rmtree(staging, ignore_errors=True)
        engine.module.save_pretrained(staging, state_dict=state)
        tokenizer.save_pretrained(staging)
        commit_json(staging / MODEL_FACTS_FILE, facts)
        may_commit()
        commit_folder(staging, folder)
    dist.barrier()


def _due(done: int, every: int, job: TrainJob) -> bool:
    return done % every == 0 or done == job.num_steps


def _resume(
    engine: Any, found: Found | None, samples: StageSamples, probe: np.ndarray, *, precision: str, journal: Journal | None
) -> int:
    """Load what was found and prove it; returns the steps that are done."""
    if found is None:
        return 0
    load_state(engine, found)
    loss = _probe_loss(engine, samples, probe)
    check_probe(found.path, expected=found.manifest["probe_loss"], found=loss, precision=precision)
    for note in found.notes:
        _LOG.warning(note)
        if journal:
            journal.note(found.step, note)
    return found.step


def _probe_loss(engine: Any, samples: StageSamples, probe: np.ndarray) -> float:
    """Loss a token on a fixed batch, the same on every rank: the plan's first block."""
    engine.eval()
    block = samples.load_block(probe)
    with torch.no_grad():
        return _block_loss(engine, block).item() / count_target_tokens(block.labels)


def _block_loss(engine: Any, block: Block) -> torch.Tensor:
    inputs = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in block.tensors.items()}
    labels = inputs.pop("labels")
    decoder_inputs = engine.module._shift_right(labels)
    return token_loss_sum(engine(**inputs, decoder_input_ids=decoder_inputs, use_cache=False).logits, labels)


def _count(loaded: Step) -> list[float]:
    """Target tokens, source tokens and questions of this rank, dummies left out; bytes read and needed for them."""
    real = [block for _, block in loaded.blocks if block.qids]
    return [
        sum(count_target_tokens(block.labels) for block in real),
        sum(int(block.tensors["attention_mask"].sum()) for block in real),
        sum(len(block.qids) for block in real),
        loaded.bytes_read,
        loaded.bytes_needed,
    ]


def _global_sum(engine: Any, values: list[float]) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=engine.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def _dropout_seed(seed: int, step: int, index: int) -> int:
    """Depends on neither rank nor world size nor restarts."""
    return (seed * 1_000_003 + step) * 4_099 + index


def _gradient_norm(engine: Any) -> dict[str, float]:
    """The norm before clipping; DeepSpeed reports none under ZeRO-0."""
    norm = engine.get_global_grad_norm()
    return {} if norm is None else {"grad_norm": float(norm)}


def _check_finite(values: dict[str, float], step: int, last_checkpoint: int, culprits: str = "") -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"step {step}: the {name} is {value}; nothing of this step was kept, the checkpoint of step {last_checkpoint} "
                f"stands. Lower training.learning_rate, or use training.precision=fp32.{culprits}"
            )


def _check_applied(engine: Any, loaded: Step, loss: float, last_checkpoint: int) -> None:
    """Stop on every rank alike where a step was not finite, or skipped without a word: the plan would be untrue.

    Raises:
        TrainingError: with the questions of the global batch.
    """
    values = {"loss": loss, **{"gradient norm": norm for norm in _gradient_norm(engine).values()}}
    if all(map(math.isfinite, values.values())) and not engine.skipped_steps:
        return
    qids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(qids, [qid for _, block in loaded.blocks for qid in block.qids])
    culprits = f" The questions of its batch: {', '.join(qid for share in qids for qid in share)}"
    _check_finite(values, loaded.number, last_checkpoint, culprits)
    raise TrainingError(
        f"step {loaded.number}: DeepSpeed skipped the update; the checkpoint of step {last_checkpoint} stands. Lower "
        f"training.learning_rate.{culprits}"
    )
