"""BLIP-2's Q-Former (arXiv:2301.12597, section 3.1), its queries alone.

A text joins from outside (``mmcot/models/matching.py``): queries and text meet in ``attend``, whose mask says who sees
whom; then the queries go through ``read`` and ``transform``, and the text through its own feed-forward.

Shape suffixes: N pictures, P patches, V feature width, K queries, S queries and text, W width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from mmcot.models.media_attention import LearnedRows
from mmcot.models.resampler import Resampler, ResamplerShape, over_patches

CROSS_EVERY = 2  # layers; the first, third and so on read the picture
NORM_EPS = 1e-12  # of BERT's layer norms
QUERY_STD = 0.02  # of the queries at the start, as BERT's embeddings


class QFormerBlock(nn.Module):
    """A post-LN BERT layer (arXiv:1810.04805) that can read the picture.

        q = LN(q + Attention(q, q));   q = LN(q + Attention(q, x));   q = LN(q + W_2 act(W_1 q))

    Args:
        reads_picture: whether the second of these, the attention to the picture x, is in this layer.
    """

    def __init__(self, shape: ResamplerShape, *, reads_picture: bool) -> None:
        super().__init__()
        self.attention = shape.attention(shape.width)
        self.attention_norm = nn.LayerNorm(shape.width, eps=NORM_EPS)
        self.picture_attention = shape.attention(shape.vision_dim) if reads_picture else None
        self.picture_norm = nn.LayerNorm(shape.width, eps=NORM_EPS) if reads_picture else None
        self.feed_forward = shape.feed_forward()
        self.feed_forward_norm = nn.LayerNorm(shape.width, eps=NORM_EPS)

    def forward(self, queries_NKW: torch.Tensor, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None) -> torch.Tensor:
        """Queries [N, K, W] after the layer; the mask is that of the patches."""
        return self.transform(self.read(self.attend(queries_NKW), x_NPV, mask_N1P))

    def attend(self, states_NSW: torch.Tensor, mask_NSS: torch.Tensor | None = None) -> torch.Tensor:
        """Self-attention; the mask is bool [N, S, S] or [N, 1, S], False where a state may not attend."""
        return self.attention_norm(states_NSW + self.attention(states_NSW, states_NSW, mask_NSS))

    def read(self, queries_NKW: torch.Tensor, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None) -> torch.Tensor:
        """Attention of the queries to the picture; the queries themselves in a layer that does not read it."""
        if self.picture_attention is None or self.picture_norm is None:
            return queries_NKW
        return self.picture_norm(queries_NKW + self.picture_attention(queries_NKW, x_NPV, mask_N1P))

    def transform(self, queries_NKW: torch.Tensor) -> torch.Tensor:
        """The feed-forward of the queries."""
        return self.feed_forward_norm(queries_NKW + self.feed_forward(queries_NKW))

    def forward_flops(self, num_queries: int, num_patches: int) -> float:
        """Operations of the matrix products for one picture; a multiply-add counts as two."""
        picture = self.picture_attention.forward_flops(num_queries, num_patches) if self.picture_attention else 0.0
        own = self.attention.forward_flops(num_queries, num_queries)
        return own + picture + self.feed_forward.forward_flops(num_queries)


class QFormer(Resampler):
    """K queries that read the picture in every second of ``depth`` BERT layers; media are their last states.

    Differs from the reference: no dropout. The linear layer to the language model's width is not part of it.
    """

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__(shape)
        self.queries = LearnedRows(shape.num_tokens, shape.width, std=QUERY_STD)
        self.norm = nn.LayerNorm(shape.width, eps=NORM_EPS)
        self.blocks = nn.ModuleList(
            QFormerBlock(shape, reads_picture=index % CROSS_EVERY == 0) for index in range(shape.depth)
        )

    def resample(self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None) -> torch.Tensor:
        """Run all layers; see ``Resampler.resample``."""
        return self._run(x_NPV, mask_N1P, self.shape.depth)

    def resample_shares(self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None) -> torch.Tensor:
        """Those of the last layer that reads the picture; see ``Resampler.shares``."""
        last = (self.shape.depth - 1) // CROSS_EVERY * CROSS_EVERY
        block = cast(QFormerBlock, self.blocks[last])
        assert block.picture_attention is not None
        queries_NKW = block.attend(self._run(x_NPV, mask_N1P, last))
        return over_patches(block.picture_attention.shares(queries_NKW, x_NPV, mask_N1P), x_NPV.shape[1])

    def forward_flops(self, num_patches: int) -> float:
        """See ``Resampler.forward_flops``."""
        blocks = [cast(QFormerBlock, block) for block in self.blocks]
        return sum(block.forward_flops(self.shape.num_tokens, num_patches) for block in blocks)

    def _run(self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None, num_blocks: int) -> torch.Tensor:
        """Queries [N, K, W] after the first blocks."""
        queries_NKW = self.norm(self.queries(self.shape.num_tokens)).expand(len(x_NPV), -1, -1)
        for block in self.blocks[:num_blocks]:
            queries_NKW = block(queries_NKW, x_NPV, mask_N1P)
        return queries_NKW
