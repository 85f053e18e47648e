"""The step decoder with static shapes, so that a GPU can replay it as a CUDA graph.

A graph is a list of kernels with fixed shapes and addresses. Launching a graph is one call;
launching its kernels is hundreds of calls, which take most of a small model's step. Every step
computes all rows, also the unused ones. The number of attended positions is rounded up to a
multiple of ``WIDTH_STEP``, and a graph is captured for each such width at its first use.

Usage and results are those of ``StepDecoder``. Without CUDA the same operations run without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import T5ForConditionalGeneration

from mmcot.models.step_decoder import Group, StepDecoder

WIDTH_STEP = 64  # positions; each width is a graph of its own


def open_decoder(
    model: T5ForConditionalGeneration, *, num_rows: int, max_source_tokens: int, max_new_tokens: int
) -> StepDecoder | StaticDecoder:
    """The decoder for the model's device: on a GPU with static shapes."""
    decoder = StepDecoder(model, num_rows=num_rows, max_source_tokens=max_source_tokens, max_new_tokens=max_new_tokens)
    return StaticDecoder(decoder) if model.device.type == "cuda" else decoder


class StaticDecoder:
    """A ``StepDecoder`` with one shape of the step for each width."""

    @torch.inference_mode()
    def __init__(self, decoder: StepDecoder) -> None:
        self._decoder = decoder
        _, _, num_rows, _, max_source_tokens, _ = decoder.cross_L2BHSK.shape
        self._num_rows, self._max_source_tokens = num_rows, max_source_tokens
        self._ids_positions_2B = torch.zeros(2, num_rows, dtype=torch.long, device=decoder.device)
        self._cross_mask_B11S = torch.zeros(
            num_rows, 1, 1, max_source_tokens, dtype=decoder.dtype, device=decoder.device
        )
        self._steps: dict[int, Callable[[], torch.Tensor]] = {}

    @torch.inference_mode()
    def admit(self, row: int, states_SD: torch.Tensor) -> int:
        """Assign ``row`` to the source with these encoder states; returns the token to read at position 0."""
        first = self._decoder.admit(row, states_SD)
        self._mask_source(row, len(states_SD))
        return first

    @torch.inference_mode()
    def move(self, row: int, *, to: int, num_positions: int) -> None:
        """Copy the source and the first ``num_positions`` tokens of ``row`` to the row ``to``."""
        self._decoder.move(row, to=to, num_positions=num_positions)
        self._mask_source(to, self._decoder.source_lengths[to])

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Read one more token in each of the first ``len(token_ids)`` rows; returns logits [B, V]."""
        unused = [0] * (self._num_rows - len(token_ids))  # these rows write to their own first position
        self._ids_positions_2B.copy_(torch.tensor([[*token_ids, *unused], [*positions, *unused]]))
        width = min(-(-(max(positions) + 1) // WIDTH_STEP) * WIDTH_STEP, self._decoder.max_new_tokens)
        if width not in self._steps:
            self._steps[width] = self._capture(width)
        return self._steps[width]()[: len(token_ids)]

    def _mask_source(self, row: int, length: int) -> None:
        self._cross_mask_B11S[row, ..., :length] = 0.0
        self._cross_mask_B11S[row, ..., length:] = float("-inf")

    def _compute(self, width: int) -> torch.Tensor:
        ids_B, positions_B = self._ids_positions_2B
        own = Group(0, self._num_rows, width, self._decoder.bias_to_past(positions_B, width))
        cross = Group(0, self._num_rows, self._max_source_tokens, self._cross_mask_B11S)
        return self._decoder.run(ids_B, positions_B, [own], [cross])

    def _capture(self, width: int) -> Callable[[], torch.Tensor]:
        """Capture a graph of the step at this width; every replay reads and writes the same memory."""
        if self._decoder.device.type != "cuda":
            return lambda: self._compute(width)
        # A capture must not contain the choice of kernels or allocations, so these happen in warm-up runs on a
        # side stream. The runs write the current step's keys and values, which the replay writes again.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._compute(width)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads of the process may use the GPU
            logits_BV = self._compute(width)

        def replay() -> torch.Tensor:
            graph.replay()
            return logits_BV

        return replay
