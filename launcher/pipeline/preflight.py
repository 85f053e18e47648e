"""Checks before any work; each error is one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_shards.remote_files import is_remote
from data_shards.sources.forms import form_labels
from launcher.cluster.gpus import count_own_gpus, require_gpus
from launcher.config.chains import MATCHING, PRETRAINED, TEXT
from launcher.config.setting_names import nearest_file
from launcher.config.settings import Cluster, Settings, SettingsError
from launcher.data.hub_source import hub_place, is_on_hub
from launcher.data.published_features import ready_made_file
from launcher.pipeline.training_job import check_budget_of_stages, check_patience
from launcher.training.offload_needs import check_offload
from mmcot.errors import InputError
from mmcot.texts.prompts import split_format
from mmcot.vision.encoder_kinds import ENCODERS

MIN_FREE_BYTES = 1_000_000_000


def check_settings(settings: Settings) -> None:
    """Check what can be checked without reading the data.

    Raises:
        SettingsError: a prompt format or an objective is unknown, data.path does not exist, or features are
            neither stored nor can be made.
    """
    if settings.training.checkpoint_url and not is_remote(settings.training.checkpoint_url):
        raise SettingsError(
            f"training.checkpoint_url {settings.training.checkpoint_url!r} is no URL such as s3://bucket/folder; "
            "a folder is run.dir"
        )
    for stage, section in settings.stage_sections.items():
        if not section.format:  # of a stage that the chain does not have
            continue
        try:
            split_format(section.format)
        except ValueError as error:
            raise SettingsError(f"setting {stage}.format: {error}") from None
    _check_objectives(settings)
    _check_matching(settings)
    _check_frozen_start(settings)
    for stage in settings.chain.stage_names:
        if (num_steps := settings.stage(stage).num_steps) is not None:
            check_patience(settings.training, stage, num_steps)
    check_budget_of_stages(settings)
    if is_on_hub(settings.data.path):
        hub_place(str(settings.data.path))
    elif settings.data.path is not None and not Path(settings.data.path).exists():
        raise SettingsError(
            f"data.path {settings.data.path} does not exist;{nearest_file(Path(settings.data.path))} put the data "
            f"there, or set data.path (known forms: {form_labels()}); webdataset tars are first indexed by "
            "`mmcot data index`"
        )
    _check_features(settings)


def _check_objectives(settings: Settings) -> None:
    for stage in settings.chain.stages:
        if stage.objective != TEXT:
            from mmcot.models.loss import objective_named  # imports torch

            try:
                objective_named(stage.objective)
            except ValueError as error:
                raise SettingsError(f"run.chain {settings.run.chain!r}, stage {stage.name!r}: {error}") from None


def _check_frozen_start(settings: Settings) -> None:
    """Check that no language model of random weights is frozen, unless the parts that are trained were named."""
    if settings.model.pretrained:
        return
    has_learned: dict[str, bool] = {PRETRAINED: False}
    for stage in settings.chain.stages:
        trains = settings.training_of(stage.name).trains
        has_learned[stage.name] = has_learned[stage.starts_from] or trains not in ("bridge", "lora")
        if stage.objective != MATCHING and not has_learned[stage.name]:  # matching does not use the language model
            raise SettingsError(
                f"stage {stage.name!r} trains {trains} and freezes a language model of random weights, which knows "
                "nothing; set model.pretrained (a Hugging Face id, or a folder such as runs/NAME/answer/model), train "
                "all, or name the parts to train over random weights, such as training.trains='[encoder.bridge]'"
            )


def _check_matching(settings: Settings) -> None:
    """Check what a stage needs that matches pictures and texts."""
    model, data = settings.model, settings.data
    for stage in settings.chain.stages:
        if stage.objective != MATCHING:
            continue
        place, training = f"run.chain {settings.run.chain}, stage {stage.name!r}", settings.training_of(stage.name)
        if (model.inject, model.resample) != ("embed", "qformer"):
            raise SettingsError(
                f"{place} trains a Q-Former, and model.inject is {model.inject} with model.resample {model.resample}; "
                "set model.inject=embed and model.resample=qformer"
            )
        if training.trained != "bridge":
            raise SettingsError(
                f"{place} uses no language model and trains the bridge alone, and stages.{stage.name}.trains is "
                f"{training.trained}; leave it out"
            )
        if data.max_pictures != 1:
            raise SettingsError(
                f"{place} matches one picture with a text, and data.max_pictures is {data.max_pictures}; set it to 1"
            )
        if training.max_tokens_per_block is not None:
            raise SettingsError(
                f"{place} takes its negatives from the questions of a block, whose number must not depend on their "
                f"lengths, and training.max_tokens_per_block is {training.max_tokens_per_block:,}; leave it out, and "
                "set training.micro_batch_size"
            )
        if training.micro_batch_size == 1:
            raise SettingsError(
                f"{place} takes its negatives from the other questions of a block, and training.micro_batch_size is 1; "
                "give at least 2, and the more the better"
            )


def check_machine(settings: Settings) -> None:
    """Check that this machine can run the settings.

    Raises:
        SettingsError: GPUs are requested where there are none, what offload=nvme needs is missing, the disk is full, or
            what is to be trained is not in the model.
        MissingPackageError: LoRA is wanted, and peft is not installed.
    """
    _check_trained_parts(settings)
    _check_deepspeed(settings)
    _check_gpus(settings.cluster)
    _check_disk(settings.run_dir)


def _check_trained_parts(settings: Settings) -> None:
    for stage in settings.chain.stage_names:
        training = settings.training_of(stage)
        if training.trained in ("all", "bridge"):
            continue
        from launcher.stages.build_model import check_trained_parts  # imports torch

        try:
            own = settings.model_copy(update={"training": training})
            check_trained_parts(own, settings.chain.stage(stage).objective)
        except InputError as error:
            raise SettingsError(
                f"stage {stage!r} (training.trains, {stage}.trains, model.lora_targets): {error}"
            ) from None


def _check_features(settings: Settings) -> None:
    name = settings.data.features
    if name is None or name in ENCODERS:
        return
    if ready_made_file(settings.data):
        return
    if settings.data.shards_dir is None:
        where = f"data.shards_dir is not set, so the shards would be built without features/{name}"
    elif is_remote(settings.data.shards_dir):
        return  # opening it reports missing features
    else:
        folder = Path(settings.data.shards_dir) / "features" / name
        if (folder / "manifest.json").exists():
            return
        where = f"{folder} is missing"
    if name.lower() == "none":
        raise SettingsError(f"data.features {name!r} is no kind of features; for text alone write data.features=null")
    raise SettingsError(
        f"features {name!r} cannot be made on this machine (known: {', '.join(ENCODERS)}) and {where}; set "
        f"data.shards_dir to a folder that holds features/{name} (tars of {{qid}}.npy in the order of the text shards, "
        "with manifest.json), "
        f"put the published {name}.npy (or .pth) into data.path/vision_features, with name_map.json, or set "
        "data.features=patch"
    )


def _check_deepspeed(settings: Settings) -> None:
    training = settings.training
    if training.deepspeed:
        from launcher.training.deepspeed_engine import deepspeed_config
        from launcher.training.zero_stage import stage_of_json

        deepspeed_config(training, world_size=settings.cluster.num_workers)
        if training.zero_stage == "auto":
            stage_of_json(training)
    if training.offload != "nvme":
        return
    if not Path(training.nvme_dir or "").is_dir():
        raise SettingsError(
            f"training.nvme_dir {training.nvme_dir} is no folder on this machine; make one on a local NVMe disk"
        )
    if settings.cluster.address == "local":  # elsewhere every rank checks its own machine
        use_gpu = settings.cluster.use_gpu
        check_offload(training, use_gpu=count_own_gpus() > 0 if use_gpu == "auto" else use_gpu)


def _check_gpus(cluster: Cluster) -> None:
    if cluster.use_gpu is True and cluster.address == "local":
        require_gpus(cluster, count_own_gpus(), "this machine")


def _check_disk(run_dir: Path) -> None:
    folder = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise SettingsError(
            f"{folder} has {free / 1e9:.2f} GB left, at least {MIN_FREE_BYTES / 1e9:.0f} GB are needed; "
            "free some, or set run.dir"
        )
