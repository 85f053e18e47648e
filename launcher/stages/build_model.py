"""The initial model of a stage."""

from __future__ import annotations

from typing import Any

import torch

from launcher.config.chains import MATCHING, TEXT
from launcher.config.settings import Settings
from launcher.runs.exported import verify_model
from launcher.stages.samples import GRAPH_LENGTH_MULTIPLE, StageSamples, picture_tokens
from mmcot.errors import InputError
from mmcot.models.lora import add_adapters
from mmcot.models.opening import check_start, class_name, model_class, reads_text_alone
from mmcot.models.trained_parts import ParameterCounts, choose_trained, count_parameters
from mmcot.pretrained import opening
from mmcot.vision.patches import PATCH_SCALE


def build_model(
    settings: Settings, samples: StageSamples, *, objective: str = TEXT, gate_start: float | None = None
) -> Any:
    """Build a pretrained language model with new fusion layers, or one with random weights; seeded.

    With ``training.trains`` lora it has adapters.

    Args:
        objective: of the training, which decides the class.
        gate_start: the initial bias of the gate of new fusion layers; None: ``model.gate_start``.

    Returns:
        a model as ``mmcot/models/contract.py`` describes it.
    """
    torch.manual_seed(settings.run.seed)
    vision = _vision_of(settings, samples, objective) | ({} if gate_start is None else {"gate_start": gate_start})
    model = _start(settings, samples, vision, class_name(objective))
    _adapt(model, settings)
    return model


def _start(settings: Settings, samples: StageSamples, vision: dict[str, Any], name: str) -> Any:
    """The model of class ``name`` without adapters."""
    if settings.model.pretrained:
        verify_model(settings.model.pretrained)  # it may be another run's
        fixed = settings.model.fixed_by_start(int(vision["vision_dim"]))
        sizes = {key: vision[key] for key in ("max_text_tokens", "projection_width")}
        check_start(name, settings.model.pretrained, **fixed, matching=sizes)
        with opening(settings.model.pretrained, "model.pretrained"):
            return model_class(name).from_pretrained(
                settings.model.pretrained,
                trust_remote_code=False,
                dtype=torch.float32,
                ignore_mismatched_sizes=reads_text_alone(settings.model.pretrained),
                **vision,
            )
    tokenizer, shape = samples.tokenizer, settings.model.shape
    return model_class(name).start(
        _shape(settings, samples),
        vision,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        distance_bias=shape.distance_bias,
        near_bias=shape.near_bias,
        match_score=shape.match_score,
    )


def _adapt(model: Any, settings: Settings) -> None:
    if settings.training.trained == "lora":
        of_model = settings.model
        add_adapters(
            model,
            rank=of_model.lora_rank,
            alpha=of_model.lora_alpha,
            dropout=of_model.lora_dropout,
            targets=of_model.lora_targets,
            seed=settings.run.seed,
        )


def parameter_counts(settings: Settings, samples: StageSamples, *, objective: str = TEXT) -> ParameterCounts:
    """The numbers of parameters of a run's models, without their weights; all count as trained if stages differ."""
    if not settings.stages_train_alike:
        everything = settings.training.model_copy(update={"trains": "all", "freeze_backbone": False})
        settings = settings.model_copy(update={"training": everything})
    vision = _vision_of(settings, samples, objective)
    return count_parameters(_outline(settings, _shape(settings, samples), vision, objective))


def check_trained_parts(settings: Settings, objective: str) -> None:
    """Check what a stage's training trains by the names in its model, without data or weights.

    Args:
        settings: of the stage.
        objective: of the stage.

    Raises:
        InputError: a name or a target of LoRA fits nothing, or all that is trained is what features alone reach.
        MissingPackageError: peft is needed and not installed.
    """
    feature_shape = (settings.data.max_pictures, 1)  # no name depends on it
    shape = settings.model.shape.for_config | {"vocab_size": 1}
    model = _outline(settings, shape, _vision(settings, feature_shape, objective, max_text_tokens=1), objective)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if settings.data.features is None and all(name.startswith(model.new_parts) for name in names):
        raise InputError(
            f"training.trains {settings.training.trained!r} leaves nothing to train without data.features; set them, "
            "or name parts of the language model"
        )


def _outline(settings: Settings, shape: dict[str, Any], vision: dict[str, Any], objective: str) -> Any:
    """The model without weights; what is not trained is frozen."""
    kind = model_class(class_name(objective))
    if settings.model.pretrained:
        with opening(settings.model.pretrained, "model.pretrained"):
            config = kind.config_class.from_pretrained(settings.model.pretrained, trust_remote_code=False, **vision)
    else:
        config = kind.config_class(**shape, **vision)
    with torch.device("meta"):
        model = kind(config)
        _adapt(model, settings)
    choose_trained(model, settings.training.trained)
    return model


def _shape(settings: Settings, samples: StageSamples) -> dict[str, Any]:
    shape = settings.model.shape
    return shape.for_config | {"vocab_size": shape.vocab_size or len(samples.tokenizer)}


def _vision_of(settings: Settings, samples: StageSamples, objective: str) -> dict[str, Any]:
    feature_shape = samples.reader.feature_shape if settings.data.features else (1, 1)
    # A block's texts are padded to such a multiple on GPUs.
    longest = -(-samples.max_target_tokens // GRAPH_LENGTH_MULTIPLE) * GRAPH_LENGTH_MULTIPLE
    return _vision(settings, feature_shape, objective, max_text_tokens=longest)


def _vision(
    settings: Settings, feature_shape: tuple[int, int], objective: str, *, max_text_tokens: int
) -> dict[str, Any]:
    model, (num_patches, dim) = settings.model, feature_shape
    pictures = picture_tokens(settings, feature_shape, 0)  # the padding token does not matter here
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
    matches = objective == MATCHING
    return media | {
        "max_text_tokens": max_text_tokens if matches else 0,
        "projection_width": model.projection_width if matches else 0,
        "vision_num_patches": num_patches,
        "vision_dim": dim,
        "fusion": settings.model.fusion,
        "gate_start": settings.model.gate_start,
        "mask_absent_patches": settings.model.mask_absent_patches,
    }
