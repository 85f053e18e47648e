"""BLIP-2's stage one around a T5 of stage two: its Q-Former is trained to match pictures and texts.

    model = T5ForImageTextMatching.start(shape, vision, pad_token_id=0, eos_token_id=1)
    model(vision_features=x_BPV, vision_mask=mask_BP, paired_labels=labels_BT)["contrastive"]

The T5 is carried along without a part in the losses, so that the saved folder is one from which a
``T5ForMultimodalGeneration`` starts; that class leaves the weights ``matching.*`` out.

Shape suffixes: B rows, T text positions, P patches, V feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from mmcot.errors import InputError
from mmcot.models.bridge_start import mark_bridge_parts
from mmcot.models.matching import ImageTextMatching
from mmcot.models.media import MediaTokens
from mmcot.models.qformer import QFormer
from mmcot.models.t5 import FusedEncoder, T5ForMultimodalGeneration
from mmcot.models.t5_config import MultimodalT5Config, resampler_shape


class T5ForImageTextMatching(T5ForMultimodalGeneration):
    """A fused T5 with the matching part beside it (arXiv:2301.12597, section 3.2).

    Raises:
        InputError: its pictures do not pass a Q-Former, or it has several.
    """

    def __init__(self, config: MultimodalT5Config) -> None:
        if (config.inject, config.resample, config.max_pictures) != ("embed", "qformer", 1):
            raise InputError(
                f"matching trains the Q-Former of one picture, and this model has inject {config.inject!r}, resample "
                f"{config.resample!r}, max_pictures {config.max_pictures}; expected embed, qformer and 1"
            )
        super().__init__(config)
        self.matching = ImageTextMatching(
            resampler_shape(config),
            vocab_size=config.vocab_size,
            max_text_tokens=config.max_text_tokens,
            projection_width=config.projection_width,
        )
        mark_bridge_parts(self.matching)
        self._is_observed, self._observed = False, []
        self.post_init()

    @property
    def new_parts(self) -> tuple[str, ...]:
        """See ``T5ForMultimodalGeneration.new_parts``; the matching part too."""
        return (*super().new_parts, "matching.")

    def forward(
        self,
        *arguments: Any,
        paired_labels: torch.Tensor | None = None,
        only_embeds: bool = False,
        **inputs: Any,
    ) -> Any:
        """Sum the losses of a block's pictures and texts; without ``paired_labels`` as the class above.

        Args:
            paired_labels: int64 [B, T], the texts as token ids, -100 behind their end.
            only_embeds: return the vectors that are compared, instead of losses.
            **inputs: ``vision_features`` [B, P, V] and ``vision_mask`` bool [B, P], False at absent patches.

        Returns:
            what ``ImageTextMatching.forward`` does, or the two tensors of its ``embed``.
        """
        if paired_labels is None:
            return super().forward(*arguments, **inputs)
        encoder = cast(FusedEncoder, self.encoder)
        qformer = cast(QFormer, cast(MediaTokens, encoder.fusion).resampler)
        mask_BP = inputs.get("vision_mask")
        rows = qformer.rows(inputs["vision_features"][:, None], None if mask_BP is None else mask_BP[:, None])
        if only_embeds:
            return self.matching.embed(qformer, *rows, paired_labels)
        found = self.matching(qformer, *rows, paired_labels)
        if self._is_observed:
            self._observed.append([found[name].detach() for name in ("temperature", "pairs", "without_negative")])
        return found

    def observe(self, inputs: Mapping[str, torch.Tensor] | None) -> None:
        """See ``Model.observe``."""
        super().observe(inputs)
        self._is_observed = inputs is not None

    def watch(self) -> dict[str, float]:
        """``temperature`` of the contrastive loss, and ``pairs_without_negative``, a share of pairs."""
        observed, self._observed = self._observed, []
        values = super().watch()
        if observed:
            pairs, lone = (float(sum(each[index] for each in observed)) for index in (1, 2))
            values |= {"temperature": float(observed[-1][0]), "pairs_without_negative": lone / max(1.0, pairs)}
        return values
