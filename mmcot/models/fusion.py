"""The bridges from picture to text: one small module per kind.

A bridge takes the encoder's text states and the picture's patch features and returns the states
that the decoder reads, with their mask. ``mmcot/models/bridge.py`` says what a bridge must offer.
Kinds are chosen by their name in ``BRIDGES`` (``model.fusion`` in the settings).

Shape suffixes: B batch, S text positions, P patches, D model width, V feature width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from mmcot.models.bridge import AttentionMaps, Bridge, Lengths


class FusionLinear(nn.Linear):
    """A linear layer of a fusion; its own class, so that initialisation can distinguish it from T5's."""

    bias_start = 0.0  # the value of the bias at initialisation


class SingleHeadAttention(nn.Module):
    """Scaled dot-product attention with one head and biases.

    Parameter names and arithmetic are those of ``nn.MultiheadAttention(d_model, 1)``, so that
    published weights fit. That class is not used, because it reads ``out_proj.weight`` without
    calling ``out_proj``, and the hooks of parameter-partitioned training (ZeRO-3) need the call.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = FusionLinear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query_BSD: torch.Tensor, memory_BPD: torch.Tensor, mask_BP: torch.Tensor | None = None):
        """Attend from ``query_BSD`` to ``memory_BPD``.

        Args:
            query_BSD: [B, S, D].
            memory_BPD: [B, P, D], both keys and values.
            mask_BP: optional bool [B, P], False where a patch is masked. A row without an
                unmasked patch gives zeros before the output projection.

        Returns:
            [B, S, D].
        """
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.in_proj_bias.chunk(3)
        mask_B1SP = None
        if mask_BP is not None:
            visible_B = mask_BP.any(dim=1)
            mask_BP = mask_BP | ~visible_B[:, None]  # softmax over nothing would be NaN
            mask_B1SP = mask_BP[:, None, None, :]
        attended_B1SD = F.scaled_dot_product_attention(
            F.linear(query_BSD, w_q, b_q).unsqueeze(1),
            F.linear(memory_BPD, w_k, b_k).unsqueeze(1),
            F.linear(memory_BPD, w_v, b_v).unsqueeze(1),
            attn_mask=mask_B1SP,
        )
        attended_BSD = attended_B1SD.squeeze(1)
        if mask_BP is not None:
            attended_BSD = attended_BSD * visible_B[:, None, None].to(attended_BSD.dtype)
        return self.out_proj(attended_BSD)

    def shares(
        self, query_BSD: torch.Tensor, memory_BPD: torch.Tensor, mask_BP: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the attention weights, which ``forward`` does not return.

        Returns:
            [B, S, P], for each position the weights of the patches; zeros where all patches are masked.
        """
        w_q, w_k, _ = self.in_proj_weight.chunk(3)
        b_q, b_k, _ = self.in_proj_bias.chunk(3)
        query_BSD, key_BPD = F.linear(query_BSD, w_q, b_q), F.linear(memory_BPD, w_k, b_k)
        scores_BSP = query_BSD @ key_BPD.transpose(1, 2) / query_BSD.shape[-1] ** 0.5
        if mask_BP is not None:
            scores_BSP = scores_BSP.masked_fill(~mask_BP[:, None, :], float("-inf"))
        return scores_BSP.softmax(dim=-1).nan_to_num(0.0)

    def attend(self, shares_BSP: torch.Tensor, memory_BPD: torch.Tensor) -> torch.Tensor:
        """The output of ``forward`` from the attention weights, [B, S, D]."""
        values_BPD = F.linear(memory_BPD, self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2])
        return self.out_proj(shares_BSP @ values_BPD)


class GatedCrossAttention(Bridge):
    """Gated fusion of arXiv:2302.00923, section 4.2.

        H_img  = W_h x                          (image_dense)
        H_att  = softmax(Q K^T / sqrt(d)) V     with Q = H_text, K = V = H_img (mha_layer)
        lambda = sigmoid(W_l H_text + W_v H_att)    (gate_dense on the concatenation)
        H_fuse = (1 - lambda) * H_text + lambda * H_att

    A question without a picture has zeros as features. They are attended like any other
    patch (their keys are ``image_dense.bias``), unless a mask excludes them.

    Args:
        gate_start: the bias of the gate before training: with 0 lambda is near 0.5, with -4 near 0.02.
    """

    parts_in_encoder = True

    def __init__(self, *, d_model: int, vision_dim: int, gate_start: float = 0.0) -> None:
        super().__init__()
        self.image_dense = FusionLinear(vision_dim, d_model)
        self.mha_layer = SingleHeadAttention(d_model)
        self.gate_dense = FusionLinear(2 * d_model, d_model)
        self.gate_dense.bias_start = gate_start
        self._observed_BS: torch.Tensor | None = None
        self._sum = self._count = 0.0

    def forward(
        self,
        text_BSD: torch.Tensor,
        text_mask_BS: torch.Tensor,
        vision_BPV: torch.Tensor,
        vision_mask_BP: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fuse; see ``Bridge.forward``. The mask is that of the text."""
        image_BPD = self.image_dense(vision_BPV.to(text_BSD.dtype))
        attended_BSD = self.mha_layer(text_BSD, image_BPD, vision_mask_BP)
        gate_BSD = self.gate(text_BSD, attended_BSD)
        return (1 - gate_BSD) * text_BSD + gate_BSD * attended_BSD, text_mask_BS

    def gate(self, text_BSD: torch.Tensor, attended_BSD: torch.Tensor) -> torch.Tensor:
        """Lambda, the weight of the attended state in each element of the fused state, [B, S, D] in 0..1."""
        logits_BSD = self.gate_dense(torch.cat([text_BSD, attended_BSD], dim=-1))
        if self._observed_BS is not None:
            self._note(logits_BSD)
        return torch.sigmoid(logits_BSD)

    def forward_flops(self, source_lengths: Lengths, num_patches: int) -> Lengths:
        """Operations of each question; see ``Bridge.forward_flops``."""
        width, dim = self.image_dense.out_features, self.image_dense.in_features
        patches = num_patches * (dim + 2 * width) * width  # image_dense, keys and values
        text = source_lengths * (2 + 2) * width * width  # query, output and gate
        return 2 * (patches + text + 2 * source_lengths * num_patches * width)  # and attention

    def attention_maps(
        self,
        text_BSD: torch.Tensor,
        text_mask_BS: torch.Tensor,
        vision_BPV: torch.Tensor,
        vision_mask_BP: torch.Tensor | None = None,
    ) -> AttentionMaps:
        """The equations of ``forward`` with explicit attention weights."""
        image_BPD = self.image_dense(vision_BPV.to(text_BSD.dtype))
        attention_BSP = self.mha_layer.shares(text_BSD, image_BPD, vision_mask_BP)
        attended_BSD = self.mha_layer.attend(attention_BSP, image_BPD)
        gate_BSD = self.gate(text_BSD, attended_BSD)
        return AttentionMaps(attention_BSP, (1 - gate_BSD) * text_BSD + gate_BSD * attended_BSD, gate_BSD.mean(dim=-1))

    def observe(self, inputs: Mapping[str, torch.Tensor] | None) -> None:
        """Measure the gate's opening at real text positions of the questions with a picture."""
        self._observed_BS = None
        if inputs is not None and "vision_mask" in inputs:
            mask_BS = inputs["attention_mask"].bool() & inputs["vision_mask"].any(dim=1, keepdim=True)
            self._observed_BS = mask_BS if mask_BS.any() else None

    def watch(self) -> dict[str, float]:
        """``gate_opening``, a mean over the width too: 0 keeps the text's states, 1 replaces them."""
        values = {"gate_opening": self._sum / self._count} if self._count else {}
        self._sum = self._count = 0.0
        return values

    @torch.no_grad()
    def _note(self, logits_BSD: torch.Tensor) -> None:
        assert self._observed_BS is not None
        opening_BS = torch.sigmoid(logits_BSD.float()).mean(dim=-1)
        mask_BS = self._observed_BS.to(opening_BS.device)
        self._sum += float(opening_BS[mask_BS].sum())
        self._count += int(mask_BS.sum())


BRIDGES: dict[str, type[Bridge]] = {"gated_cross_attention": GatedCrossAttention}
