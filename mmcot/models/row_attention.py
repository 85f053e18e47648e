"""Attention of one query per row on a CPU: each row reads exactly its own keys, in products of its own.

    caches = RowCaches(layers, num_rows=32, max_new_tokens=256)
    caches.begin(positions=[0, 7])
    attended = caches.source(number, query_BHK)      # [B, H * K]

With one query a row, attention is limited by reading keys and values. Rows that share a call read the padding of the
longest one; a call for a single row costs some microseconds and reads none. So a row's result does not depend
on the other rows, bit for bit (where H * K is a multiple of 16: the rounding of a product of other
sizes may depend on the place in memory).

Keys, values and scores are float32, also of a bfloat16 model: products of a matrix in bfloat16 and one vector take
twice as long as in float32.

Products of a matrix and a vector are ``torch.bmm`` over the heads. The vectors are columns [H, n, 1] with strides
(n, 1, n): with strides (n, 1, 1) torch copies the matrix first.

Shape suffixes: B rows in use, H heads, K head width, S positions of a source, W positions of a text that are read,
T positions that a text can have, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch

from mmcot.models.decoder_layers import DecoderLayers

# Positions of a text that a row reads are rounded up to multiples of this, so that its views stay for some steps.
WIDTH_STEP = 16


class SourceCache:
    """Keys and values of one source in all layers; any number of rows may read them.

    Args:
        keys_values_SL2HK: S may be 0, then the result is 0.
    """

    def __init__(self, keys_values_SL2HK: torch.Tensor) -> None:
        keys_SLHK, values_SLHK = keys_values_SL2HK.float().unbind(2)
        num_positions, num_layers, num_heads, head_width = keys_SLHK.shape
        keys_LHSK = keys_SLHK.permute(1, 2, 0, 3).contiguous()
        # A row of S values for each number of a head: the product with the probabilities reads along the rows.
        values_LHKS = values_SLHK.flatten(1).T.contiguous().view(num_layers, num_heads, head_width, num_positions)
        self.num_positions = num_positions
        self._keys, self._values = keys_LHSK.unbind(0), values_LHKS.unbind(0)
        self._scores_HS = keys_LHSK.new_empty(num_heads, num_positions)
        self._scores_HS1 = as_columns(self._scores_HS)

    def attend(self, number: int, query_HK1: torch.Tensor, attended_HK1: torch.Tensor) -> None:
        """Write the result of one query in a layer to ``attended_HK1``."""
        torch.bmm(self._keys[number], query_HK1, out=self._scores_HS1)
        torch.softmax(self._scores_HS, -1, out=self._scores_HS)
        torch.bmm(self._values[number], self._scores_HS1, out=attended_HK1)


class TextWindow:
    """The first W positions of one row's text: views of its keys and values in all layers."""

    def __init__(self, keys_values_L2HWK: torch.Tensor) -> None:
        self.width = keys_values_L2HWK.shape[3]
        self._keys, self._values = (part.unbind(0) for part in keys_values_L2HWK.unbind(1))
        self._scores_HW = keys_values_L2HWK.new_empty(keys_values_L2HWK.shape[2:4])
        self._scores_HW1, self._scores_H1W = as_columns(self._scores_HW), self._scores_HW[:, None]

    def attend(self, number: int, query_HK1: torch.Tensor, bias_HW1: torch.Tensor, attended_H1K: torch.Tensor) -> None:
        """Write the result of one query in a layer, under an additive bias, to ``attended_H1K``."""
        torch.baddbmm(bias_HW1, self._keys[number], query_HK1, out=self._scores_HW1)
        torch.softmax(self._scores_HW, -1, out=self._scores_HW)
        torch.bmm(self._scores_H1W, self._values[number], out=attended_H1K)


class RowCaches:
    """The texts of ``num_rows`` rows, and the source and media of each: an ``Attention`` of ``DecoderLayers``."""

    def __init__(self, layers: DecoderLayers, *, num_rows: int, max_new_tokens: int) -> None:
        self.sources: list[SourceCache | None] = [None] * num_rows
        self.media_of_rows: list[SourceCache | None] = [None] * num_rows
        num_heads, head_width, device = layers.num_heads, layers.head_width, layers.device
        num_positions = _round_up(max_new_tokens)
        # Zeros, not uninitialised memory: masked positions are multiplied by 0, and 0 * NaN is NaN.
        shape = (layers.num_layers, 2, num_rows, num_heads, num_positions, head_width)
        self._own_L2BHTK = torch.zeros(shape, dtype=torch.float32, device=device)
        self._own_flat = [layer.view(-1, head_width) for layer in self._own_L2BHTK]
        first = torch.arange(2 * num_rows * num_heads, device=device) * num_positions
        self._first_position_2BH = first.view(2, num_rows, num_heads)
        self._num_written = [0] * num_rows  # positions of a row that may hold something; the others are 0
        self._windows: list[TextWindow | None] = [None] * num_rows
        self._last, self._bias_HP1 = num_positions - 1, as_columns(layers.reversed_bias(num_positions).float())
        self._step = _Step([], [], torch.empty(0))
        self._attended = _Attended(num_rows, num_heads, head_width, layers)
        self._attended_media = None
        if layers.gated is not None:
            self._attended_media = _Attended(num_rows, layers.gated.num_heads, layers.gated.head_width, layers)

    def clear(self, row: int) -> None:
        """Forget the text of ``row``: it may be NaN, which a mask does not hide."""
        self._own_L2BHTK[:, :, row, :, : self._num_written[row]] = 0
        self._num_written[row] = 0

    def move(self, row: int, *, to: int, num_positions: int) -> None:
        """Copy ``row`` with the first ``num_positions`` tokens of its text to the row ``to``."""
        self.clear(to)
        self._own_L2BHTK[:, :, to, :, :num_positions] = self._own_L2BHTK[:, :, row, :, :num_positions]
        self._num_written[to] = num_positions
        self.sources[to], self.media_of_rows[to] = self.sources[row], self.media_of_rows[row]

    def begin(self, positions: Sequence[int]) -> None:
        """Begin a step in which each of the first rows reads a token at its position, after all earlier ones."""
        windows, biases = [], []
        for row, position in enumerate(positions):
            self._num_written[row] = max(self._num_written[row], position + 1)
            width, window = _round_up(position + 1), self._windows[row]
            if window is None or window.width != width:
                window = self._windows[row] = TextWindow(self._own_L2BHTK[:, :, row, :, :width])
            windows.append(window)
            biases.append(self._bias_HP1.narrow(1, self._last - position, width))
        first_2BH = self._first_position_2BH[:, : len(positions)]
        places = first_2BH + torch.tensor(positions, device=first_2BH.device)[:, None]
        self._step = _Step(windows, biases, places.flatten())

    def own(self, number: int, query_BHK: torch.Tensor, keys_values_B2HK: torch.Tensor) -> torch.Tensor:
        """As in ``Attention``."""
        new = keys_values_B2HK.transpose(0, 1).float().reshape(-1, keys_values_B2HK.shape[-1])
        self._own_flat[number].index_copy_(0, self._step.places, new)
        rows = zip(self._step.windows, self._step.biases, _columns_of_rows(query_BHK), strict=True)
        for (window, bias_HW1, query_HK1), attended_H1K in zip(rows, self._attended.rows, strict=False):
            window.attend(number, query_HK1, bias_HW1, attended_H1K)
        return self._attended.first(len(query_BHK))

    def source(self, number: int, query_BHK: torch.Tensor) -> torch.Tensor:
        """As in ``Attention``."""
        return _attend(self.sources, number, query_BHK, self._attended)

    def media(self, number: int, query_BHE: torch.Tensor) -> torch.Tensor:
        """As in ``Attention``."""
        scaled_BHE = query_BHE.float() * query_BHE.shape[-1] ** -0.5
        return _attend(self.media_of_rows, number, scaled_BHE, cast(_Attended, self._attended_media))


class _Step(NamedTuple):
    """A step's windows and biases [H, W, 1] of the rows, and where new keys and values are stored, [2 * B * H]."""

    windows: list[TextWindow]
    biases: list[torch.Tensor]
    places: torch.Tensor


class _Attended:
    """Memory for the results of all rows, with a view of each row's: rows [H, 1, K] and columns [H, K, 1]."""

    def __init__(self, num_rows: int, num_heads: int, head_width: int, like: DecoderLayers) -> None:
        results_BHK = torch.zeros(num_rows, num_heads, head_width, dtype=torch.float32, device=like.device)
        self.rows, self.columns = results_BHK[:, :, None].unbind(0), _columns_of_rows(results_BHK)
        self._results_BD, self._dtype = results_BHK.flatten(1), like.dtype

    def first(self, num_rows: int) -> torch.Tensor:
        """The results of the first rows, [B, H * K]."""
        return self._results_BD[:num_rows].to(self._dtype)


def _attend(
    caches: Sequence[SourceCache | None], number: int, query_BHK: torch.Tensor, attended: _Attended
) -> torch.Tensor:
    """Let each row's query read its cache in a layer; returns [B, H * K]."""
    for cache, query_HK1, attended_HK1 in zip(caches, _columns_of_rows(query_BHK), attended.columns, strict=False):
        cast(SourceCache, cache).attend(number, query_HK1, attended_HK1)
    return attended.first(len(query_BHK))


def as_columns(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [..., n] as columns [..., n, 1]."""
    return vectors.unsqueeze(-2).transpose(-1, -2)


def _columns_of_rows(vectors_BHK: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return as_columns(vectors_BHK.float()).unbind(0)


def _round_up(number: int) -> int:
    return -(-number // WIDTH_STEP) * WIDTH_STEP
