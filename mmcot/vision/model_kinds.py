"""The kinds of pretrained encoders of transformers: DETR, CLIP, ViT, ResNet, BLIP-2's ViT and SigLIP.

This module names the classes, and ``VisionEncoder`` imports them when it opens a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Shape = tuple[int, int]  # [P, D] of one picture

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _detr_features(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """The last decoder layer's states of the object queries: [B, 3, H, W] to [B, queries, D]."""
    mask = pixels.new_ones(pixels.shape[0], *pixels.shape[2:]).long()
    return model(pixel_values=pixels, pixel_mask=mask).last_hidden_state


def _clip_features(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """The last hidden states of the patches, without the class token: [B, 3, H, W] to [B, patches, D]."""
    return model(pixel_values=pixels).last_hidden_state[:, 1:]


def _last_states(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """All last hidden states: [B, 3, H, W] to [B, 1 + patches, D], the class token first where there is one."""
    return model(pixel_values=pixels).last_hidden_state


def _resnet_features(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """The pooled last stage as one vector: [B, 3, H, W] to [B, 1, D].

    The published system repeats this vector 512 times. Identical keys have equal attention weights and the
    same value, so attention to one vector equals attention to 512 copies.
    """
    return model(pixel_values=pixels).pooler_output.flatten(1).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class ModelKind:
    """The properties of one kind; normalisation and filter apply where the model's folder does not set them."""

    default_model: str  # Hugging Face id
    model_types: tuple[str, ...]  # allowed values of `model_type` in a config.json
    config_class: str  # of transformers
    model_class: str  # of transformers
    features: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor]
    mean_and_std: tuple[tuple[float, ...], tuple[float, ...]]
    resample: str  # a name of PIL's Image.Resampling
    published_shape: Shape | None = None  # of the published system's feature files
    is_square_grid: bool = False  # the features are the patches of the whole picture and nothing else
    model_settings: Mapping[str, object] = field(default_factory=dict)  # for ``from_pretrained``


MODEL_KINDS: Mapping[str, ModelKind] = MappingProxyType(
    {
        "detr": ModelKind(
            default_model="facebook/detr-resnet-101-dc5",
            model_types=("detr",),
            config_class="DetrConfig",
            model_class="DetrModel",
            features=_detr_features,
            mean_and_std=_IMAGENET,
            published_shape=(100, 256),
            resample="BILINEAR",
        ),
        "clip": ModelKind(  # the published features are of a ResNet tower, which transformers does not have
            default_model="openai/clip-vit-base-patch32",
            model_types=("clip", "clip_vision_model"),
            config_class="CLIPVisionConfig",  # also reads its part of a whole CLIP's configuration
            model_class="CLIPVisionModel",
            features=_clip_features,
            mean_and_std=_CLIP,
            published_shape=(49, 2048),
            resample="BICUBIC",
        ),
        "vit": ModelKind(
            default_model="google/vit-large-patch32-384",
            model_types=("vit",),
            config_class="ViTConfig",
            model_class="ViTModel",
            features=_last_states,
            mean_and_std=_HALF,
            published_shape=(145, 1024),
            resample="BILINEAR",
            model_settings={"add_pooling_layer": False},
        ),
        "resnet": ModelKind(
            default_model="microsoft/resnet-101",
            model_types=("resnet",),
            config_class="ResNetConfig",
            model_class="ResNetModel",
            features=_resnet_features,
            mean_and_std=_IMAGENET,
            published_shape=(512, 2048),
            resample="BICUBIC",
        ),
        "blip2": ModelKind(  # the states that BLIP-2's Q-Former reads, after the last layer norm
            default_model="Salesforce/blip2-flan-t5-xl",
            model_types=("blip-2", "blip_2_vision_model"),
            config_class="Blip2VisionConfig",  # also reads its part of a whole BLIP-2's configuration
            model_class="Blip2VisionModel",
            features=_last_states,
            mean_and_std=_CLIP,
            resample="BICUBIC",
            model_settings={"key_mapping": {r"^vision_model\.": ""}},  # its names in a whole BLIP-2
        ),
        "siglip": ModelKind(
            default_model="google/siglip-base-patch16-224",
            model_types=("siglip", "siglip_vision_model"),
            config_class="SiglipVisionConfig",  # also reads its part of a whole SigLIP's configuration
            model_class="SiglipVisionModel",
            features=_last_states,
            mean_and_std=_HALF,
            resample="BICUBIC",
            is_square_grid=True,
        ),
    }
)
