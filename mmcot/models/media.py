"""Pictures as tokens of the source: a resampler's media take the place of placeholder embeddings (``inject: embed``).

    source   <image> <image> <image> <image> Question: ...   K placeholders a picture, made at encoding
    states   m_1     m_2     m_3     m_4     e(Question) e(:) ...   before the encoder's first layer

This is how Frozen (arXiv:2106.13884), BLIP-2 (arXiv:2301.12597), LLaVA and KOSMOS-1 (arXiv:2302.14045) give a language
model eyes; they differ in the resampler. The language model itself is not changed.

Shape suffixes: B batch, S source positions, M pictures, P patches of a picture, V feature width, K media tokens of a
picture, D model width.
"""

from __future__ import annotations

import torch

from mmcot.models.bridge import Bridge, Lengths
from mmcot.models.resampler import ResamplerShape
from mmcot.models.resampling import RESAMPLERS


class MediaTokens(Bridge):
    """Puts media in the place of placeholders.

    Args:
        resample: a name of ``RESAMPLERS``.
        shape: its sizes.
        num_pictures: M, pictures of a sample at most.
    """

    in_embeddings = True

    def __init__(self, *, resample: str, shape: ResamplerShape, num_pictures: int) -> None:
        super().__init__()
        self.resampler = RESAMPLERS[resample](shape)
        self.num_pictures = num_pictures

    def place(
        self,
        embeddings_BSD: torch.Tensor,
        is_placeholder_BS: torch.Tensor,
        vision_BPV: torch.Tensor,
        vision_mask_BP: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the embeddings [B, S, D] with media at the placeholders: the n-th of a row is its n-th medium.

        Args:
            is_placeholder_BS: bool [B, S]; at most M * K in a row.
            vision_BPV: [B, M * P, V], the pictures one behind the other.
            vision_mask_BP: bool [B, M * P], False at absent patches.
        """
        sizes = (self.num_pictures, vision_BPV.shape[1] // self.num_pictures)
        mask_BMP = None if vision_mask_BP is None else vision_mask_BP.unflatten(1, sizes)
        media_BMKD = self.resampler(vision_BPV.to(embeddings_BSD.dtype).unflatten(1, sizes), mask_BMP)
        media_BND = media_BMKD.flatten(1, 2).to(embeddings_BSD.dtype)
        number_BS = (is_placeholder_BS.cumsum(dim=1) - 1).clamp(0, media_BND.shape[1] - 1)
        placed_BSD = media_BND.gather(1, number_BS[..., None].expand(-1, -1, media_BND.shape[2]))
        return torch.where(is_placeholder_BS[..., None], placed_BSD, embeddings_BSD)

    def forward(
        self,
        text_BSD: torch.Tensor,
        text_mask_BS: torch.Tensor,
        vision_BPV: torch.Tensor,
        vision_mask_BP: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states as they are: the pictures are in them already."""
        return text_BSD, text_mask_BS

    def forward_flops(self, source_lengths: Lengths, num_patches: int) -> Lengths:
        """Operations of the resampler for all pictures; the placeholders count as tokens of the source."""
        return self.num_pictures * self.resampler.forward_flops(num_patches // self.num_pictures)
