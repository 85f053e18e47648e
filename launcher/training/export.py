"""The model a stage starts from, and the folder it ends as."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_shards.atomic_files import commit_folder, commit_json
from launcher.training.deepspeed_engine import full_state_dict
from launcher.runs.exported import verify_model
from launcher.stages.jobs import MODEL_FACTS_FILE
from launcher.stages.samples import StageSamples
from launcher.config.settings import Settings
from mmcot.models.attention_start import start_with_lookup
from mmcot.models.distance_bias import prefer_near
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration


def build_model(settings: Settings, samples: StageSamples, *, gate_start: float | None = None) -> T5ForMultimodalGeneration:
    """A pretrained T5 with new fusion layers, or one of random weights; seeded.

    Args:
        gate_start: where the gate of new fusion layers starts; None: ``model.gate_start``.
    """
    torch.manual_seed(settings.run.seed)
    num_patches, dim = samples.reader.feature_shape if settings.data.features else (1, 1)
    vision = {
        "vision_num_patches": num_patches, "vision_dim": dim,
        "fusion": settings.model.fusion, "gate_start": settings.model.gate_start if gate_start is None else gate_start, "mask_absent_patches": settings.model.mask_absent_patches,
    }  # fmt: skip
    if settings.model.pretrained:
        verify_model(settings.model.pretrained)  # it may be another run's
        _check_vision_dim(settings.model.pretrained, dim)
        return T5ForMultimodalGeneration.from_pretrained(settings.model.pretrained, dtype=torch.float32, **vision)
    tokenizer = samples.tokenizer
    shape = settings.model.shape.for_config | {"vocab_size": settings.model.shape.vocab_size or len(tokenizer)}
    config = MultimodalT5Config(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id, **shape, **vision,
    )  # fmt: skip
    model = T5ForMultimodalGeneration._from_config(config)
    if settings.model.shape.distance_bias:
        prefer_near(model, settings.model.shape.distance_bias)
    if settings.model.shape.near_bias:
        start_with_lookup(model, near_bias=settings.model.shape.near_bias, match_score=settings.model.shape.match_score)
    return model


def _check_vision_dim(pretrained: str, dim: int) -> None:
    trained = MultimodalT5Config.get_config_dict(pretrained)[0].get("vision_dim", dim)
    if trained != dim:
        raise ValueError(
            f"{pretrained} was trained on features of width {trained}, data.features has width {dim}; "
            "use the features it was trained on, or a text-only backbone"
        )


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
