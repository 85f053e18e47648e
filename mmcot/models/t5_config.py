"""The configuration of the fused T5, and the bridge that it describes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from transformers import T5Config

from mmcot.errors import InputError
from mmcot.models.bridge import Bridge
from mmcot.models.fusion import BRIDGES
from mmcot.models.media import MediaLayers, MediaTokens
from mmcot.models.resampler import ResamplerShape
from mmcot.texts.encoding import PictureTokens

MEDIA_VALUES = (
    "inject",
    "resample",
    "media_tokens",
    "resample_depth",
    "resample_heads",
    "resample_width",
    "resample_head_width",
    "resample_activation",
    "resample_qk_norm",
)


class MultimodalT5Config(T5Config):
    """T5's configuration with the shape of the vision features, ``[vision_num_patches, vision_dim]``.

    ``mask_absent_patches`` masks the zeros of a missing picture in the fusion; without it,
    they are attended as in the published system. ``gate_start`` is the bias of the fusion's
    gate before training; loaded weights replace it.

    ``inject`` is where pictures enter: ``encoder`` (the fusion, after the encoder), ``embed`` (media in place of
    placeholders in the source) or ``layers`` (media read by gated cross-attention before each block of the decoder).
    ``resample``, ``media_tokens`` a picture and the values that begin with ``resample_`` are those of the media
    (``ResamplerShape``), which divide features by ``feature_scale``; ``max_pictures`` pictures have
    ``vision_num_patches`` patches together. Where ``resample_width`` is given, a linear layer brings the media from it
    to ``d_model``, also where both are equal; None: the resampler has the width ``d_model``.

    ``max_text_tokens`` and ``projection_width`` are those of a matching part (``mmcot/models/matching.py``), which
    ``T5ForImageTextMatching`` has; 0: there is none.

    transformers ties all embeddings for every value of ``tie_word_embeddings`` and keeps only
    ``scale_decoder_outputs`` of it. In this class that flag decides whether ``lm_head`` has its
    own weights (T5 v1.1, Flan), and it is saved under its usual name.
    """

    vision_num_patches: int = 100
    vision_dim: int = 256
    fusion: str = "gated_cross_attention"
    mask_absent_patches: bool = False
    gate_start: float = 0.0
    inject: str = "encoder"
    resample: str = "none"
    media_tokens: int = 0
    resample_depth: int = 2
    resample_heads: int = 4
    resample_width: int | None = None
    resample_head_width: int | None = None
    resample_activation: str = "gelu"
    resample_qk_norm: bool = False
    feature_scale: float = 1.0
    max_pictures: int = 1
    max_text_tokens: int = 0
    projection_width: int = 0

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if self.fusion not in BRIDGES:
            raise InputError(f"fusion {self.fusion!r} is unknown; expected one of {sorted(BRIDGES)}")
        if self.inject not in INJECTIONS:
            raise InputError(f"inject {self.inject!r} is unknown; expected one of {', '.join(INJECTIONS)}")

    @property
    def picture_tokens(self) -> PictureTokens | None:
        """How pictures stand in a source; None where they do not.

        A placeholder is the padding token, which no text contains; the attention mask tells it from padding.
        """
        if self.inject != "embed":
            return None
        return PictureTokens(self.media_tokens, cast(int, self.pad_token_id), self.max_pictures)

    @property
    def media_values(self) -> dict[str, Any]:
        """The values that describe the media, by their names."""
        return {name: getattr(self, name) for name in MEDIA_VALUES} if self.inject != "encoder" else {}

    @property
    def is_tied(self) -> bool:
        """Whether ``lm_head`` shares the input embedding."""
        return self.scale_decoder_outputs

    def to_dict(self) -> dict:
        """As transformers' own, with ``tie_word_embeddings`` as ``is_tied``."""
        return super().to_dict() | {"tie_word_embeddings": self.is_tied}

    def to_diff_dict(self) -> dict:
        """As transformers' own, with ``tie_word_embeddings`` as ``is_tied``."""
        return super().to_diff_dict() | {"tie_word_embeddings": self.is_tied}


def open_bridge(config: MultimodalT5Config) -> Bridge:
    """The bridge of a configuration, with new weights."""
    return INJECTIONS[config.inject](config)


def _fusion(config: MultimodalT5Config) -> Bridge:
    return BRIDGES[config.fusion](d_model=config.d_model, vision_dim=config.vision_dim, gate_start=config.gate_start)


def resampler_shape(config: MultimodalT5Config) -> ResamplerShape:
    """The sizes of the resampler of a configuration whose pictures enter as media."""
    return ResamplerShape(
        vision_dim=config.vision_dim,
        width=config.resample_width or config.d_model,
        num_patches=config.vision_num_patches // config.max_pictures,
        num_tokens=config.media_tokens,
        depth=config.resample_depth,
        num_heads=config.resample_heads,
        head_width=config.resample_head_width,
        activation=config.resample_activation,
        qk_norm=config.resample_qk_norm,
        input_scale=config.feature_scale,
    )


def _media(kind: type[Bridge], config: MultimodalT5Config) -> Bridge:
    return kind(
        resample=config.resample,
        shape=resampler_shape(config),
        num_pictures=config.max_pictures,
        project_to=config.d_model if config.resample_width else None,
    )


# By the value of ``inject``: where pictures enter the model.
INJECTIONS: dict[str, Callable[[MultimodalT5Config], Bridge]] = {
    "encoder": _fusion,
    "embed": partial(_media, MediaTokens),
    "layers": partial(_media, MediaLayers),
}
