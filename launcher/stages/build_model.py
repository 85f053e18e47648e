"""The initial model of a stage."""

from __future__ import annotations

import torch

from launcher.config.settings import Settings
from launcher.runs.exported import verify_model
from launcher.stages.samples import StageSamples
from mmcot.models.attention_start import start_with_lookup
from mmcot.models.distance_bias import init_distance_bias
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration


def build_model(
    settings: Settings, samples: StageSamples, *, gate_start: float | None = None
) -> T5ForMultimodalGeneration:
    """Build a pretrained T5 with new fusion layers, or one with random weights; seeded.

    Args:
        gate_start: the initial bias of the gate of new fusion layers; None: ``model.gate_start``.
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
        _check_vision_dim(settings.model.pretrained, dim)
        return T5ForMultimodalGeneration.from_pretrained(settings.model.pretrained, dtype=torch.float32, **vision)
    tokenizer = samples.tokenizer
    shape = settings.model.shape.for_config | {"vocab_size": settings.model.shape.vocab_size or len(tokenizer)}
    config = MultimodalT5Config(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportCallIssue] (read from **kwargs)
        **shape,
        **vision,
    )
    model = T5ForMultimodalGeneration._from_config(config)
    if settings.model.shape.distance_bias:
        init_distance_bias(model, settings.model.shape.distance_bias)
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
