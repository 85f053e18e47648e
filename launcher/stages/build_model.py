"""The initial model of a stage."""

from __future__ import annotations

from typing import Any

import torch

from launcher.config.settings import Settings
from launcher.runs.exported import verify_model
from launcher.stages.samples import StageSamples
from mmcot.models.opening import DEFAULT, check_start, model_class


def build_model(settings: Settings, samples: StageSamples, *, gate_start: float | None = None) -> Any:
    """Build a pretrained language model with new fusion layers, or one with random weights; seeded.

    Args:
        gate_start: the initial bias of the gate of new fusion layers; None: ``model.gate_start``.

    Returns:
        a model as ``mmcot/models/contract.py`` describes it.
    """
    torch.manual_seed(settings.run.seed)
    num_patches, dim = samples.reader.feature_shape if settings.data.features else (1, 1)
    vision = {
        "vision_num_patches": num_patches,
        "vision_dim": dim,
        "fusion": settings.model.fusion,
        "gate_start": settings.model.gate_start if gate_start is None else gate_start,
        "mask_absent_patches": settings.model.mask_absent_patches,
    }
    if settings.model.pretrained:
        verify_model(settings.model.pretrained)  # it may be another run's
        check_start(DEFAULT, settings.model.pretrained, vision_dim=dim, fusion=settings.model.fusion)
        return model_class(DEFAULT).from_pretrained(settings.model.pretrained, dtype=torch.float32, **vision)
    tokenizer, shape = samples.tokenizer, settings.model.shape
    return model_class(DEFAULT).start(
        shape.for_config | {"vocab_size": shape.vocab_size or len(tokenizer)},
        vision,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        distance_bias=shape.distance_bias,
        near_bias=shape.near_bias,
        match_score=shape.match_score,
    )
