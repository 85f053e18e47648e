"""The parts that resamplers are built of: attention to a memory, a feed-forward, and learned rows.

All parameters belong to small modules that are called, because parameter-partitioned training (ZeRO-3) gathers the
parameters of a module when that module is called, and at no other time.

Shape suffixes: N rows of a batch, Q queries, L memory positions, W width, C memory width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the usual name)
from transformers import initialization as init


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0) squared (arXiv:2109.08668), of any shape."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "squared_relu": squared_relu,
}


class LearnedRows(nn.Module):
    """Learned vectors: latents, queries or positions.

    Args:
        count: rows.
        width: W.
        std: standard deviation of their normal start.
    """

    def __init__(self, count: int, width: int, *, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(count, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from normal noise; the weight's shape is not read."""
        init.normal_(self.weight, mean=0.0, std=self.std)

    def forward(self, count: int) -> torch.Tensor:
        """The first ``count`` rows, [count, W]; a copy, which stays when the weight is partitioned again."""
        return F.embedding(torch.arange(count, device=self.weight.device), self.weight)


class FeedForward(nn.Module):
    """W2 act(W1 x), four times as wide inside, on [..., W]; norms and residuals are the caller's.

    Args:
        width: W.
        activation: a name of ``ACTIVATIONS``.
        bias: whether both layers have biases.
    """

    def __init__(self, width: int, *, activation: str, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width, bias=bias)
        self.fc2 = nn.Linear(4 * width, width, bias=bias)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each position, [..., W] to [..., W]."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))

    def forward_flops(self, num_positions: int) -> float:
        """Operations of the matrix products over this many positions; a multiply-add counts as two."""
        return 2.0 * num_positions * 2 * self.fc1.in_features * self.fc1.out_features


class MediaAttention(nn.Module):
    """Multi-head attention softmax(q kᵀ / sqrt(E)) v W_o of queries to a memory (arXiv:1706.03762, section 3.2).

    ``nn.MultiheadAttention`` is not used, because it reads the weight of its output layer without calling that layer.

    Args:
        width: W.
        memory_width: C.
        num_heads: H.
        head_width: E.
        bias: whether the four layers have biases.
        qk_norm: whether queries and keys pass a layer norm over each head, as in ViT-22B (arXiv:2302.05442).
    """

    def __init__(
        self, width: int, memory_width: int, *, num_heads: int, head_width: int, bias: bool, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.head_width = num_heads, head_width
        inner = num_heads * head_width
        self.q_proj = nn.Linear(width, inner, bias=bias)
        self.k_proj = nn.Linear(memory_width, inner, bias=bias)
        self.v_proj = nn.Linear(memory_width, inner, bias=bias)
        self.out_proj = nn.Linear(inner, width, bias=bias)
        self.q_norm = nn.LayerNorm(head_width) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_width) if qk_norm else nn.Identity()

    def forward(
        self, queries_NQW: torch.Tensor, memory_NLC: torch.Tensor, mask_NQL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend.

        Args:
            queries_NQW: [N, Q, W].
            memory_NLC: [N, L, C], both keys and values.
            mask_NQL: bool [N, Q, L] or [N, 1, L], False where a query may not attend; None where all may. A query that
                may attend to nothing gives zeros before the output layer.

        Returns:
            [N, Q, W].
        """
        visible_NQ1 = None
        if mask_NQL is not None:
            visible_NQ1 = mask_NQL.any(dim=-1, keepdim=True)
            mask_NQL = mask_NQL | ~visible_NQ1  # softmax over nothing would be NaN
        attended_NHQE = F.scaled_dot_product_attention(
            *self._queries_and_keys(queries_NQW, memory_NLC),
            self._split(self.v_proj(memory_NLC)),
            attn_mask=None if mask_NQL is None else mask_NQL[:, None],
        )
        attended = attended_NHQE.transpose(1, 2).flatten(2)
        if visible_NQ1 is not None:
            attended = attended * visible_NQ1.to(attended.dtype)
        return self.out_proj(attended)

    def shares(
        self, queries_NQW: torch.Tensor, memory_NLC: torch.Tensor, mask_NQL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The attention weights of ``forward``, the mean over heads.

        Returns:
            float32 [N, Q, L], sums to 1 over L; zeros where a query may attend to nothing.
        """
        q_NHQE, k_NHLE = self._queries_and_keys(queries_NQW, memory_NLC)
        scores_NHQL = (q_NHQE @ k_NHLE.transpose(2, 3)).float() * self.head_width**-0.5
        if mask_NQL is not None:
            scores_NHQL = scores_NHQL.masked_fill(~mask_NQL[:, None], float("-inf"))
        return scores_NHQL.softmax(dim=-1).nan_to_num(0.0).mean(dim=1)

    def forward_flops(self, num_queries: int, num_memory: int) -> float:
        """Operations of the matrix products for one row of a batch; a multiply-add counts as two."""
        inner = self.q_proj.out_features
        queries = 2 * num_queries * self.q_proj.in_features * inner  # query and output
        memory = 2 * num_memory * self.k_proj.in_features * inner  # keys and values
        return 2.0 * (queries + memory + 2 * num_queries * num_memory * inner)

    def _queries_and_keys(
        self, queries_NQW: torch.Tensor, memory_NLC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, H, Q, E] and [N, H, L, E]."""
        q_NHQE, k_NHLE = self._split(self.q_proj(queries_NQW)), self._split(self.k_proj(memory_NLC))
        return self.q_norm(q_NHQE), self.k_norm(k_NHLE)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """[N, L, H·E] to [N, H, L, E]."""
        return x.unflatten(-1, (self.num_heads, self.head_width)).transpose(1, 2)
