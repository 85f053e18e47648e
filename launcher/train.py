"""The training loop of a stage, as one rank runs it.

It knows no Ray: it is handed a rank, a world size and a ``report`` callable, so that any
launcher that makes a process group can start it.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_shards.plan import Plan
from data_shards.storage import commit_folder
from launcher.checkpoint import check_probe, latest_checkpoint, load_checkpoint, save_checkpoint
from launcher.config import Settings
from launcher.engine import build_engine, full_state_dict, init_distributed, learning_rate, set_learning_rate
from launcher.jobs import TrainJob
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
) -> None:
    """Train a stage from its latest checkpoint (or the start) to its end and export the model.

    Args:
        report: called on every rank alike with step and validation loss.
    """
    settings, training, run_dir = job.settings, job.settings.training, RunDir(Path(job.run_dir))
    torch.set_num_threads(settings.cluster.cpus_per_worker)
    init_distributed(use_gpu=settings.cluster.use_gpu)
    _LOG.info("rank %d of %d joined its group, process %d", rank, world_size, os.getpid())
    tokenizer = load_tokenizer(settings, job.shards_dir)
    streams = {split: StageStream(job, split).open() for split in ("train", "val")}
    samples = streams["train"].samples
    engine = build_engine(lambda: build_model(settings, samples), training, world_size=world_size)
    first_plan, val_plan = streams["train"].plan(0), streams["val"].plan(0)
    facts = {
        "plan_fingerprint": first_plan.fingerprint,
        "world_size": world_size, "zero_stage": training.zero_stage, "precision": training.precision,
    }  # fmt: skip
    step = _resume(engine, run_dir.checkpoints(job.stage), facts, samples, first_plan)
    steps_per_epoch = first_plan.num_steps
    _LOG.info("ready to go on at step %d of %d", step, job.num_steps)
    journal = Journal(run_dir.journal(job.stage)) if rank == 0 else None
    ledger = Ledger(run_dir.ledger(job.stage, rank), steps_per_epoch) if training.ledger else None
    traffic = [0.0, 0.0]
    clock = time.perf_counter()

    for loaded in load_steps(
        job, rank=rank, world_size=world_size, steps=range(step, job.num_steps), pin_memory=settings.cluster.use_gpu
    ):
        step, blocks = loaded.number, loaded.blocks
        traffic = [traffic[0] + loaded.bytes_read, traffic[1] + loaded.bytes_needed]
        num_targets, num_sources, num_questions = _global_sum(engine, _count(blocks))
        set_learning_rate(engine, learning_rate(step, training=training, total_steps=job.num_steps))
        engine.train()
        loss_sum = 0.0
        for index, block in blocks:
            torch.manual_seed(_dropout_seed(settings.run.seed, step, index))
            loss = _block_loss(engine, block)
            loss_sum += loss.item()
            _check_finite(loss_sum, step, f"loss of questions {', '.join(block.qids)}")
            engine.backward(loss * world_size / num_targets, scale_wrt_gas=False)
        engine.step()
        _check_applied(engine, step)
        done = step + 1
        if ledger:
            ledger.record(step, [(index, block.qids) for index, block in blocks if block.qids])
        if _due(done, training.log_every, job):
            metrics = {
                "loss": _global_sum(engine, [loss_sum])[0] / num_targets,
                "learning_rate": learning_rate(step, training=training, total_steps=job.num_steps),
                "epoch": done / steps_per_epoch,
                **_rates(time.perf_counter() - clock, num_targets + num_sources, num_questions),
                **_gradient_norm(engine),
                **_traffic(*_global_sum(engine, traffic)),
            }
            if journal:
                journal.log(done, metrics)
        if _due(done, training.validate_every, job):
            validation = validation_loss(engine, streams["val"], val_plan.num_steps, rank=rank, world_size=world_size)
            if journal:
                journal.log(done, {"validation_loss": validation})
            report({"step": done, "validation_loss": validation})
        if _due(done, training.checkpoint_every, job):
            facts["probe_loss"] = _probe_loss(engine, samples, first_plan)
            _check_finite(facts["probe_loss"], step, "loss of the probe batch after the update")
            save_checkpoint(
                engine, run_dir.checkpoints(job.stage), step=done, facts=facts, keep=training.keep_checkpoints,
                may_commit=lambda: run_dir.check_attempt(job.attempt),
            )  # fmt: skip
            _LOG.info("checkpoint after step %d", done)
        clock = time.perf_counter()

    export_model(engine, tokenizer, run_dir.model(job.stage), may_commit=lambda: run_dir.check_attempt(job.attempt))


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


def validation_loss(engine: Any, stream: StageStream, num_steps: int, *, rank: int, world_size: int) -> float:
    """Teacher-forced loss a target token over a whole split."""
    engine.eval()
    total = [0.0, 0.0]
    for step in stream.steps(rank=rank, world_size=world_size, steps=range(num_steps)):
        for _, block in step.blocks:
            with torch.no_grad():
                total[0] += _block_loss(engine, block).item()
            total[1] += count_target_tokens(block.labels)
    loss_sum, num_tokens = _global_sum(engine, total)
    return loss_sum / num_tokens


def export_model(engine: Any, tokenizer: Any, folder: Path, *, may_commit: Callable[[], None]) -> None:
    """Commit the model and tokenizer as a folder that ``from_pretrained`` opens."""
    state = full_state_dict(engine)
    if dist.get_rank() == 0:
        staging = folder.with_name(".staging-model")
        shutil.rmtree(staging, ignore_errors=True)
        engine.module.save_pretrained(staging, state_dict=state)
        tokenizer.save_pretrained(staging)
        may_commit()
        commit_folder(staging, folder)
    dist.barrier()


def _due(done: int, every: int, job: TrainJob) -> bool:
    return done % every == 0 or done == job.num_steps


def _resume(engine: Any, folder: Path, facts: dict[str, Any], samples: StageSamples, plan: Plan) -> int:
    path = latest_checkpoint(folder)
    if path is None:
        return 0
    manifest = load_checkpoint(engine, path, facts=facts)
    found = _probe_loss(engine, samples, plan)
    check_probe(path, expected=manifest["probe_loss"], found=found, precision=facts["precision"])
    return manifest["step"]


def _probe_loss(engine: Any, samples: StageSamples, plan: Plan) -> float:
    """Loss a token on a fixed batch, the same on every rank: the plan's first block."""
    engine.eval()
    block = samples.load_block(plan.batch_blocks(0)[0])
    with torch.no_grad():
        return _block_loss(engine, block).item() / count_target_tokens(block.labels)


def _block_loss(engine: Any, block: Block) -> torch.Tensor:
    inputs = {name: tensor.to(engine.device, non_blocking=True) for name, tensor in block.tensors.items()}
    labels = inputs.pop("labels")
    decoder_inputs = engine.module._shift_right(labels)
    return token_loss_sum(engine(**inputs, decoder_input_ids=decoder_inputs, use_cache=False).logits, labels)


def _count(blocks: list[tuple[int, Block]]) -> list[float]:
    """Target tokens, source tokens and questions of this rank, dummies left out."""
    real = [block for _, block in blocks if block.qids]
    return [
        sum(count_target_tokens(block.labels) for block in real),
        sum(int(block.tensors["attention_mask"].sum()) for block in real),
        sum(len(block.qids) for block in real),
    ]


def _global_sum(engine: Any, values: list[float]) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=engine.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def _dropout_seed(seed: int, step: int, index: int) -> int:
    """Depends on neither rank nor world size nor restarts."""
    return (seed * 1_000_003 + step) * 4_099 + index


def _rates(seconds: float, num_tokens: float, num_questions: float) -> dict[str, float]:
    return {"tokens_per_s": num_tokens / seconds, "questions_per_s": num_questions / seconds, "step_time_s": seconds}


def _traffic(bytes_read: float, bytes_needed: float) -> dict[str, float]:
    """What reading took since the start, over all ranks; 1.0 is not a byte too many."""
    return {"gigabytes_read": bytes_read / 1e9, "bytes_read_per_needed": bytes_read / max(1.0, bytes_needed)}


def _gradient_norm(engine: Any) -> dict[str, float]:
    """The norm before clipping; DeepSpeed reports none under ZeRO-0."""
    norm = engine.get_global_grad_norm()
    return {} if norm is None else {"grad_norm": float(norm)}


def _check_finite(value: float, step: int, name: str) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"step {step}: the {name} is {value}; nothing of this step was kept, the last checkpoint stands. Lower "
            "training.learning_rate, or use training.precision=fp32"
        )


def _check_applied(engine: Any, step: int) -> None:
    """DeepSpeed may skip an update without a word; that would make the plan untrue."""
    for name, norm in _gradient_norm(engine).items():
        _check_finite(norm, step, name)
    if engine.skipped_steps:
        raise TrainingError(f"step {step}: DeepSpeed skipped the update; lower training.learning_rate")
