"""From the patches of a picture to media tokens of a language model's width, a small module per kind.

    resampler = RESAMPLERS["perceiver"](ResamplerShape(vision_dim=208, width=64, num_patches=64, num_tokens=16))
    resampler(vision_BMPV, mask_BMP)          # media [B, M, K, D]

A picture is resampled by itself: others of its question change nothing. A picture of which every patch is masked gives
finite media that do not depend on its features.

Shape suffixes: B batch, M pictures, P patches, V feature width, K media tokens, D width, N = B * M pictures.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the usual name)
from transformers import initialization as init

_FEATURE_SCALE = 16.0  # of pixels as features (mmcot/vision/patches.py); divided where no layer norm follows


@dataclasses.dataclass(frozen=True)
class ResamplerShape:
    """The sizes of a resampler; each kind takes what it needs."""

    vision_dim: int
    width: int
    num_patches: int
    num_tokens: int = 16
    depth: int = 2
    num_heads: int = 4


class Resampler(nn.Module):
    """The base of all kinds."""

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, vision_BMPV: torch.Tensor, mask_BMP: torch.Tensor | None = None) -> torch.Tensor:
        """Resample every picture.

        Args:
            vision_BMPV: [B, M, P, V].
            mask_BMP: bool [B, M, P], False at absent patches; None where all are there.

        Returns:
            [B, M, K, D].
        """
        mask_NP, sizes = None, vision_BMPV.shape[:2]
        if mask_BMP is not None:
            mask_NP = mask_BMP.flatten(0, 1)
            vision_BMPV = vision_BMPV * mask_BMP[..., None].to(vision_BMPV.dtype)
        return self.resample(vision_BMPV.flatten(0, 1), mask_NP).unflatten(0, sizes)

    def resample(self, vision_NPV: torch.Tensor, mask_NP: torch.Tensor | None) -> torch.Tensor:
        """Resample pictures [N, P, V], zeros at masked patches, into [N, K, D]."""
        raise NotImplementedError

    def forward_flops(self, num_patches: int) -> float:
        """Operations of the matrix products for one picture; a multiply-add counts as two."""
        raise NotImplementedError


class LinearResampler(Resampler):
    """A token for each patch: the projector of LLaVA (arXiv:2304.08485, section 4.1)."""

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__(shape)
        self.project = nn.Linear(shape.vision_dim, shape.width)

    def resample(self, vision_NPV: torch.Tensor, mask_NP: torch.Tensor | None) -> torch.Tensor:
        """Project every patch."""
        return self.project(vision_NPV / _FEATURE_SCALE)

    def forward_flops(self, num_patches: int) -> float:
        """See ``Resampler.forward_flops``."""
        return 2.0 * num_patches * self.shape.vision_dim * self.shape.width


class MeanResampler(Resampler):
    """K tokens of one vector: the visual prefix of Frozen (arXiv:2106.13884, section 3.1).

    Differs from the paper: its vision encoder is a ResNet over pixels; here a network of two layers over patches, whose
    sum over the patches is mapped to K tokens.
    """

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__(shape)
        inner = 4 * shape.width
        self.read = nn.Sequential(nn.Linear(shape.vision_dim, inner), nn.GELU(), nn.Linear(inner, inner), nn.GELU())
        self.write = nn.Linear(inner, shape.num_tokens * shape.width)

    def resample(self, vision_NPV: torch.Tensor, mask_NP: torch.Tensor | None) -> torch.Tensor:
        """Sum the patches that are there, over the square root of their number, and map the sum to tokens."""
        states_NPI = self.read(vision_NPV / _FEATURE_SCALE)
        if mask_NP is not None:
            states_NPI = states_NPI * mask_NP[..., None].to(states_NPI.dtype)
        return self.write(states_NPI.sum(dim=1) / 8).unflatten(1, (self.shape.num_tokens, self.shape.width))

    def forward_flops(self, num_patches: int) -> float:
        """See ``Resampler.forward_flops``."""
        inner, shape = 4 * self.shape.width, self.shape
        return 2.0 * (num_patches * inner * (shape.vision_dim + inner) + inner * shape.num_tokens * shape.width)


class Latents(nn.Module):
    """K learned vectors [K, D]."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw them anew."""
        init.normal_(self.weight, mean=0.0, std=1.0)

    def forward(self, num_pictures: int) -> torch.Tensor:
        """The vectors for each picture, [N, K, D]."""
        return self.weight.expand(num_pictures, -1, -1)


class PerceiverLayer(nn.Module):
    """Latents attend to patches and to themselves, then a feed-forward network (arXiv:2204.14198, appendix A.1.1)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_patches, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(
        self, latents_NKD: torch.Tensor, patches_NPD: torch.Tensor, mask_NP: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the latents [N, K, D] after the layer."""
        normed_NKD = self.norm_latents(latents_NKD)
        read_NSD = torch.cat([self.norm_patches(patches_NPD), normed_NKD], dim=1)
        keys_NSD, values_NSD = self.key_value(read_NSD).chunk(2, dim=-1)
        mask_N11S = None
        if mask_NP is not None:
            may_read = torch.cat([mask_NP, mask_NP.new_ones(latents_NKD.shape[:2])], dim=1)
            mask_N11S = may_read[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            self._heads(self.query(normed_NKD)), self._heads(keys_NSD), self._heads(values_NSD), attn_mask=mask_N11S
        )
        latents_NKD = latents_NKD + self.out(attended.transpose(1, 2).flatten(2))
        return latents_NKD + self.feed_forward(latents_NKD)

    def _heads(self, states_NSD: torch.Tensor) -> torch.Tensor:
        return states_NSD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class PerceiverResampler(Resampler):
    """K tokens that read the patches in several layers: Flamingo's resampler (arXiv:2204.14198, section 3.1.1)."""

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__(shape)
        self.project = nn.Linear(shape.vision_dim, shape.width)
        self.latents = Latents(shape.num_tokens, shape.width)
        self.layers = nn.ModuleList(PerceiverLayer(shape.width, shape.num_heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)

    def resample(self, vision_NPV: torch.Tensor, mask_NP: torch.Tensor | None) -> torch.Tensor:
        """Let the latents read the patches."""
        patches_NPD = self.project(vision_NPV)
        latents_NKD = self.latents(len(patches_NPD))
        for layer in self.layers:
            latents_NKD = layer(latents_NKD, patches_NPD, mask_NP)
        return self.norm(latents_NKD)

    def forward_flops(self, num_patches: int) -> float:
        """See ``Resampler.forward_flops``."""
        width, tokens = self.shape.width, self.shape.num_tokens
        read = num_patches + tokens
        layer = (
            tokens * 2 * width * width + read * 2 * width * width + 2 * tokens * read * width + tokens * 8 * width**2
        )
        return 2.0 * (num_patches * self.shape.vision_dim * width + self.shape.depth * layer)


RESAMPLERS: dict[str, type[Resampler]] = {
    "linear": LinearResampler,
    "mean": MeanResampler,
    "perceiver": PerceiverResampler,
}
