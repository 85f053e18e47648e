"""The log-probabilities of given texts: the decoder reads all their tokens at once, without writing them.

    score_texts(layers, [states_SD, states_SD], [[417, 9, 1], [417, 1]])     # [[-0.1, -2.3, -0.4], [-0.1, -4.0]]

The tokens of all texts stand one behind the other, without padding, as the rows of ``DecoderLayers``; texts whose
states are the same object share their source's keys and values.

Shape suffixes: N tokens of all texts, H heads, K head width, T tokens of a text, S positions of a source, D model
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 (the usual name)

from mmcot.models.decoder_layers import DecoderLayers
from mmcot.models.gated_t5 import MediaOfSource


@torch.inference_mode()
def score_texts(layers: DecoderLayers, states: Sequence[Any], texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The natural logarithm of the probability of every token of texts, under teacher forcing.

    Args:
        states: of each text's source, [S, D] or with media ``MediaOfSource``.
        texts: token ids without the start token; none is empty.
    """
    order = sorted(range(len(texts)), key=lambda number: id(states[number]))  # texts of one source are neighbours
    attention = TextAttention(layers, [states[number] for number in order], [len(texts[number]) for number in order])
    read = [token for number in order for token in (layers.start_token, *texts[number][:-1])]
    chosen = [token for number in order for token in texts[number]]
    ids_2N = torch.tensor([read, chosen], device=layers.device)
    logits_NV = layers.next_logits(ids_2N[0], attention).float()
    log_probs_N = logits_NV.gather(1, ids_2N[1][:, None])[:, 0] - logits_NV.logsumexp(dim=-1)
    pieces = log_probs_N.cpu().split([len(texts[number]) for number in order])
    found = dict(zip(order, pieces, strict=True))
    return [found[number].tolist() for number in range(len(texts))]


class TextAttention:
    """An ``Attention`` of ``DecoderLayers`` whose rows are the tokens of texts, each of which reads those before it.

    Args:
        states: of each text's source; those of one source are neighbours.
        lengths: of the texts, in tokens.
    """

    def __init__(self, layers: DecoderLayers, states: Sequence[Any], lengths: Sequence[int]) -> None:
        self._lengths, longest = list(lengths), max(lengths)
        reversed_bias_HP = layers.reversed_bias(longest).to(layers.dtype)
        # Row p of text is the window that begins at column T - 1 - p.
        self._bias_HTT = reversed_bias_HP.unfold(1, longest, 1).flip(1)
        self._sources: list[torch.Tensor] = []
        self._media: list[torch.Tensor] = []
        self._tokens_of_sources: list[int] = []
        last = None
        for own, length in zip(states, lengths, strict=True):
            if own is last:
                self._tokens_of_sources[-1] += length
                continue
            last = own
            self._tokens_of_sources.append(length)
            has_media = isinstance(own, MediaOfSource)
            self._sources.append(_by_layer(layers.source_keys_values(own.text if has_media else own)))
            if has_media and layers.gated is not None:
                self._media.append(_by_layer(layers.gated.keys_values(own.media[own.mask])))

    def own(self, number: int, query_BHK: torch.Tensor, keys_values_B2HK: torch.Tensor) -> torch.Tensor:
        """As in ``Attention``."""
        texts = zip(query_BHK.split(self._lengths), keys_values_B2HK.split(self._lengths), strict=True)
        return torch.cat(
            [
                _attend(query_THK, keys_values_T2HK.permute(1, 2, 0, 3), mask=self._bias_HTT[:, : len(query_THK)])
                for query_THK, keys_values_T2HK in texts
            ]
        )

    def source(self, number: int, query_BHK: torch.Tensor) -> torch.Tensor:
        """As in ``Attention``."""
        return self._read(self._sources, number, query_BHK, scale=1.0)

    def media(self, number: int, query_BHE: torch.Tensor) -> torch.Tensor:
        """As in ``Attention``."""
        return self._read(self._media, number, query_BHE, scale=query_BHE.shape[-1] ** -0.5)

    def _read(
        self, caches: Sequence[torch.Tensor], number: int, query_NHK: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        queries = query_NHK.split(self._tokens_of_sources)
        return torch.cat(
            [_attend(query, cache[number], scale=scale) for query, cache in zip(queries, caches, strict=True)]
        )


def _by_layer(keys_values_SL2HK: torch.Tensor) -> torch.Tensor:
    """Keys and values [L, 2, H, S, K] of a source."""
    return keys_values_SL2HK.permute(1, 2, 3, 0, 4).contiguous()


def _attend(
    query_THK: torch.Tensor, keys_values_2HSK: torch.Tensor, *, mask: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor:
    """Attention of the tokens of texts of one source; [T, H * K], zeros where there is nothing to read."""
    keys_HSK, values_HSK = keys_values_2HSK
    if keys_HSK.shape[1] == 0:
        return torch.zeros_like(query_THK).flatten(1)
    attended_1HTK = F.scaled_dot_product_attention(
        query_THK.transpose(0, 1)[None],
        keys_HSK[None],
        values_HSK[None],
        attn_mask=None if mask is None else mask[None, ..., : keys_HSK.shape[1]],
        scale=scale,
    )
    return attended_1HTK[0].transpose(0, 1).flatten(1)
