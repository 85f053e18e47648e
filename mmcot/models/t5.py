"""The fused model: T5 with a fusion of its encoder states and vision features.

``T5ForMultimodalGeneration`` is a ``T5ForConditionalGeneration`` with one more input:

    model = T5ForMultimodalGeneration.from_pretrained("runs/demo/rationale/model")
    model(input_ids=..., attention_mask=..., vision_features=x_BPV, labels=...).loss
    model.generate(input_ids, attention_mask=..., vision_features=x_BPV)

The fusion is inside the encoder, after its final layer norm and dropout, so that cached and
uncached decoding agree. Without ``vision_features`` the model is a plain T5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers import initialization as init
from transformers.models.t5.modeling_t5 import T5PreTrainedModel, T5Stack

from mmcot.models.fusion import FUSIONS, FusionLinear, SingleHeadAttention


class MultimodalT5Config(T5Config):
    """T5's configuration with the shape of the vision features, ``[vision_num_patches, vision_dim]``.

    ``mask_absent_patches`` masks the zeros of a missing picture in the fusion; without it,
    they are attended as in the published system. ``gate_start`` is the bias of the fusion's
    gate before training; loaded weights replace it.

    transformers ties all embeddings for every value of ``tie_word_embeddings`` and keeps only
    ``scale_decoder_outputs`` of it. In this class that flag decides whether ``lm_head`` has its
    own weights (T5 v1.1, Flan), and it is saved under its usual name.
    """

    vision_num_patches: int = 100
    vision_dim: int = 256
    fusion: str = "gated_cross_attention"
    mask_absent_patches: bool = False
    gate_start: float = 0.0

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion {self.fusion!r} is unknown; expected one of {sorted(FUSIONS)}")

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


class _FusionInitializer(T5PreTrainedModel if TYPE_CHECKING else object):
    """Initialises the fusion at T5's scale; a mixin, because T5's own method initialises the rest."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, although the class is not part of transformers.

        For custom code transformers does not initialise modules without own parameters, so T5's attention and
        feed-forward layers would keep the default of a linear layer, a standard deviation of 1 instead of 0.03 to
        0.13. The purpose of that rule is to keep loaded weights, which ``transformers.initialization`` keeps anyway.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (FusionLinear, SingleHeadAttention)):
            _init_fusion_weights(module, self.config.initializer_factor)
        else:
            super()._init_weights(module)


class FusedEncoder(_FusionInitializer, T5Stack):
    """T5's encoder stack with a fusion of vision features at its end.

    The fusion's parts are registered directly in the stack, because published checkpoints name
    them ``encoder.image_dense``, ``encoder.mha_layer`` and ``encoder.gate_dense``.
    """

    def __init__(self, config: MultimodalT5Config) -> None:
        super().__init__(config)
        fusion = FUSIONS[config.fusion](
            d_model=config.d_model, vision_dim=config.vision_dim, gate_start=config.gate_start
        )
        self.fusion_parts = [name for name, _ in fusion.named_children()]
        for name, part in fusion.named_children():
            self.add_module(name, part)
        self._fusion = (fusion,)  # in a tuple, so that its parts are registered once
        self.post_init()

    @property
    def fusion(self) -> nn.Module:
        """The fusion, a kind of ``FUSIONS``; its parts are this stack's own."""
        return self._fusion[0]

    def forward(self, input_ids=None, attention_mask=None, vision_features=None, vision_mask=None, **kwargs):
        """Run T5's encoder, then the fusion where ``vision_features`` are given.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 at padding.
            vision_features: [B, P, V].
            vision_mask: bool [B, P]; used only if the configuration sets ``mask_absent_patches``.
            **kwargs: as ``T5Stack.forward``.

        Raises:
            ValueError: the features have another shape than the configured one.
        """
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if vision_features is None:
            return outputs
        expected = (self.config.vision_num_patches, self.config.vision_dim)
        # Attention to one pooled vector equals attention to any number of its copies.
        if tuple(vision_features.shape[1:]) not in (expected, (1, expected[1])):
            raise ValueError(
                f"vision_features have shape {tuple(vision_features.shape)}, this model expects [batch, "
                f"{expected[0]}, {expected[1]}]; use the features it was trained on"
            )
        mask = vision_mask if self.config.mask_absent_patches else None
        fused = self._fusion[0](outputs[0], vision_features, mask)
        if isinstance(outputs, tuple):
            return (fused, *outputs[1:])
        outputs.last_hidden_state = fused
        return outputs


class T5ForMultimodalGeneration(_FusionInitializer, T5ForConditionalGeneration):
    """T5 with a fused encoder (arXiv:2302.00923); loads and saves as any transformers model."""

    config_class = MultimodalT5Config

    def __init__(self, config: MultimodalT5Config) -> None:
        if not config.is_tied:
            tied = dict(type(self)._tied_weights_keys)
            tied.pop("lm_head.weight")
            self._tied_weights_keys = tied
        super().__init__(config)
        self.encoder = FusedEncoder(cast(MultimodalT5Config, self.encoder.config))
        self.post_init()

    @property
    def new_parts(self) -> tuple[str, ...]:
        """Prefixes of the names of parameters that are not the pretrained language model's."""
        return tuple(f"encoder.{name}." for name in self.encoder.fusion_parts)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs=None,
        vision_features: torch.Tensor | None = None,
        vision_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """Run encoder, fusion and decoder.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 0 at padding.
            encoder_outputs: fused states of an earlier call, instead of encoding again.
            vision_features: [B, P, V] of the configured shape; zeros where there is no picture.
            vision_mask: bool [B, P], False where a patch is absent; used only if the
                configuration sets ``mask_absent_patches``.
            **kwargs: as ``T5ForConditionalGeneration.forward`` (labels, decoder_input_ids, ...).

        Raises:
            ValueError: the features' shape is not the configured one.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                vision_features=vision_features,
                vision_mask=vision_mask,
            )
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, encoder_outputs=encoder_outputs, **kwargs
        )


def _init_fusion_weights(module: FusionLinear | SingleHeadAttention, factor: float) -> None:
    """Initialise by fan-in, as T5 does; transformers' default (std 1) is far too large for a fusion."""
    if isinstance(module, FusionLinear):
        init.normal_(module.weight, mean=0.0, std=factor * module.in_features**-0.5)
        init.constant_(module.bias, module.bias_start)
    else:
        # out_proj, because under ZeRO-3 in_proj_weight has no shape.
        init.normal_(module.in_proj_weight, mean=0.0, std=factor * module.out_proj.in_features**-0.5)
        init.zeros_(module.in_proj_bias)
