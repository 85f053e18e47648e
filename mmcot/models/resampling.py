"""Resamplers: from the patch features of a picture to the media tokens that a language model reads.

    shape = ResamplerShape(vision_dim=208, width=64, num_tokens=16, num_patches=64, depth=2, num_heads=4)
    resampler = RESAMPLERS["perceiver"](shape)
    media_BMKW = resampler(vision_BMPV, mask_BMP)   # M pictures a question, K tokens a picture

``mmcot/models/resampler.py`` says what a resampler must offer. Each picture is resampled by itself. Where the tokens
go in the language model is no concern of this module; if that has another width than ``width``, project them there.

| kind | source | K | patches meet |
|---|---|---|---|
| ``linear`` | LLaVA, arXiv:2304.08485 | P | not at all |
| ``mean`` | Frozen, arXiv:2106.13884 | K | in a sum |
| ``pool`` | KOSMOS-1, arXiv:2302.14045 | K | in one attention of K latents |
| ``perceiver`` | Flamingo, arXiv:2204.14198 | K | in ``depth`` attentions of K latents |
| ``qformer`` | BLIP-2, arXiv:2301.12597 | K | in an attention of K queries in every second of ``depth`` layers |
| ``vit`` | ViT, arXiv:2010.11929 | K | in ``depth`` layers of patches and K tokens |

Absent patches are never read. The media of a picture without any patch are finite: ``linear`` gives zeros, ``mean``
its last bias; ``pool``, ``perceiver`` and ``vit`` attend to their own latents alone; in ``qformer`` the attention to
the picture gives zeros before its output layer.

Shape suffixes: B questions, M pictures, N = B·M, P patches, V feature width, K media tokens, W their width.
"""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from mmcot.errors import InputError
from mmcot.models.media_attention import LearnedRows
from mmcot.models.qformer import QFormer
from mmcot.models.resampler import Resampler, ResamplerShape, over_patches

SUM_DIVISOR = 8.0  # of the sum over patches in ``mean``: the root of 64 patches keeps independent patches at their size
POSITION_STD = 0.02  # of positions and tokens of ``vit`` at the start, as in BERT and ViT


class LinearProjector(Resampler):
    """Each patch becomes a token by linear layers, ``depth`` of them with GELU between.

    One is LLaVA's H = W·Z (arXiv:2304.08485, equation 1), two are LLaVA-1.5's (arXiv:2310.03744). Tokens of absent
    patches are zeros.
    """

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__(shape)
        widths = [shape.vision_dim] + [shape.width] * shape.depth
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def resample(self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None) -> torch.Tensor:
        """Project; see ``Resampler.resample``."""
        x = x_NPV
        for index, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if index else x)
        return x if mask_N1P is None else x * mask_N1P.transpose(1, 2).to(x.dtype)

    def num_tokens_of(self, num_patches: int) -> int:
        """A token for each patch."""
        return num_patches

    def forward_flops(self, num_patches: int) -> float:
        """See ``Resampler.forward_flops``."""
        vision_dim, width = self.shape.vision_dim, self.shape.width
        return 2.0 * num_patches * (vision_dim * width + (self.shape.depth - 1) * width**2)


class MeanPrefix(Resampler):
    """Frozen's visual prefix (arXiv:2106.13884, "visual prefix"): one vector of the picture, reshaped into K tokens.

        h = sum over present patches of gelu(W_2 gelu(W_1 x)) / 8,    media = reshape(W_3 h)

    Differs from the reference: there the vector is the output of a trained ResNet. Here features are given, and a small
    network over patches is what can be trained. A sum and not a mean, so that the number of patches can be seen.
    """

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__(shape)
        self.fc1 = nn.Linear(shape.vision_dim, shape.width)
        self.fc2 = nn.Linear(shape.width, shape.width)
        self.prefix = nn.Linear(shape.width, shape.num_tokens * shape.width)

    def resample(self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None) -> torch.Tensor:
        """Sum and reshape; see ``Resampler.resample``."""
        h_NPW = F.gelu(self.fc2(F.gelu(self.fc1(x_NPV))))
        if mask_N1P is not None:
            h_NPW = h_NPW * mask_N1P.transpose(1, 2).to(h_NPW.dtype)
        return self.prefix(h_NPW.sum(dim=1) / SUM_DIVISOR).unflatten(-1, (self.shape.num_tokens, self.shape.width))

    def forward_flops(self, num_patches: int) -> float:
        """See ``Resampler.forward_flops``."""
        width = self.shape.width
        patches = num_patches * (self.shape.vision_dim + width) * width
        return 2.0 * (patches + self.shape.num_tokens * width**2)


class Pool(Resampler):
    """KOSMOS-1's resampler (arXiv:2302.14045, its "attentive pooling"): latents attend once to [W x; latents].

    Equations as in KOSMOS-2's published code; there is neither a norm nor a residual.
    """

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__(shape)
        self.dense = nn.Linear(shape.vision_dim, shape.width)
        self.latents = LearnedRows(shape.num_tokens, shape.width, std=1.0)
        self.attention = shape.attention(shape.width)

    def resample(self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None) -> torch.Tensor:
        """Attend once; see ``Resampler.resample``."""
        return self.attention(*self._attended(x_NPV, mask_N1P))

    def resample_shares(self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None) -> torch.Tensor:
        """See ``Resampler.shares``."""
        return over_patches(self.attention.shares(*self._attended(x_NPV, mask_N1P)), x_NPV.shape[1])

    def forward_flops(self, num_patches: int) -> float:
        """See ``Resampler.forward_flops``."""
        num_tokens = self.shape.num_tokens
        dense = 2.0 * num_patches * self.shape.vision_dim * self.shape.width
        return dense + self.attention.forward_flops(num_tokens, num_patches + num_tokens)

    def _attended(
        self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Queries, memory and mask of the attention."""
        latents_NKW = self.latents(self.shape.num_tokens).expand(len(x_NPV), -1, -1)
        memory = torch.cat([self.dense(x_NPV), latents_NKW], dim=1)
        return latents_NKW, memory, _with_latents(mask_N1P, self.shape.num_tokens)


class PerceiverBlock(nn.Module):
    """A layer of Flamingo's resampler; all parameters but those of the norms are matrices without biases.

        q = LN(lat) W_q;   k, v = [LN(x); LN(lat)] W_k, W_v
        lat += softmax(q kᵀ / sqrt(E)) v W_o
        lat += W_2 act(W_1 LN(lat))

    Equations as in the published ports of Flamingo, whose norms have biases too.
    """

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__()
        self.picture_norm = nn.LayerNorm(shape.width)
        self.latents_norm = nn.LayerNorm(shape.width)
        self.attention = shape.attention(shape.width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(shape.width)
        self.feed_forward = shape.feed_forward(bias=False)

    def forward(self, latents_NKW: torch.Tensor, x_NPW: torch.Tensor, mask_NQL: torch.Tensor | None) -> torch.Tensor:
        """Latents [N, K, W] after the layer; the mask is bool [N, 1, P + K]."""
        latents_NKW = latents_NKW + self.attention(*self._attended(latents_NKW, x_NPW), mask_NQL)
        return latents_NKW + self.feed_forward(self.feed_forward_norm(latents_NKW))

    def shares(self, latents_NKW: torch.Tensor, x_NPW: torch.Tensor, mask_NQL: torch.Tensor | None) -> torch.Tensor:
        """Attention weights [N, K, P + K] of ``forward``."""
        return self.attention.shares(*self._attended(latents_NKW, x_NPW), mask_NQL)

    def _attended(self, latents_NKW: torch.Tensor, x_NPW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents_NKW = self.latents_norm(latents_NKW)
        return latents_NKW, torch.cat([self.picture_norm(x_NPW), latents_NKW], dim=1)


class Perceiver(Resampler):
    """Flamingo's resampler (arXiv:2204.14198, section 2.1 and figure 5): ``depth`` layers, then a layer norm.

    Differs from the reference: no time embeddings, because there are no videos. Features of another width than the
    latents pass a linear layer without bias first; in the reference both have the same width.
    """

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__(shape)
        same = shape.vision_dim == shape.width
        self.project = nn.Identity() if same else nn.Linear(shape.vision_dim, shape.width, bias=False)
        self.latents = LearnedRows(shape.num_tokens, shape.width, std=1.0)
        self.blocks = nn.ModuleList(PerceiverBlock(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)

    def resample(self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None) -> torch.Tensor:
        """Run all layers; see ``Resampler.resample``."""
        return self.norm(self._run(x_NPV, mask_N1P, self.shape.depth)[0])

    def resample_shares(self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None) -> torch.Tensor:
        """Those of the last layer; see ``Resampler.shares``."""
        before_last = self._run(x_NPV, mask_N1P, self.shape.depth - 1)
        return over_patches(cast(PerceiverBlock, self.blocks[-1]).shares(*before_last), x_NPV.shape[1])

    def forward_flops(self, num_patches: int) -> float:
        """See ``Resampler.forward_flops``."""
        num_tokens, vision_dim, width = self.shape.num_tokens, self.shape.vision_dim, self.shape.width
        project = 0.0 if vision_dim == width else 2.0 * num_patches * vision_dim * width
        block = cast(PerceiverBlock, self.blocks[0])
        attention = block.attention.forward_flops(num_tokens, num_patches + num_tokens)
        return project + self.shape.depth * (attention + block.feed_forward.forward_flops(num_tokens))

    def _run(
        self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None, num_blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Latents after the first blocks, and the features and the mask that the next one reads."""
        x_NPW, mask_NQL = self.project(x_NPV), _with_latents(mask_N1P, self.shape.num_tokens)
        latents_NKW = self.latents(self.shape.num_tokens).expand(len(x_NPV), -1, -1)
        for block in self.blocks[:num_blocks]:
            latents_NKW = block(latents_NKW, x_NPW, mask_NQL)
        return latents_NKW, x_NPW, mask_NQL


class VitBlock(nn.Module):
    """A pre-LN transformer layer: s += Attention(LN(s)); s += W_2 act(W_1 LN(s)) (arXiv:2010.11929, equations 2, 3)."""

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width)
        self.attention = shape.attention(shape.width)
        self.feed_forward_norm = nn.LayerNorm(shape.width)
        self.feed_forward = shape.feed_forward()

    def forward(self, states_NLW: torch.Tensor, mask_N1L: torch.Tensor | None) -> torch.Tensor:
        """States [N, L, W] after the layer; the mask is bool [N, 1, L]."""
        normed_NLW = self.attention_norm(states_NLW)
        states_NLW = states_NLW + self.attention(normed_NLW, normed_NLW, mask_N1L)
        return states_NLW + self.feed_forward(self.feed_forward_norm(states_NLW))


class Vit(Resampler):
    """A small vision transformer (arXiv:2010.11929, section 3.1) with K tokens in the place of its class token.

        states = [W x + positions; tokens];   ``depth`` layers;   media = LN(states of the tokens)

    For features of the kind ``patch``, the pixels of the picture: an image encoder that is trained with the rest.
    Tokens stand behind the patches, so that the order of tokens and patches is that of ``pool`` and ``perceiver``.
    """

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__(shape)
        self.dense = nn.Linear(shape.vision_dim, shape.width)
        self.positions = LearnedRows(shape.num_patches, shape.width, std=POSITION_STD)
        self.tokens = LearnedRows(shape.num_tokens, shape.width, std=POSITION_STD)
        self.blocks = nn.ModuleList(VitBlock(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)

    def resample(self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None) -> torch.Tensor:
        """Run all layers; see ``Resampler.resample``.

        Raises:
            InputError: there are more patches than positions.
        """
        num_patches, num_tokens = x_NPV.shape[1], self.shape.num_tokens
        if num_patches > self.shape.num_patches:
            raise InputError(
                f"a picture has {num_patches} patches, this resampler has positions for {self.shape.num_patches}; "
                "use the features it was trained on, or set num_patches"
            )
        patches_NPW = self.dense(x_NPV) + self.positions(num_patches)
        tokens_NKW = self.tokens(num_tokens).expand(len(x_NPV), -1, -1)
        states_NLW, mask_N1L = torch.cat([patches_NPW, tokens_NKW], dim=1), _with_latents(mask_N1P, num_tokens)
        for block in self.blocks:
            states_NLW = block(states_NLW, mask_N1L)
        return self.norm(states_NLW[:, num_patches:])

    def forward_flops(self, num_patches: int) -> float:
        """See ``Resampler.forward_flops``."""
        length, block = num_patches + self.shape.num_tokens, cast(VitBlock, self.blocks[0])
        dense = 2.0 * num_patches * self.shape.vision_dim * self.shape.width
        layer = block.attention.forward_flops(length, length) + block.feed_forward.forward_flops(length)
        return dense + self.shape.depth * layer


def _with_latents(mask_N1P: torch.Tensor | None, num_latents: int) -> torch.Tensor | None:
    """The mask with this many latents behind the patches, which are always attended, [N, 1, P + K]."""
    return None if mask_N1P is None else F.pad(mask_N1P, (0, num_latents), value=True)


RESAMPLERS: dict[str, type[Resampler]] = {
    "linear": LinearProjector,
    "mean": MeanPrefix,
    "pool": Pool,
    "perceiver": Perceiver,
    "qformer": QFormer,
    "vit": Vit,
}
