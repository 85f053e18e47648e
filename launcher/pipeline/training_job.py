"""The job of a training: token counts, number of steps, and the facts of its checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import ShardError
from data_shards.token_blocks import rounded_up
from launcher.config.chains import MATCHING, PRETRAINED
from launcher.config.loading import read_deepspeed
from launcher.config.settings import Settings, SettingsError, Training
from launcher.pipeline.attempt import Attempt, Report
from launcher.runs.checkpoint_names import checkpoints_by_step
from launcher.stages.data_folder import DataFolder
from launcher.stages.jobs import TrainJob
from launcher.stages.plan import make_plan
from launcher.stages.token_lengths import LengthsOf, cached_lengths, read_lengths
from launcher.training.identity import claim_store, run_facts, store_root


def plan_training(
    attempt: Attempt, folder: DataFolder, stage: str, inputs: dict[str, Any], *, texts: dict[str, str]
) -> TrainJob:
    """Count tokens, fix the number of steps and report what was cut off.

    Args:
        inputs: what the token counts depend on, in addition to the stage's own settings.
        texts: the folders of the texts that the stage reads, by their names.
    """
    settings, report = _of_stage(attempt, stage), attempt.report
    _check_start(settings, stage, folder, report)
    spec = settings.stage(stage)
    cache = attempt.run_dir.lengths if folder.is_remote else folder.path / "lengths"
    paths, lengths, shards = {}, {}, {}
    for split in ("train", "val"):
        key = LengthsOf(settings, stage, split, folder.location, texts)
        samples = key.open()
        depends = inputs | spec.model_dump() | {"split": split, "use_caption": settings.data.use_caption}
        if samples.pictures is not None:  # their places are tokens of the source
            depends |= {"pictures": [samples.pictures.per_picture, samples.pictures.max_pictures]}
        reads = settings.chain.stage(stage).reads
        depends |= {"gold_formats": [settings.gold_format(settings.chain.writer_of(text)) for text in reads]}
        paths[split] = str(cached_lengths(key, samples, cache, depends).absolute())
        lengths[split], shards[split] = read_lengths(paths[split]), samples.reader.shard_of_sample
        for side in ("source", "target"):
            if cut := int((lengths[split][f"{side}_cut"] > 0).sum()):
                limit = getattr(spec, f"max_{side}_tokens")
                report(f"{cut:,} of {len(samples):,} {side}s of {split} were cut at {limit} tokens ({stage})")
        if settings.chain.stage(stage).objective == MATCHING:
            _check_pairs(lengths[split]["target"], folder, split, f"stage {stage!r} (format {spec.format})", report)
    try:
        plan, _ = (make_plan(settings, lengths[split], shards[split], epoch=0) for split in ("train", "val"))
    except ValueError as error:
        raise SettingsError(f"stage {stage!r}: training.{error}") from None
    num_steps = spec.num_steps or math.ceil((spec.num_epochs or 0) * plan.num_steps)
    workers = settings.cluster.num_workers
    check_patience(settings.training, stage, num_steps)
    batch, num_questions = settings.training.global_batch_size, len(lengths["train"]["source"])
    report(f"{num_steps:,} steps of {batch} questions, {plan.num_steps:,} an epoch")
    if budget := settings.training.max_tokens_per_block:
        report(f"a step is {plan.blocks_per_batch} blocks of at most {budget:,} tokens, {batch} questions on average")
    report(f"padding factor {plan.padding_factor():.2f}, imbalance of {workers} workers {plan.imbalance(workers):.2f}")
    if num_questions < batch:
        report(
            f"note: training.global_batch_size {batch} is more than the {num_questions:,} training questions, so a "
            "step reads all of them"
        )
    return TrainJob(
        stage=stage,
        settings=_for_workers(settings),
        run_dir=str(attempt.run_dir.path.absolute()),
        shards_dir=folder.location,
        lengths=paths,
        num_steps=num_steps,
        attempt=attempt.number,
        texts=texts,
        run_facts=_run_facts(attempt, folder, texts),
    )


def check_patience(training: Training, stage: str, num_steps: int) -> None:
    """Check that a training with ``early_stopping_patience`` validates often enough to end early.

    Raises:
        SettingsError: it could never end early.
    """
    patience, every = training.early_stopping_patience, training.validate_every
    if patience is not None and (patience + 1) * every > num_steps:
        most = max(1, num_steps // (patience + 1))
        raise SettingsError(
            f"training.early_stopping_patience {patience} cannot end stage {stage!r} early: it takes {patience + 1} "
            f"validations, and {num_steps:,} steps with one in {every:,} have {num_steps // every}; lower "
            f"training.validate_every to at most {most:,}"
        )


def check_budget_of_stages(settings: Settings) -> None:
    """Check that a stage whose texts are not written yet fits into ``training.max_tokens_per_block`` in any case.

    Raises:
        SettingsError: its limits allow longer questions.
    """
    for stage in settings.chain.stages:
        spec, budget = settings.stage(stage.name), settings.training.max_tokens_per_block
        longest = sum(rounded_up(np.array([spec.max_source_tokens, spec.max_target_tokens])))
        if budget is not None and stage.reads and budget < longest:
            raise SettingsError(
                f"training.max_tokens_per_block ({budget:,}) is below the longest question that stage {stage.name!r} "
                f"may read with texts that are not written yet, {longest:,} tokens ({stage.name}.max_source_tokens "
                f"{spec.max_source_tokens:,}, max_target_tokens {spec.max_target_tokens:,}); give at least "
                f"{longest:,}, or lower these limits"
            )


def _check_pairs(text_lengths: np.ndarray, folder: DataFolder, split: str, place: str, report: Report) -> None:
    """Check that a split has pictures and texts to match, and say how many of its samples lack one.

    Raises:
        SettingsError: there is no text, or no picture.
    """
    from mmcot.models.loss import MIN_TEXT_TOKENS  # imports torch

    num = {"text": int((text_lengths >= MIN_TEXT_TOKENS).sum())}
    counts = (folder.features or {}).get("counts", {}).get(split, {})
    if "num_with_features" in counts:
        num["picture"] = int(counts["num_with_features"])
    for what, count in num.items():
        if count == 0:
            raise SettingsError(
                f"{place} matches pictures and texts, and no sample of {split} has a {what}; give the captions of the "
                "pictures (data.captions), or use image-text pairs with the format P-T"
            )
        if lacking := len(text_lengths) - count:
            report(
                f"{lacking:,} of {len(text_lengths):,} samples of {split} have no {what} and no part in the matching"
            )


def _check_start(settings: Settings, stage: str, folder: DataFolder, report: Report) -> None:
    """Check that the training can start from ``model.pretrained``, as every rank does; says which settings it replaces.

    Raises:
        ValueError: it is a model of another class, or of another fusion or width of features.
    """
    if not settings.model.pretrained:
        return
    from transformers import PreTrainedConfig

    from mmcot.models.opening import check_start, class_name

    name = class_name(settings.chain.stage(stage).objective)
    vision_dim = folder.features["dim"] if folder.features else None
    check_start(name, settings.model.pretrained, **settings.model.fixed_by_start(vision_dim))
    config, _ = PreTrainedConfig.get_config_dict(settings.model.pretrained, trust_remote_code=False)
    matching = class_name(MATCHING)
    if name != matching and matching in (config.get("architectures") or []):
        report(f"  the part of {settings.model.pretrained} that matches texts is left out")
    replaced = [
        f"{name} {config[name]}, not {value}"
        for name, value in settings.model.shape.for_config.items()
        if value is not None and config.get(name, value) != value
    ]
    if replaced:
        report(f"note: model.shape is not used, {settings.model.pretrained} has its own ({'; '.join(replaced)})")


def _run_facts(attempt: Attempt, folder: DataFolder, texts: dict[str, str]) -> dict[str, Any]:
    """The facts of a training's checkpoints; claims the run's folder in the object store."""
    facts = run_facts(attempt.settings, folder, attempt.run_dir.identity(), texts=texts)
    root = store_root(attempt.settings, facts)
    if root:
        _claim_store(attempt, root, facts["run_id"])
    return facts


def _claim_store(attempt: Attempt, root: str, run_id: str) -> None:
    """Claim the store's folder; a run that has checkpoints on disk continues without a store that is away."""
    try:
        note = claim_store(root, attempt.run_dir, run_id)
    except ShardError as error:
        stages = attempt.settings.chain.stage_names
        if not any(checkpoints_by_step(attempt.run_dir.checkpoints(stage)) for stage in stages):
            raise
        note = f"{error}; the training continues from the checkpoints on disk"
    if note:
        attempt.report(f"note: {note}")


def _of_stage(attempt: Attempt, stage: str) -> Settings:
    """The settings of a stage's training, and the model that it starts from."""
    start = attempt.settings.chain.stage(stage).starts_from
    folder = None if start == PRETRAINED else str(attempt.run_dir.model(start).absolute())
    return attempt.settings.of_stage(stage, start=folder)


def _for_workers(settings: Settings) -> Settings:
    """Settings with absolute paths and contents: workers run in other folders."""
    model, training = settings.model, settings.training
    if model.pretrained is not None and Path(model.pretrained).is_dir():
        model = model.model_copy(update={"pretrained": str(Path(model.pretrained).absolute())})
    if training.deepspeed is not None:
        training = training.model_copy(update={"deepspeed": read_deepspeed(training.deepspeed)})
    return settings.model_copy(update={"model": model, "training": training})
