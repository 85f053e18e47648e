"""T5's decoder with gated cross-attention before each of its blocks (``inject: layers``).

The encoder's output is [text; media] along its positions; the decoder takes it apart: T5's own cross-attention reads
the text, ``mmcot/models/gated.py`` the media. Classes are changed in place and the new parts are named
``decoder.block.<n>.gated``, so that the names of T5's own weights stay.

Shape suffixes: B batch, T target positions, S text positions, N media tokens of all pictures, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.models.t5.modeling_t5 import T5Block
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from mmcot.models.bridge_start import BridgeInitializer
from mmcot.models.gated import GatedCrossAttention
from mmcot.models.lean_t5 import LeanStack


class MediaOfSource(NamedTuple):
    """What the decoder reads of a source: ``text`` [S, D], ``media`` [N, D] and their mask, bool [N], on its device."""

    text: torch.Tensor
    media: torch.Tensor
    mask: torch.Tensor


class GatedT5Block(T5Block):
    """A block of T5's decoder behind a gated cross-attention."""

    gated: GatedCrossAttention

    def forward(self, hidden_states: torch.Tensor, *args: Any, media: Any = None, **kwargs: Any) -> Any:
        """As ``T5Block.forward``; ``media`` are the states [B, N, D] and their mask, bool [B, 1, N]."""
        return super().forward(self.gated(hidden_states, *media), *args, **kwargs)


class GatedStack(BridgeInitializer, LeanStack):
    """T5's decoder whose blocks read media; ``num_media`` of the encoder's states, the last ones, are media."""

    num_media: int

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As ``LeanStack.forward``.

        Args:
            encoder_hidden_states: [B, S + N, D], of ``FusedEncoder``.
            encoder_attention_mask: [B, S + N], 0 at padding and at the media of pictures that are absent.
        """
        sizes = [encoder_hidden_states.shape[1] - self.num_media, self.num_media]
        text_BSD, media_BND = encoder_hidden_states.split(sizes, dim=1)
        text_mask_BS, media_mask_BN = encoder_attention_mask.split(sizes, dim=1)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=text_BSD,
            encoder_attention_mask=text_mask_BS,
            media=(media_BND, media_mask_BN[:, None].bool()),
            **kwargs,
        )


def add_gated_layers(decoder: Any, config: Any) -> None:
    """Put gated cross-attention before each block of a lean T5 decoder, in place.

    Args:
        config: a ``MultimodalT5Config``.
    """
    decoder.__class__ = GatedStack
    _CAN_RECORD_REGISTRY[decoder] = decoder._can_record_outputs
    decoder.num_media = config.max_pictures * config.media_tokens
    for block in decoder.block:
        block.__class__ = GatedT5Block
        block.gated = GatedCrossAttention(
            width=config.d_model,
            media_width=config.d_model,
            num_heads=config.num_heads,
            head_width=config.d_kv,
            activation=config.resample_activation,
        )
