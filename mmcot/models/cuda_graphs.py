"""The step decoder with static shapes, so that a GPU can replay it as a CUDA graph.

A graph is a list of kernels with fixed shapes and addresses. Launching a graph is one call;
launching its kernels is hundreds of calls, which take most of a small model's step. Every step
computes all rows, also the unused ones. The numbers of attended positions, of the text and of the
sources, are rounded up to multiples of ``WIDTH_STEP``; a graph is captured for each such pair at its
first use and kept as long as the decoder.

Usage and results are those of ``StepDecoder``. ``write_greedily`` also chooses the tokens on the device: the graph
ends with the choice, which is the next step's input, so several steps are launched before their tokens are copied
to the host. Without CUDA the same operations run without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import T5ForConditionalGeneration

from mmcot.models.decoder_layers import DecoderLayers
from mmcot.models.device import to_device
from mmcot.models.gated_t5 import MediaOfSource
from mmcot.models.static_rows import StaticRows
from mmcot.models.step_decoder import StepDecoder
from mmcot.models.text_scores import score_texts

WIDTH_STEP = 64  # positions; each pair of widths is a graph of its own
MAX_TOKENS_AHEAD = 8  # steps of ``write_greedily`` between two looks of the host


def open_decoder(
    model: T5ForConditionalGeneration, *, num_rows: int, max_source_tokens: int, max_new_tokens: int
) -> StepDecoder | StaticDecoder:
    """The decoder for the model's device: on a GPU with static shapes.

    On a CPU sources get memory when they are admitted, so that ``max_source_tokens`` may be far above what occurs.
    """
    if model.device.type == "cuda":
        return StaticDecoder(
            model, num_rows=num_rows, max_source_tokens=max_source_tokens, max_new_tokens=max_new_tokens
        )
    return StepDecoder(model, num_rows=num_rows, max_new_tokens=max_new_tokens)


class StaticDecoder:
    """The decoder of ``model`` with one shape of the step for each pair of widths.

    Args:
        max_source_tokens: states that a source can have.
        max_new_tokens: tokens that a row can read.
    """

    @torch.inference_mode()
    def __init__(
        self, model: T5ForConditionalGeneration, *, num_rows: int, max_source_tokens: int, max_new_tokens: int
    ) -> None:
        self.num_rows, self.max_new_tokens, self._max_source_tokens = num_rows, max_new_tokens, max_source_tokens
        self._layers = DecoderLayers(model)
        self._rows = StaticRows(
            self._layers, num_rows=num_rows, max_source_tokens=max_source_tokens, max_new_tokens=max_new_tokens
        )
        device, dtype = self._layers.device, self._layers.dtype
        self._ids_positions_2B = torch.zeros(2, num_rows, dtype=torch.long, device=device)
        self._chosen_NB = torch.zeros(MAX_TOKENS_AHEAD, num_rows, dtype=torch.long, device=device)
        # Of all graphs but the greedy ones: a tensor of each graph's own would be kept as long as the graph.
        self._logits_BV = torch.empty(num_rows, self._layers.vocab_size, dtype=dtype, device=device)
        self._steps: dict[tuple[int, int, bool], Callable[[], None]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @torch.inference_mode()
    def admit(self, rows: Sequence[int], states: Sequence[Any]) -> list[int]:
        """Assign each of ``rows`` to a source's encoder states [S, D]; returns the token each reads at position 0.

        Args:
            states: for a decoder with gated cross-attention ``MediaOfSource``.

        Raises:
            ValueError: a source has more states than this decoder was opened for.
        """
        lengths = [len(source.text if isinstance(source, MediaOfSource) else source) for source in states]
        if max(lengths) > self._max_source_tokens:
            raise ValueError(
                f"a source has {max(lengths)} states, this decoder was opened for at most "
                f"{self._max_source_tokens}; open it with a larger max_source_tokens"
            )
        self._rows.admit(rows, states)
        rows_R = to_device(np.array(rows), self._layers.device)
        self._ids_positions_2B[0].index_fill_(0, rows_R, self._layers.start_token)
        self._ids_positions_2B[1].index_fill_(0, rows_R, 0)
        return [self._layers.start_token] * len(rows)

    @torch.inference_mode()
    def move(self, row: int, *, to: int, num_positions: int) -> None:
        """Copy the source and all tokens of ``row``, of which ``num_positions`` are read, to the row ``to``."""
        self._rows.move(row, to=to)
        self._ids_positions_2B[:, to] = self._ids_positions_2B[:, row]

    def score(self, states: Sequence[Any], texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of every token of texts, each after its source's states, without a graph."""
        return score_texts(self._layers, states, texts)

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Read one more token in each of the first ``len(token_ids)`` rows; returns logits [B, V].

        The next step writes its logits to the same memory.
        """
        unused = [0] * (self.num_rows - len(token_ids))  # these rows write to their own first position
        self._ids_positions_2B.copy_(torch.tensor([[*token_ids, *unused], [*positions, *unused]]))
        self._step(len(token_ids), max(positions) + 1, is_greedy=False)()
        return self._logits_BV[: len(token_ids)]

    @torch.inference_mode()
    def resume(self, token_ids: Sequence[int], positions: Sequence[int]) -> None:
        """Let each of the first rows read this token at this position next; needed after ``step``."""
        values = to_device(np.array([token_ids, positions]), self._ids_positions_2B.device)
        self._ids_positions_2B[:, : len(token_ids)] = values

    @torch.inference_mode()
    def write_greedily(self, num_tokens: int, *, num_rows: int, num_positions: int) -> Callable[[], list[list[int]]]:
        """Begin to choose the next tokens of each of the first ``num_rows`` rows and to read all but the last.

        Rows do not end by themselves: those that have ended, or are not in use, write what the caller drops.

        Args:
            num_tokens: at most ``MAX_TOKENS_AHEAD``.
            num_positions: tokens that the row with most of them will have read.

        Returns:
            a function that waits for the tokens of each row, copied to the host at once.
        """
        step = self._step(num_rows, num_positions, is_greedy=True)
        for _ in range(num_tokens):
            step()
        return lambda: self._chosen_NB[-num_tokens:, :num_rows].T.tolist()

    def _step(self, num_rows: int, num_positions: int, *, is_greedy: bool) -> Callable[[], None]:
        """The step at the widths for so many positions and for the sources of the first rows."""
        source_width = _round_up(max(self._rows.source_lengths[:num_rows]), self._max_source_tokens)
        key = (_round_up(num_positions, self.max_new_tokens), source_width, is_greedy)
        if key not in self._steps:
            self._steps[key] = self._capture(*key)
        return self._steps[key]

    def _compute(self, width: int, source_width: int, is_greedy: bool) -> None:
        ids_B, positions_B = self._ids_positions_2B
        attention = self._rows.attention(positions_B, width=width, source_width=source_width)
        logits_BV = self._layers.next_logits(ids_B, attention)
        if not is_greedy:
            self._logits_BV.copy_(logits_BV)
        else:
            torch.argmax(logits_BV, dim=-1, out=ids_B)
            # A row that has ended stays at its last position, where it does no harm, until the host looks.
            positions_B.add_(1).clamp_(max=self.max_new_tokens - 1)
            self._chosen_NB.copy_(torch.cat([self._chosen_NB[1:], ids_B[None]]))

    def _capture(self, width: int, source_width: int, is_greedy: bool) -> Callable[[], None]:
        """Capture a graph of the step at these widths; every replay reads and writes the same memory."""
        if self._layers.device.type != "cuda":
            return lambda: self._compute(width, source_width, is_greedy)
        # A capture must not contain the choice of kernels or allocations, so these happen in warm-up runs on a
        # side stream. They write the keys and values of the current step, which the replay writes again; what they
        # chose is put back.
        before = self._ids_positions_2B.clone(), self._chosen_NB.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._compute(width, source_width, is_greedy)
                self._ids_positions_2B.copy_(before[0])
                self._chosen_NB.copy_(before[1])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the GPU. The graphs are never replayed at the same time, so that they
        # share memory; nothing of it is used after a replay.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._compute(width, source_width, is_greedy)
        return graph.replay


def _round_up(number: int, largest: int) -> int:
    return min(-(-number // WIDTH_STEP) * WIDTH_STEP, largest)
