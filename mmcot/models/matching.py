"""The matching part of BLIP-2's stage one (arXiv:2301.12597, section 3): texts that meet the queries of a Q-Former.

    matching = ImageTextMatching(shape, vocab_size=2000, max_text_tokens=32, projection_width=32)
    matching(qformer, x_NPV, mask_N1P, labels_BT)    # {"contrastive": sum, "matching": sum, "generation": sum}

It exists while a Q-Former is trained to find what a text says of a picture, and is dropped afterwards; the Q-Former is
not part of it. A row's text is its target. All parameters belong to small modules that are called, as ZeRO-3 needs.

Shape suffixes: B rows, K queries, T text positions, S = K + T, P patches, V feature width, W width, E width of the
projections.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the usual name)
from transformers import initialization as init

from mmcot.models.loss import rows_with_text, token_loss_sum
from mmcot.models.matching_losses import (
    apart_mask,
    causal_mask,
    contrastive_loss_sum,
    draw_negatives,
    equal_texts,
    matching_loss_sum,
    similarities,
    together_mask,
)
from mmcot.models.media_attention import LearnedRows
from mmcot.models.qformer import NORM_EPS, QUERY_STD, QFormer, QFormerBlock
from mmcot.models.resampler import ResamplerShape
from mmcot.texts.encoding import IGNORED_LABEL

MATCH, GENERATE = 0, 1  # the learned starts of a text, in the place of BERT's [CLS] and of [DEC]
TEMPERATURE_START, TEMPERATURE_LEAST = 0.07, 0.01


class WordEmbedding(nn.Embedding):
    """Word vectors that start as BERT's."""

    def reset_parameters(self) -> None:
        """Start from normal noise; the weight's shape is not read."""
        init.normal_(self.weight, mean=0.0, std=QUERY_STD)


class Temperature(nn.Module):
    """A learned temperature, at least ``TEMPERATURE_LEAST``.

    Differs from the reference: its logarithm is learned, as in CLIP (arXiv:2103.00020), so that a step of the optimizer
    is a share of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from ``TEMPERATURE_START``."""
        init.constant_(self.log, math.log(TEMPERATURE_START))

    def forward(self) -> torch.Tensor:
        """The temperature, float32 [1]."""
        return self.log.float().exp().clamp(min=TEMPERATURE_LEAST)


class TextLayer(nn.Module):
    """The feed-forward of the text beside that of the queries in a ``QFormerBlock``: t = LN(t + W_2 act(W_1 t))."""

    def __init__(self, shape: ResamplerShape) -> None:
        super().__init__()
        self.feed_forward = shape.feed_forward()
        self.feed_forward_norm = nn.LayerNorm(shape.width, eps=NORM_EPS)

    def forward(self, text_BTW: torch.Tensor) -> torch.Tensor:
        """Transform each position, [B, T, W]."""
        return self.feed_forward_norm(text_BTW + self.feed_forward(text_BTW))


class TextSide(nn.Module):
    """What a text has of its own in a Q-Former: embeddings, and a feed-forward in every layer.

    Queries and text share the first layer norm and the self-attention, which are the Q-Former's.

    Args:
        shape: that of the Q-Former.
        max_text_tokens: of a text, without its start.
    """

    def __init__(self, shape: ResamplerShape, *, vocab_size: int, max_text_tokens: int) -> None:
        super().__init__()
        self.words = WordEmbedding(vocab_size, shape.width)
        self.positions = LearnedRows(max_text_tokens + 1, shape.width, std=QUERY_STD)
        self.starts = LearnedRows(2, shape.width, std=QUERY_STD)
        self.layers = nn.ModuleList(TextLayer(shape) for _ in range(shape.depth))

    def embed(self, ids_BT: torch.Tensor, start: int) -> torch.Tensor:
        """Embeddings of a start, ``MATCH`` or ``GENERATE``, and the words behind it, [B, 1 + T, W]."""
        words_BTW = self.words(ids_BT)
        start_B1W = self.starts(2)[start].expand(len(ids_BT), 1, -1)
        return torch.cat([start_B1W, words_BTW], dim=1) + self.positions(ids_BT.shape[1] + 1)

    def forward(
        self,
        qformer: QFormer,
        x_BPV: torch.Tensor,
        patches_B1P: torch.Tensor | None,
        text_BTW: torch.Tensor,
        mask_BSS: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run queries and text through all layers.

        Args:
            x_BPV: patches, as ``Resampler.rows`` makes them, with their mask bool [B, 1, P].
            text_BTW: of ``embed``.
            mask_BSS: bool, which state may attend to which, queries first.

        Returns:
            queries [B, K, W] and text [B, T, W].
        """
        num_queries = qformer.shape.num_tokens
        queries_BKW = qformer.queries(num_queries).expand(len(x_BPV), -1, -1)
        states_BSW = qformer.norm(torch.cat([queries_BKW, text_BTW], dim=1))
        for block, layer in zip(qformer.blocks, self.layers, strict=True):
            block = cast(QFormerBlock, block)
            states_BSW = block.attend(states_BSW, mask_BSS)
            queries_BKW = block.transform(block.read(states_BSW[:, :num_queries], x_BPV, patches_B1P))
            states_BSW = torch.cat([queries_BKW, layer(states_BSW[:, num_queries:])], dim=1)
        return states_BSW[:, :num_queries], states_BSW[:, num_queries:]


class ImageTextMatching(nn.Module):
    """Contrastive, matching and generation losses of pictures and texts through one Q-Former.

    Differs from the reference: the head of words has weights of its own and no layer before it; equal texts are
    positives, and negatives are those of the block; no dropout.

    Args:
        shape: that of the Q-Former.
        vocab_size: words of the tokenizer.
        max_text_tokens: of a text.
        projection_width: E, of the space in which pictures and texts are compared; 256 in BLIP-2.
    """

    def __init__(self, shape: ResamplerShape, *, vocab_size: int, max_text_tokens: int, projection_width: int) -> None:
        super().__init__()
        self.text = TextSide(shape, vocab_size=vocab_size, max_text_tokens=max_text_tokens)
        self.picture_projection = nn.Linear(shape.width, projection_width)
        self.text_projection = nn.Linear(shape.width, projection_width)
        self.temperature = Temperature()
        self.match_head = nn.Linear(shape.width, 2)
        self.word_head = nn.Linear(shape.width, vocab_size)

    def forward(
        self, qformer: QFormer, x_BPV: torch.Tensor, patches_B1P: torch.Tensor | None, labels_BT: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Sum the losses over the pairs of a block, that of generation over their tokens.

        Negatives are drawn with torch's generator in training; otherwise they depend on the block alone.

        Args:
            x_BPV: patches, as ``Resampler.rows`` makes them, with their mask bool [B, 1, P].
            labels_BT: int64, the texts as token ids, -100 behind their end.

        Returns:
            float32 scalars ``contrastive``, ``matching`` and ``generation``; beside them, without a gradient,
            ``temperature``, and ``pairs`` and ``without_negative``, the numbers of pairs, and of those for which the
            block has no negative.
        """
        is_pair_B = rows_with_text(labels_BT)
        if patches_B1P is not None:
            is_pair_B = is_pair_B & patches_B1P.any(dim=-1)[:, 0]
        pictures_BKE, texts_BE = self.embed(qformer, x_BPV, patches_B1P, labels_BT)
        temperature = self.temperature()
        scores_BB, equal_BB = similarities(pictures_BKE, texts_BE) / temperature, equal_texts(labels_BT)
        generator = None if self.training else torch.Generator(labels_BT.device).manual_seed(0)
        *negatives, has_negative_B = draw_negatives(scores_BB, equal_BB, is_pair_B, generator=generator)
        logits_R2 = self._match(qformer, x_BPV, patches_B1P, labels_BT, *negatives)
        return {
            "contrastive": contrastive_loss_sum(scores_BB, equal_BB, is_pair_B),
            "matching": matching_loss_sum(logits_R2, is_pair_B, has_negative_B),
            "generation": self._generation_loss(qformer, x_BPV, patches_B1P, labels_BT, is_pair_B),
            "temperature": temperature.detach(),
            "pairs": is_pair_B.sum(),
            "without_negative": (is_pair_B & ~has_negative_B).sum(),
        }

    def embed(
        self, qformer: QFormer, x_BPV: torch.Tensor, patches_B1P: torch.Tensor | None, labels_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each picture as K vectors [B, K, E] and each text as one [B, E], float32 of length 1."""
        queries_BKW, text_BTW = self._run(qformer, x_BPV, patches_B1P, labels_BT, apart_mask, MATCH)
        pictures_BKE, texts_BE = self.picture_projection(queries_BKW), self.text_projection(text_BTW[:, 0])
        return F.normalize(pictures_BKE.float(), dim=-1), F.normalize(texts_BE.float(), dim=-1)

    def _match(
        self,
        qformer: QFormer,
        x_BPV: torch.Tensor,
        patches_B1P: torch.Tensor | None,
        labels_BT: torch.Tensor,
        wrong_pictures_B: torch.Tensor,
        wrong_texts_B: torch.Tensor,
    ) -> torch.Tensor:
        """Logits [3B, 2] of the pairs, of wrong pictures with the texts, and of the pictures with wrong texts."""
        x_RPV = torch.cat([x_BPV, x_BPV[wrong_pictures_B], x_BPV])
        patches = patches_B1P
        patches_R1P = None if patches is None else torch.cat([patches, patches[wrong_pictures_B], patches])
        labels_RT = torch.cat([labels_BT, labels_BT, labels_BT[wrong_texts_B]])
        queries_RKW, _ = self._run(qformer, x_RPV, patches_R1P, labels_RT, together_mask, MATCH)
        return self.match_head(queries_RKW).float().mean(dim=1)

    def _generation_loss(
        self,
        qformer: QFormer,
        x_BPV: torch.Tensor,
        patches_B1P: torch.Tensor | None,
        labels_BT: torch.Tensor,
        is_pair_B: torch.Tensor,
    ) -> torch.Tensor:
        """The summed cross-entropy of each token after those before it, of all pairs."""
        _, text_BTW = self._run(qformer, x_BPV, patches_B1P, labels_BT[:, :-1], causal_mask, GENERATE)
        return token_loss_sum(self.word_head(text_BTW), labels_BT.masked_fill(~is_pair_B[:, None], IGNORED_LABEL))

    def _run(self, qformer, x_BPV, patches_B1P, labels_BT, mask_of, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and text after all layers, under a mask of ``matching_losses.py`` and behind a start."""
        is_word_BT = labels_BT != IGNORED_LABEL
        text_BTW = self.text.embed(labels_BT.masked_fill(~is_word_BT, 0), start)
        mask_BSS = mask_of(qformer.shape.num_tokens, F.pad(is_word_BT, (1, 0), value=True))
        return self.text(qformer, x_BPV, patches_B1P, text_BTW, mask_BSS)
