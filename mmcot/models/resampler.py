"""What a resampler from patch features to media tokens must offer, and its sizes; the kinds are in ``resampling.py``.

A new kind is a class, and an entry of ``RESAMPLERS``:

    class MeanPatch(Resampler):
        def __init__(self, shape):
            super().__init__(shape)
            self.project = nn.Linear(shape.vision_dim, shape.num_tokens * shape.width)

        def resample(self, x_NPV, mask_N1P):
            weights_N1P = torch.ones_like(x_NPV[:, None, :, 0]) if mask_N1P is None else mask_N1P.to(x_NPV.dtype)
            mean_NV = (weights_N1P @ x_NPV)[:, 0] / weights_N1P.sum(-1).clamp(min=1)
            return self.project(mean_NV).unflatten(-1, (self.shape.num_tokens, self.shape.width))

        def forward_flops(self, num_patches):
            return 2.0 * self.project.in_features * self.project.out_features

Shape suffixes: B questions, M pictures, N = B·M, P patches, V feature width, K media tokens, W their width.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from mmcot.errors import InputError
from mmcot.models.media_attention import ACTIVATIONS, FeedForward, MediaAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResamplerShape:
    """The sizes of a resampler; each kind uses those that it needs.

    Attributes:
        vision_dim: V, width of the features.
        width: W, of the media tokens and of all layers.
        num_tokens: K, media tokens a picture; ``linear`` has as many as patches.
        num_patches: the most patches that a picture has; only ``vit`` needs it, for its positions.
        depth: layers; linear layers in ``linear``; not used by ``mean`` and ``pool``.
        num_heads: of each attention.
        head_width: of each head; by default ``width / num_heads``.
        activation: in the feed-forward of ``perceiver``, ``qformer`` and ``vit``: ``gelu`` (BLIP-2, ViT, the ports
            of Flamingo), ``relu`` (IDEFICS) or ``squared_relu`` (Flamingo's paper). ``linear`` and ``mean`` have GELU.
        qk_norm: whether queries and keys of each attention pass a layer norm, as IDEFICS' do.
        input_scale: the features are divided by it. A layer norm makes the scale of the features irrelevant, but only
            ``perceiver`` starts with one. Features of the kind ``patch`` need 16, ``PATCH_SCALE`` of
            ``mmcot/vision/patches.py``; features of unit scale 1.

    Raises:
        InputError: a value is not usable.
    """

    vision_dim: int
    width: int
    num_tokens: int
    num_patches: int
    depth: int = 2
    num_heads: int = 4
    head_width: int | None = None
    activation: str = "gelu"
    qk_norm: bool = False
    input_scale: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not value > 0:
                raise InputError(f"{field.name} of a resampler is {value}; expected more than 0")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation {self.activation!r} is unknown; expected one of {', '.join(ACTIVATIONS)}")

    def attention(self, memory_width: int, *, bias: bool = True) -> MediaAttention:
        """An attention of these heads from W to a memory of this width.

        Raises:
            InputError: the width is not divisible by the number of heads, and no width of heads is given.
        """
        if self.head_width is None and self.width % self.num_heads:
            larger = (self.width // self.num_heads + 1) * self.num_heads
            raise InputError(f"width ({self.width}) must be a multiple of num_heads ({self.num_heads}); try {larger}")
        head_width = self.head_width or self.width // self.num_heads
        return MediaAttention(
            self.width,
            memory_width,
            num_heads=self.num_heads,
            head_width=head_width,
            bias=bias,
            qk_norm=self.qk_norm,
        )

    def feed_forward(self, *, bias: bool = True) -> FeedForward:
        """A feed-forward of this width and activation."""
        return FeedForward(self.width, activation=self.activation, bias=bias)


class Resampler(nn.Module):
    """What all kinds offer; a kind defines ``resample`` and ``forward_flops``.

    Linear layers and layer norms are initialised from outside, as ``init_bridge_part`` of ``mmcot/models/bridge.py``
    does; until then they have torch's defaults.
    """

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, vision_BMPV: torch.Tensor, mask_BMP: torch.Tensor | None = None) -> torch.Tensor:
        """Make the media tokens of each picture.

        Args:
            vision_BMPV: [B, M, P, V], of any floating type; computed in the type of the weights.
            mask_BMP: bool [B, M, P], False at absent patches; None where all are present.

        Returns:
            media [B, M, K, W]; K is ``num_tokens_of(P)``.
        """
        return self.resample(*self.rows(vision_BMPV, mask_BMP)).unflatten(0, vision_BMPV.shape[:2])

    def shares(self, vision_BMPV: torch.Tensor, mask_BMP: torch.Tensor | None = None) -> torch.Tensor | None:
        """How much each media token attends to each patch, in the last layer that reads the picture.

        The mean over heads. Where tokens attend to latents too, that part is left out, and what remains is divided
        by its sum. Arguments as for ``forward``.

        Returns:
            float32 [B, M, K, P], sums to 1 over the patches, or is 0 where all are absent; None: this kind has none.
        """
        shares_NKP = self.resample_shares(*self.rows(vision_BMPV, mask_BMP))
        return None if shares_NKP is None else shares_NKP.unflatten(0, vision_BMPV.shape[:2])

    def num_tokens_of(self, num_patches: int) -> int:
        """K, the media tokens of a picture with this many patches."""
        return self.shape.num_tokens

    def forward_flops(self, num_patches: int) -> float:
        """Operations of the matrix products of a forward pass for one picture; a multiply-add counts as two."""
        raise NotImplementedError(f"{type(self).__name__} must count its operations: define forward_flops")

    def resample(self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None) -> torch.Tensor:
        """Make the media tokens.

        Args:
            x_NPV: [N, P, V], divided by ``input_scale``, zeros at absent patches.
            mask_N1P: bool [N, 1, P], False at absent patches; None where all are present.

        Returns:
            media [N, K, W].
        """
        raise NotImplementedError(f"{type(self).__name__} has no resample; see {__name__}")

    def resample_shares(self, x_NPV: torch.Tensor, mask_N1P: torch.Tensor | None) -> torch.Tensor | None:
        """``shares`` as [N, K, P], for the arguments of ``resample``."""
        return None

    def rows(
        self, vision_BMPV: torch.Tensor, mask_BMP: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The pictures of all questions as rows of one batch: the arguments of ``resample``."""
        x_NPV = vision_BMPV.flatten(0, 1).to(next(self.parameters()).dtype) / self.shape.input_scale
        if mask_BMP is None:
            return x_NPV, None
        mask_N1P = mask_BMP.bool().flatten(0, 1)[:, None]
        return x_NPV.masked_fill(~mask_N1P.transpose(1, 2), 0.0), mask_N1P  # 0 times NaN would be NaN


def over_patches(shares_NKL: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Attention weights [N, K, P + latents] as shares of the patches alone, [N, K, P]; 0 where these have no weight."""
    shares_NKP = shares_NKL[..., :num_patches]
    return (shares_NKP / shares_NKP.sum(dim=-1, keepdim=True)).nan_to_num(0.0)
