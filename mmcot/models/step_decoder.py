"""T5's decoder, one token per row and call, from the weights of a transformers model.

    decoder = StepDecoder(model, num_rows=32, max_new_tokens=256)
    decoder.admit([0], [states_SD])                  # assign row 0 to a source
    logits_BV = decoder.step([0], positions=[0])     # the start token, at position 0
    logits_BV = decoder.step([417], positions=[1])

Every row has its own position: T5's bias depends only on the distance between query and
key, so one row may start a new text while others are in the middle of theirs. Rows in use
are always the first ones. A row that ends is replaced by a new source (``admit``), or the last
row moves to its place (``move``). One decoder serves any number of texts, one set of sources after
the other: its weights are packed once. This module handles neither texts nor the end of a row.

On a CPU the logits of a row do not depend on the other rows, bit for bit. Rows that are assigned to
the same states, the same object, share one source: its keys and values are computed and stored
once, and kept as long as a row reads them.

Shape suffixes: B rows in use, D model width, S source positions, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers import T5ForConditionalGeneration

from mmcot.models.decoder_layers import DecoderLayers
from mmcot.models.gated_t5 import MediaOfSource
from mmcot.models.row_attention import RowCaches, SourceCache
from mmcot.models.text_scores import score_texts


class StepDecoder:
    """The decoder of ``model`` with the keys and values of ``num_rows`` rows; sources get memory when admitted.

    Args:
        max_new_tokens: tokens that a row can read.
    """

    @torch.inference_mode()
    def __init__(self, model: T5ForConditionalGeneration, *, num_rows: int, max_new_tokens: int) -> None:
        self.num_rows, self.max_new_tokens = num_rows, max_new_tokens
        self._layers = DecoderLayers(model)
        self._caches = RowCaches(self._layers, num_rows=num_rows, max_new_tokens=max_new_tokens)
        self._states_of_rows: list[weakref.ref[torch.Tensor] | None] = [None] * num_rows

    @torch.inference_mode()
    def admit(self, rows: Sequence[int], states: Sequence[Any]) -> list[int]:
        """Assign each of ``rows`` to a source's encoder states [S, D]; returns the token each reads at position 0.

        Args:
            states: for a decoder with gated cross-attention ``MediaOfSource``.
        """
        for row, states_of_row in zip(rows, states, strict=True):
            self._admit(row, states_of_row)
        return [self._layers.start_token] * len(rows)

    def _admit(self, row: int, states: Any) -> None:
        caches, text_SD = self._caches, states.text if isinstance(states, MediaOfSource) else states
        caches.clear(row)
        # A reference that does not keep the states, with which a whole batch of the encoder would stay in memory.
        known = [r for r, of_row in enumerate(self._states_of_rows) if of_row is not None and of_row() is text_SD]
        self._states_of_rows[row] = weakref.ref(text_SD)
        if known:
            caches.sources[row], caches.media_of_rows[row] = caches.sources[known[0]], caches.media_of_rows[known[0]]
            return
        caches.sources[row] = SourceCache(self._layers.source_keys_values(text_SD))
        if self._layers.gated is not None:
            caches.media_of_rows[row] = SourceCache(self._layers.gated.keys_values(states.media[states.mask]))

    @torch.inference_mode()
    def move(self, row: int, *, to: int, num_positions: int) -> None:
        """Assign the row ``to`` to the source of ``row`` and copy the first ``num_positions`` tokens of its text."""
        self._caches.move(row, to=to, num_positions=num_positions)
        self._states_of_rows[to] = self._states_of_rows[row]

    def score(self, states: Sequence[Any], texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of every token of texts, each after its source's states."""
        return score_texts(self._layers, states, texts)

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Read one more token in each of the first ``len(token_ids)`` rows.

        Args:
            token_ids: the token of each row.
            positions: the token's position, 0 for a row's first; the row has read all earlier ones.

        Returns:
            logits [B, V] of the next token.
        """
        self._caches.begin(positions)
        return self._layers.next_logits(torch.tensor(token_ids, device=self._layers.device), self._caches)
