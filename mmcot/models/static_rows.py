"""The rows of a decoder in tensors of fixed shapes and addresses, so that a GPU can replay a step as a CUDA graph.

    rows = StaticRows(layers, num_rows=32, max_source_tokens=512, max_new_tokens=256)
    rows.admit([0], [states_SD])
    logits_BV = layers.next_logits(ids_B, rows.attention(positions_B, width=64, source_width=128))

Every step computes all rows, at the same widths.

Shape suffixes: B rows, R rows that are admitted, L layers, H heads, K head width, E head width of media, D model
width, S source positions, N tokens of all admitted sources, T target positions, M media of a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 (the usual name)

from mmcot.models.decoder_layers import DecoderLayers
from mmcot.models.device import to_device
from mmcot.models.gated_layers import GatedLayers
from mmcot.models.gated_t5 import MediaOfSource

# The mask of sources has a multiple of so many columns: its rows begin at addresses that a GPU's attention takes.
SOURCE_STEP = 64


class StaticRows:
    """Keys and values of ``num_rows`` texts, their sources and media.

    Args:
        max_source_tokens: columns that are allocated for a source.
        max_new_tokens: columns that are allocated for a text.
    """

    def __init__(self, layers: DecoderLayers, *, num_rows: int, max_source_tokens: int, max_new_tokens: int) -> None:
        self._layers, self.source_lengths = layers, [0] * num_rows
        shape = (layers.num_layers, 2, num_rows, layers.num_heads)
        like = {"device": layers.device, "dtype": layers.dtype}
        # Zeros, not uninitialised memory: masked columns are multiplied by 0, and 0 * NaN is NaN.
        self.own_L2BHTK = torch.zeros(*shape, max_new_tokens, layers.head_width, **like)
        self.source_L2BHSK = torch.zeros(*shape, max_source_tokens, layers.head_width, **like)
        columns = -(-max_source_tokens // SOURCE_STEP) * SOURCE_STEP
        self.source_mask_B11S = torch.zeros(num_rows, 1, 1, columns, **like)
        self.own_flat = [layer.view(-1, layers.head_width) for layer in self.own_L2BHTK]
        first = torch.arange(2 * num_rows * layers.num_heads, device=layers.device) * max_new_tokens
        self.first_column_2BH = first.view(2, num_rows, -1)
        self._last, self._bias_HP = max_new_tokens - 1, layers.reversed_bias(max_new_tokens).to(layers.dtype)
        self.media: StaticMedia | None = None
        if layers.gated is not None:
            self.media = StaticMedia(layers.gated, num_layers=layers.num_layers, num_rows=num_rows, **like)

    def admit(self, rows: Sequence[int], states: Sequence[Any]) -> None:
        """Assign each of ``rows`` to a source's states, in a few operations for all rows together.

        What a row held before is cleared: it may be NaN, which a mask does not hide. Keys and values of states that
        are the same object are computed once.

        Args:
            rows: different ones.
            states: [S, D] each, of at most as many tokens as there are columns; with media ``MediaOfSource``.
        """
        if self.media is not None:
            self.media.admit(rows, states)
            states = [source.text for source in states]
        layers, lengths = self._layers, [len(states_SD) for states_SD in states]
        different = {id(states_SD): states_SD for states_SD in states}
        starts = dict(zip(different, np.cumsum([0, *map(len, different.values())]).tolist(), strict=False))
        columns = np.concatenate([np.arange(length) for length in lengths])
        tokens = columns + np.repeat([starts[id(states_SD)] for states_SD in states], lengths)
        rows_N, columns_N, tokens_N = to_device(np.stack([np.repeat(rows, lengths), columns, tokens]), layers.device)
        rows_R, lengths_R = to_device(np.array([list(rows), lengths]), layers.device)
        self.own_L2BHTK.index_fill_(2, rows_R, 0)
        self.source_L2BHSK.index_fill_(2, rows_R, 0)
        keys_values = layers.source_keys_values(torch.cat(list(different.values())))
        if len(different) < len(states):
            keys_values = keys_values.index_select(0, tokens_N)
        self.source_L2BHSK[:, :, rows_N, :, columns_N] = keys_values
        columns_S = torch.arange(self.source_mask_B11S.shape[-1], device=layers.device)
        mask_RS = torch.zeros_like(self.source_mask_B11S[: len(rows), 0, 0])
        mask_RS.masked_fill_(columns_S >= lengths_R[:, None], float("-inf"))
        self.source_mask_B11S.index_copy_(0, rows_R, mask_RS[:, None, None])
        for row, length in zip(rows, lengths, strict=True):
            self.source_lengths[row] = length

    def move(self, row: int, *, to: int) -> None:
        """Copy the text, the source and the media of ``row`` to the row ``to``."""
        self.source_lengths[to] = self.source_lengths[row]
        self.source_mask_B11S[to] = self.source_mask_B11S[row]
        for cache in (self.own_L2BHTK, self.source_L2BHSK):
            cache[:, :, to] = cache[:, :, row]
        if self.media is not None:
            self.media.move(row, to=to)

    def attention(self, positions_B: torch.Tensor, *, width: int, source_width: int) -> StaticAttention:
        """What the rows attend in a step.

        Args:
            positions_B: of the tokens that all rows read.
            width: columns of texts that are read, more than any position in use.
            source_width: columns of sources that are read.
        """
        # Additive: T5's bias for the positions a row has read, -inf for the rest.
        windows = self._bias_HP.unfold(1, width, 1)
        bias_BH1T = windows.index_select(1, self._last - positions_B).transpose(0, 1).unsqueeze(2)
        return StaticAttention(self, positions_B, bias_BH1T, self.source_mask_B11S[..., :source_width])


class StaticAttention:
    """An ``Attention`` of ``DecoderLayers``, for one step of all rows."""

    def __init__(
        self, rows: StaticRows, positions_B: torch.Tensor, bias_BH1T: torch.Tensor, source_mask_B11S: torch.Tensor
    ) -> None:
        self._rows, self._bias_BH1T, self._source_mask_B11S = rows, bias_BH1T, source_mask_B11S
        self._columns = (rows.first_column_2BH + positions_B[:, None]).flatten()

    def own(self, number: int, query_BHK: torch.Tensor, keys_values_B2HK: torch.Tensor) -> torch.Tensor:
        """As in ``Attention``."""
        new = keys_values_B2HK.transpose(0, 1).reshape(-1, keys_values_B2HK.shape[-1])
        self._rows.own_flat[number].index_copy_(0, self._columns, new)
        return _attend(query_BHK, self._rows.own_L2BHTK[number], self._bias_BH1T)

    def source(self, number: int, query_BHK: torch.Tensor) -> torch.Tensor:
        """As in ``Attention``."""
        return _attend(query_BHK, self._rows.source_L2BHSK[number], self._source_mask_B11S)

    def media(self, number: int, query_BHE: torch.Tensor) -> torch.Tensor:
        """As in ``Attention``."""
        media = cast(StaticMedia, self._rows.media)
        return _attend(query_BHE, media.cache_L2BHME[number], media.mask_B11M, scale=query_BHE.shape[-1] ** -0.5)


class StaticMedia:
    """The media of all rows. A row without media gets zeros as keys and values, so that it reads zeros."""

    def __init__(
        self, gated: GatedLayers, *, num_layers: int, num_rows: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._gated = gated
        shape = (num_layers, 2, num_rows, gated.num_heads, gated.num_media, gated.head_width)
        self.cache_L2BHME = torch.zeros(shape, device=device, dtype=dtype)
        self.mask_B11M = torch.zeros(num_rows, 1, 1, gated.num_media, device=device, dtype=dtype)

    def admit(self, rows: Sequence[int], sources: Sequence[MediaOfSource]) -> None:
        """Assign each of some rows to a source's media."""
        media_RMD = torch.stack([source.media for source in sources])
        mask_RM = torch.stack([source.mask for source in sources])
        has_media_R1 = mask_RM.any(dim=1, keepdim=True)
        rows_R = to_device(np.array(rows), media_RMD.device)
        keys_values = self._gated.keys_values((media_RMD * has_media_R1[..., None]).flatten(0, 1))
        keys_values = keys_values.unflatten(0, mask_RM.shape)  # [R, M, L, 2, H, E]
        self.cache_L2BHME.index_copy_(2, rows_R, keys_values.permute(2, 3, 0, 4, 1, 5))
        mask_R11M = torch.zeros_like(self.mask_B11M[: len(rows)])
        mask_R11M.masked_fill_(~(mask_RM | ~has_media_R1)[:, None, None], float("-inf"))
        self.mask_B11M.index_copy_(0, rows_R, mask_R11M)

    def move(self, row: int, *, to: int) -> None:
        """Copy the media of ``row`` to the row ``to``."""
        self.cache_L2BHME[:, :, to] = self.cache_L2BHME[:, :, row]
        self.mask_B11M[to] = self.mask_B11M[row]


def _attend(
    query_BHK: torch.Tensor, keys_values_2BHTK: torch.Tensor, mask: torch.Tensor, *, scale: float = 1.0
) -> torch.Tensor:
    """Attention over as many columns as the additive mask [B, H or 1, 1, width] has; returns [B, H * K]."""
    keys_BHTK, values_BHTK = keys_values_2BHTK[..., : mask.shape[-1], :].unbind(0)
    attended_BH1K = F.scaled_dot_product_attention(
        query_BHK[:, :, None], keys_BHTK, values_BHTK, attn_mask=mask, scale=scale
    )
    return attended_BH1K.flatten(1)
