"""The initial model of a stage."""

from __future__ import annotations

from typing import Any, cast

import torch

from launcher.config.settings import Settings
from launcher.runs.exported import verify_model
from launcher.stages.samples import StageSamples, picture_tokens
from mmcot.models.opening import DEFAULT, check_start, model_class
from mmcot.pretrained import opening
from mmcot.vision.patches import PATCH_SCALE


def build_model(settings: Settings, samples: StageSamples, *, gate_start: float | None = None) -> Any:
    """Build a pretrained language model with new fusion layers, or one with random weights; seeded.

    Args:
        gate_start: the initial bias of the gate of new fusion layers; None: ``model.gate_start``.

    Returns:
        a model as ``mmcot/models/contract.py`` describes it.
    """
    torch.manual_seed(settings.run.seed)
    vision = _vision(settings, samples) | ({} if gate_start is None else {"gate_start": gate_start})
    if settings.model.pretrained:
        verify_model(settings.model.pretrained)  # it may be another run's
        fixed = settings.model.fixed_by_start(int(vision["vision_dim"]))
        check_start(DEFAULT, settings.model.pretrained, **fixed)
        with opening(settings.model.pretrained, "model.pretrained"):
            return model_class(DEFAULT).from_pretrained(
                settings.model.pretrained, trust_remote_code=False, dtype=torch.float32, **vision
            )
    tokenizer, shape = samples.tokenizer, settings.model.shape
    return model_class(DEFAULT).start(
        _shape(settings, samples),
        vision,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        distance_bias=shape.distance_bias,
        near_bias=shape.near_bias,
        match_score=shape.match_score,
    )


def count_parameters(settings: Settings, samples: StageSamples) -> int:
    """The number of parameters of that model, without its weights."""
    kind, vision = model_class(DEFAULT), _vision(settings, samples)
    if settings.model.pretrained:
        with opening(settings.model.pretrained, "model.pretrained"):
            config = kind.config_class.from_pretrained(settings.model.pretrained, trust_remote_code=False, **vision)
    else:
        config = kind.config_class(**_shape(settings, samples), **vision)
    with torch.device("meta"):
        model = kind(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _shape(settings: Settings, samples: StageSamples) -> dict[str, Any]:
    shape = settings.model.shape
    return shape.for_config | {"vocab_size": shape.vocab_size or len(samples.tokenizer)}


def _vision(settings: Settings, samples: StageSamples) -> dict[str, Any]:
    num_patches, dim = samples.reader.feature_shape if settings.data.features else (1, 1)
    model = settings.model
    pictures = picture_tokens(settings, (num_patches, dim), cast(int, samples.tokenizer.pad_token_id))
    media = (
        {}
        if pictures is None
        else {
            "inject": model.inject,
            "resample": model.resample,
            "media_tokens": pictures.per_picture,
            "resample_depth": model.resample_depth,
            "resample_heads": model.resample_heads,
            "resample_width": model.resample_width,
            "resample_head_width": model.resample_head_width,
            "resample_activation": model.resample_activation,
            "resample_qk_norm": model.resample_qk_norm,
            "max_pictures": pictures.max_pictures,
            "feature_scale": PATCH_SCALE if settings.data.features == "patch" else 1.0,
        }
    )
    return media | {
        "vision_num_patches": num_patches,
        "vision_dim": dim,
        "fusion": settings.model.fusion,
        "gate_start": settings.model.gate_start,
        "mask_absent_patches": settings.model.mask_absent_patches,
    }
