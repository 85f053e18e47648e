"""Pictures as media tokens, made by a resampler: where a language model reads them.

``MediaTokens`` (``inject: embed``) puts media in the place of placeholder embeddings:

    source   <image> <image> <image> <image> Question: ...   K placeholders a picture, made at encoding
    states   m_1     m_2     m_3     m_4     e(Question) e(:) ...   before the encoder's first layer

This is how Frozen (arXiv:2106.13884), BLIP-2 (arXiv:2301.12597), LLaVA and KOSMOS-1 (arXiv:2302.14045) give a language
model eyes; they differ in the resampler. The language model itself is not changed.

``MediaLayers`` (``inject: layers``) puts them behind the encoder's states, from where the decoder's gated
cross-attention reads them (``mmcot/models/gated_t5.py``), as in Flamingo (arXiv:2204.14198):

    states   h(Question) h(:) ... h(</s>) m_1 m_2 m_3 m_4

Media of absent patches are not read, whatever ``mask_absent_patches`` says of the fusion.

Shape suffixes: B batch, S source positions, M pictures, P patches of a picture, V feature width, K media tokens of a
picture, W width of the resampler, D model width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from mmcot.models.bridge import AttentionMaps, Bridge, Length, Lengths
from mmcot.models.resampler import ResamplerShape
from mmcot.models.resampling import RESAMPLERS


class MediaBridge(Bridge):
    """A bridge that makes media.

    Args:
        resample: a name of ``RESAMPLERS``.
        shape: its sizes.
        num_pictures: M, pictures of a sample at most.
        project_to: D, if media pass a linear layer from W to D, as BLIP-2's language projection; None: W is D.
    """

    def __init__(
        self, *, resample: str, shape: ResamplerShape, num_pictures: int, project_to: int | None = None
    ) -> None:
        super().__init__()
        self.resampler = RESAMPLERS[resample](shape)
        self.project = nn.Identity() if project_to is None else nn.Linear(shape.width, project_to)
        self.num_pictures = num_pictures

    def media(self, vision_BPV: torch.Tensor, vision_mask_BP: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The media of a batch, [B, M * K, D]; arguments as for ``forward``."""
        media_BMKW = self.resampler(*self._by_picture(vision_BPV.to(dtype), vision_mask_BP))
        return self.project(media_BMKW).flatten(1, 2).to(dtype)

    def media_maps(self, vision_BPV: torch.Tensor, vision_mask_BP: torch.Tensor | None) -> AttentionMaps | None:
        """Attention of each media token to the patches of its picture; None where the resampler has none."""
        shares_BMKP = self.resampler.shares(*self._by_picture(vision_BPV, vision_mask_BP))
        if shares_BMKP is None:
            return None
        own_MM = torch.eye(self.num_pictures, device=vision_BPV.device)
        shares_BMKMP = shares_BMKP[:, :, :, None] * own_MM[None, :, None, :, None]
        return AttentionMaps(shares_BMKMP.flatten(3, 4).flatten(1, 2), of_media=True)

    def _by_picture(
        self, vision_BPV: torch.Tensor, vision_mask_BP: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Patches [B, M, P, V] and their mask [B, M, P]."""
        sizes = (self.num_pictures, vision_BPV.shape[1] // self.num_pictures)
        mask_BMP = None if vision_mask_BP is None else vision_mask_BP.unflatten(1, sizes)
        return vision_BPV.unflatten(1, sizes), mask_BMP

    def forward_flops(self, source_lengths: Lengths, num_patches: int) -> Lengths:
        """Operations of resampler and projection for all pictures."""
        patches, project = num_patches // self.num_pictures, 0.0
        if isinstance(self.project, nn.Linear):
            project = 2.0 * self.resampler.num_tokens_of(patches) * self.project.in_features * self.project.out_features
        return self.num_pictures * (self.resampler.forward_flops(patches) + project)


class MediaTokens(MediaBridge):
    """Puts media in the place of placeholders; these count as tokens of the source."""

    in_embeddings = True

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
        media_BND = self.media(vision_BPV, vision_mask_BP, embeddings_BSD.dtype)
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


class MediaLayers(MediaBridge):
    """Puts media behind the encoder's states."""

    in_layers = True

    @property
    def num_media(self) -> int:
        """N, media tokens of a sample."""
        return self.num_pictures * self.resampler.shape.num_tokens

    def forward(
        self,
        text_BSD: torch.Tensor,
        text_mask_BS: torch.Tensor,
        vision_BPV: torch.Tensor | None,
        vision_mask_BP: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states [B, S + N, D] and their mask; media of absent pictures are masked, all without features."""
        if vision_BPV is None:
            media_BND = text_BSD.new_zeros(len(text_BSD), self.num_media, text_BSD.shape[2])
            return torch.cat([text_BSD, media_BND], dim=1), F.pad(text_mask_BS, (0, self.num_media))
        media_BND = self.media(vision_BPV, vision_mask_BP, text_BSD.dtype)
        if media_BND.shape[1] == 1:  # of one pooled vector; attention to it equals attention to any number of copies
            media_BND = media_BND.expand(-1, self.num_media, -1)
        if vision_mask_BP is None:
            mask_BN = text_mask_BS.new_ones(media_BND.shape[:2])
        else:
            is_there_BM = vision_mask_BP.unflatten(1, (self.num_pictures, -1)).any(dim=2)
            mask_BN = is_there_BM.repeat_interleave(self.num_media // self.num_pictures, dim=1).to(text_mask_BS.dtype)
        return torch.cat([text_BSD, media_BND], dim=1), torch.cat([text_mask_BS, mask_BN], dim=1)

    def num_states(self, num_tokens: Length, num_patches: int) -> Length:
        """Those of the text and the media."""
        return num_tokens + self.num_media
