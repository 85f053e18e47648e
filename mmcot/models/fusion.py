"""Fusion of text and picture: one small module per kind of fusion.

A fusion takes the encoder's text states and the picture's patch features and returns text
states of the same shape, so that the decoder needs no change. Kinds are chosen by name from
``FUSIONS``; their parameters are registered in the encoder under the names that they have in
this module.

Shape suffixes: B batch, S text positions, P patches, D model width, V feature width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the usual name)


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


class GatedCrossAttention(nn.Module):
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

    def __init__(self, *, d_model: int, vision_dim: int, gate_start: float = 0.0) -> None:
        super().__init__()
        self.image_dense = FusionLinear(vision_dim, d_model)
        self.mha_layer = SingleHeadAttention(d_model)
        self.gate_dense = FusionLinear(2 * d_model, d_model)
        self.gate_dense.bias_start = gate_start

    def forward(
        self, text_BSD: torch.Tensor, vision_BPV: torch.Tensor, mask_BP: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the fused states [B, S, D] of ``text_BSD`` [B, S, D] and ``vision_BPV`` [B, P, V]."""
        image_BPD = self.image_dense(vision_BPV.to(text_BSD.dtype))
        attended_BSD = self.mha_layer(text_BSD, image_BPD, mask_BP)
        gate_BSD = self.gate(text_BSD, attended_BSD)
        return (1 - gate_BSD) * text_BSD + gate_BSD * attended_BSD

    def gate(self, text_BSD: torch.Tensor, attended_BSD: torch.Tensor) -> torch.Tensor:
        """Lambda, the weight of the attended state in each element of the fused state, [B, S, D] in 0..1."""
        return torch.sigmoid(self.gate_dense(torch.cat([text_BSD, attended_BSD], dim=-1)))


FUSIONS = {"gated_cross_attention": GatedCrossAttention}
