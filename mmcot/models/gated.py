"""Gated cross-attention to media between the blocks of a language model (Flamingo, arXiv:2204.14198, section 2.2).

    block = GatedCrossAttention(width=64, media_width=64, num_heads=4, head_width=16)
    x_BTD = block(x_BTD, media_BND)     # before a block of the language model; the identity at the start

The text's states read the media; what they read is added times tanh of a learned number that starts at 0, so that the
language model's own computation is where the training begins.

Shape suffixes: B batch, T text positions, M pictures, K media tokens of a picture, N = M·K, D width of the model, C of
the media.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init

from mmcot.models.media_attention import FeedForward, MediaAttention


class TanhGate(nn.Module):
    """x tanh(a) with one learned number a that starts at 0.

    ``opening`` is |tanh(a)| of the last call while ``is_observed``; else None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        self.is_observed = False
        self.opening: float | None = None

    def reset_parameters(self) -> None:
        """Close the gate."""
        init.zeros_(self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale a tensor of any shape."""
        gate = self.scale.tanh()
        if self.is_observed:
            self.opening = float(gate.detach().abs())
        return x * gate


class GatedCrossAttention(nn.Module):
    """x += tanh(a) Attention(LN(x), media);  x += tanh(b) W_2 act(W_1 LN(x)) (figure 4 of the paper).

    Linear layers have no biases, and the media have no norm of their own, as in the published ports.

    Args:
        width: D.
        media_width: C.
        num_heads: of the attention, each ``head_width`` wide.
        activation: in the feed-forward: ``gelu`` (the published ports), ``relu`` (IDEFICS) or ``squared_relu`` (the
            paper).
    """

    def __init__(
        self, *, width: int, media_width: int, num_heads: int, head_width: int, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = MediaAttention(width, media_width, num_heads=num_heads, head_width=head_width, bias=False)
        self.attention_gate = TanhGate()
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, activation=activation, bias=False)
        self.feed_forward_gate = TanhGate()

    def forward(
        self, x_BTD: torch.Tensor, media_BND: torch.Tensor, mask_BTN: torch.Tensor | None = None
    ) -> torch.Tensor:
        """States [B, T, D] after attention and feed-forward.

        Args:
            media_BND: [B, N, C].
            mask_BTN: bool [B, T, N] or [B, 1, N], False where a position may not read a media token; None where all
                may. A position that reads nothing gets nothing from the attention; the feed-forward still acts.
        """
        attended_BTD = self.attention(self.attention_norm(x_BTD), media_BND.to(x_BTD.dtype), mask_BTN)
        return self.transform(x_BTD + self.attention_gate(attended_BTD))

    def transform(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """The gated feed-forward."""
        return x_BTD + self.feed_forward_gate(self.feed_forward(self.feed_forward_norm(x_BTD)))

    def observe(self, is_observed: bool) -> None:
        """Note the gates' openings in forward passes from now on, or stop."""
        for gate in (self.attention_gate, self.feed_forward_gate):
            gate.is_observed = is_observed

    def forward_flops(self, num_positions: int, num_media: int) -> float:
        """Operations of the matrix products for a text of this many positions; a multiply-add counts as two."""
        return self.attention.forward_flops(num_positions, num_media) + self.feed_forward.forward_flops(num_positions)


def gate_openings(layers: Sequence[GatedCrossAttention]) -> dict[str, float]:
    """|tanh| of each layer's gates that was noted since the last call, by the name of a metric."""
    openings = {}
    for number, layer in enumerate(layers):
        for name, gate in (("attention", layer.attention_gate), ("feed_forward", layer.feed_forward_gate)):
            if gate.opening is not None:
                openings[f"{name}_gate_{number}"], gate.opening = gate.opening, None
    return openings


def own_picture_mask(is_picture_BT: torch.Tensor, *, num_pictures: int, tokens_per_picture: int) -> torch.Tensor:
    """Which media a token may read: those of the last picture at or before it (section 2.3 of the paper).

    Args:
        is_picture_BT: bool [B, T], True where a picture stands in the text.

    Returns:
        bool [B, T, N]; a token before the first picture reads nothing.
    """
    last_BT1 = is_picture_BT.long().cumsum(dim=1)[..., None]
    picture_of_N = torch.arange(num_pictures, device=last_BT1.device).repeat_interleave(tokens_per_picture) + 1
    return picture_of_N == last_BT1
