"""Attention maps of a fused model: the attention of the text to the picture, and the gate.

    look = look_at(model, input_ids, attention_mask, vision_features)
    look.attention_BSP[0, 3]     # of the fourth token: weights of the patches, with sum 1
    look.gate_BS[0, 3]           # mean over the width: 0 keeps the text state, 1 takes the attended state

The equations are those of ``mmcot/models/fusion.py`` with explicit attention weights, computed
from the fusion's own parameters. ``fused_BSD`` equals the output of the model's encoder.

Shape suffixes: B batch, S text positions, P patches, D model width, V feature width.
"""

from __future__ import annotations

import dataclasses

import torch

from mmcot.models.fusion import GatedCrossAttention
from mmcot.models.t5 import T5ForMultimodalGeneration


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """Attention, gate and output of a fusion on a batch.

    ``attention_BSP`` float [B, S, P] sums to 1 over the patches, or is 0 where all are masked;
    ``gate_BS`` float [B, S] in 0..1, the gate's mean over the width; ``fused_BSD`` [B, S, D].
    """

    attention_BSP: torch.Tensor  # noqa: N815 (a shape suffix)
    gate_BS: torch.Tensor  # noqa: N815 (a shape suffix)
    fused_BSD: torch.Tensor  # noqa: N815 (a shape suffix)


@torch.no_grad()
def look_at(
    model: T5ForMultimodalGeneration,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    vision_features: torch.Tensor,
    vision_mask: torch.Tensor | None = None,
) -> AttentionMaps:
    """Run the encoder and measure its fusion.

    Args:
        input_ids: [B, S].
        attention_mask: [B, S], 0 at padding.
        vision_features: [B, P, V].
        vision_mask: bool [B, P]; used only if the model masks absent patches.

    Raises:
        ValueError: the model has another kind of fusion, which is not supported.
    """
    fusion = model.encoder.fusion
    if not isinstance(fusion, GatedCrossAttention):
        raise ValueError(
            f"fusion {model.config.fusion!r} has no attention maps; only 'gated_cross_attention' has attention and "
            "a gate"
        )
    text_BSD = model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask_BP = vision_mask if model.config.mask_absent_patches else None
    image_BPD = fusion.image_dense(vision_features.to(text_BSD.dtype))
    attention_BSP = fusion.mha_layer.shares(text_BSD, image_BPD, mask_BP)
    attended_BSD = fusion.mha_layer.attend(attention_BSP, image_BPD)
    gate_BSD = fusion.gate(text_BSD, attended_BSD)
    return AttentionMaps(attention_BSP, gate_BSD.mean(dim=-1), (1 - gate_BSD) * text_BSD + gate_BSD * attended_BSD)
