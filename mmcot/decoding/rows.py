"""Texts that are written together, in the rows of one decoder.

    rows = Rows(model.open_reader(), decoder)
    rows.add([[Row(max_new_tokens=64, ends=frozenset([1]))]], batches)   # the texts of each source
    while rows:
        for row in rows.step():      # those that have ended
            row.ids                  # [417, 9, ..., 1]

When a text ends, the next waiting one takes its row at once (continuous batching), from whichever source was added
first. Texts may be added and cancelled between any two steps. A decoder that chooses tokens itself (``GreedyDecoder``,
on a GPU) is looked at every few tokens: a row that has ended by then is replaced at that time, and what it wrote after
its end is dropped. Where a row needs more than the likeliest token, the host chooses the tokens of all rows.

A text depends on its model, source and ``Row`` alone, not on the rows beside it: on a CPU bit for bit, on a GPU
except for rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from mmcot.decoding.choosing import choose_tokens
from mmcot.decoding.model_settings import check_generation_config
from mmcot.decoding.row import Row
from mmcot.decoding.source_batches import SourceBatch
from mmcot.errors import InputError
from mmcot.models.contract import Decoder, GenerativeModel, GreedyDecoder

SOURCES_AT_ONCE = 32  # at most, whose keys and values are computed together
TOKENS_PER_LOOK = 8  # of every row, between two looks at a decoder that chooses tokens itself

Read = Callable[..., list[Any]]


class Rows:
    """The rows of a decoder and the texts that wait for one.

    Args:
        read: encodes a batch of sources (``GenerativeModel.open_reader``).
        num_rows: how many of the decoder's rows are used; None for all.
        on_part: called whenever sources were encoded or assigned to rows.

    Attributes:
        num_rows: how many texts are written at a time.
        max_new_tokens: the limit of a text.
        num_steps: how often the rows were advanced; a look at a decoder that chooses tokens itself is one.
        num_row_steps: the sum over these of the rows that were in use.
    """

    def __init__(
        self,
        read: Read,
        decoder: Decoder,
        *,
        num_rows: int | None = None,
        on_part: Callable[[], None] = lambda: None,
    ) -> None:
        self.read, self._decoder, self._on_part = read, decoder, on_part
        self.num_rows = decoder.num_rows if num_rows is None else num_rows
        self.max_new_tokens = decoder.max_new_tokens
        self._waiting = _WaitingRows(read, on_part)
        self._rows: list[Row] = []
        self._was_host = False  # whether the host chose the last tokens
        self.num_steps, self.num_row_steps = 0, 0

    def __bool__(self) -> bool:
        return self._waiting.number > 0 or any(not row.has_ended for row in self._rows)

    def add(self, rows_of_sources: Sequence[Sequence[Row]], batches: Iterable[SourceBatch]) -> None:
        """Let texts wait for rows, in the order in which ``batches`` have their sources.

        Args:
            rows_of_sources: the texts of each source, which is encoded once for all of them.
            batches: all sources, their indices as in ``rows_of_sources``; read when they are needed.
        """
        self._waiting.add(rows_of_sources, batches)

    def add_encoded(self, rows: Sequence[tuple[Row, Any]]) -> None:
        """Let texts wait whose sources' states are known, before all that wait already."""
        self._waiting.add_encoded(rows)

    def check(self, rows: Sequence[Row]) -> None:
        """Raise InputError where a text does not fit the decoder, or its values contradict each other."""
        for row in rows:
            if not 1 <= row.max_new_tokens <= self.max_new_tokens:
                raise InputError(
                    f"max_new_tokens ({row.max_new_tokens}) must be at least 1 and at most the "
                    f"{self.max_new_tokens} that the engine was opened for; open a larger one"
                )
            if len(row.prefix) >= row.max_new_tokens:
                raise InputError(
                    f"the prefix of source {row.index} has {len(row.prefix)} tokens, max_new_tokens is "
                    f"{row.max_new_tokens}; a prefix counts as new tokens, so the limit must be larger"
                )
            if row.min_new_tokens > row.max_new_tokens:
                raise InputError(
                    f"min_new_tokens ({row.min_new_tokens}) is above max_new_tokens ({row.max_new_tokens}); lower it"
                )

    @property
    def num_waiting(self) -> int:
        """How many texts wait for a row, cancelled ones among them."""
        return self._waiting.number

    def score(self, states: Sequence[Any], texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of every token of texts, each after its source's states; no row is used."""
        return self._decoder.score(states, texts)

    def clear(self) -> None:
        """Forget all texts, such as after an error in a step."""
        self._rows.clear()
        self._waiting = _WaitingRows(self.read, self._on_part)

    def cancel(self, row: Row) -> None:
        """End a text that is being written or waits, unless it has ended; ``step`` does not return it."""
        if not row.has_ended:
            row.finish = "cancelled"

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Give free rows to waiting texts and write the next token of every row, or the next few; returns those ended.

        A text that ends with its first token gives its row to the next one at the next step.
        """
        self._fill()
        if not self._rows:
            return []
        running = list(self._rows)
        self.num_steps, self.num_row_steps = self.num_steps + 1, self.num_row_steps + len(running)
        if isinstance(self._decoder, GreedyDecoder) and all(row.is_plain for row in running):
            self._write_on_device(self._decoder, running)
        else:
            self._write_on_host(running)
        return [row for row in running if row.has_ended and row.finish != "cancelled"]

    def _fill(self) -> None:
        """Replace the texts that have ended; the rows in use stay the first ones."""
        ended = [place for place, row in enumerate(self._rows) if row.has_ended]
        while ended and (given := self._waiting.take(min(len(ended), SOURCES_AT_ONCE))):
            places, ended = ended[: len(given)], ended[len(given) :]
            self._begin(places, given)
        for place in reversed(ended):  # backwards, so that the last row is always one that continues
            last = self._rows.pop()
            if place < len(self._rows):
                self._rows[place] = last
                self._decoder.move(len(self._rows), to=place, num_positions=len(last.ids))
        while (number := self.num_rows - len(self._rows)) > 0:
            if not (given := self._waiting.take(min(number, SOURCES_AT_ONCE))):
                break
            self._begin(range(len(self._rows), len(self._rows) + len(given)), given)

    def _begin(self, places: Sequence[int], given: Sequence[tuple[Row, Any]]) -> None:
        """Assign places, of which those at the end may be new, to texts and their sources' states."""
        first = self._decoder.admit(places, [states for _, states in given])
        for place, (row, _), token in zip(places, given, first, strict=True):
            row.before = row.before or (token,)
            self._rows[place : place + 1] = [row]
        self._on_part()

    def _write_on_device(self, decoder: GreedyDecoder, rows: Sequence[Row]) -> None:
        """Let the decoder choose the next tokens of each row, at most ``TOKENS_PER_LOOK``."""
        if self._was_host:
            decoder.resume(*zip(*(row.next_input() for row in rows), strict=True))
            self._was_host = False
        num_tokens = min(TOKENS_PER_LOOK, max(row.max_new_tokens - len(row.ids) for row in rows))
        longest = max(len(row.ids) for row in rows)
        tokens_of_rows = decoder.write_greedily(num_tokens, num_rows=len(rows), num_positions=longest + num_tokens)
        self._waiting.encode(len(rows) // 4)  # while a GPU writes
        for row, tokens in zip(rows, tokens_of_rows(), strict=True):
            for token in tokens:
                if row.has_ended:
                    break  # what was written after the end is dropped
                row.add(token)

    def _write_on_host(self, rows: Sequence[Row]) -> None:
        """Choose the next token of each row from the logits, or take it from the row's prefix."""
        ids, positions = zip(*(row.next_input() for row in rows), strict=True)
        tokens, log_probs = choose_tokens(self._decoder.step(ids, positions), rows)
        self._was_host = True
        for row, token, log_prob in zip(rows, tokens, log_probs, strict=True):
            if not row.has_ended:  # another row's ``on_token`` may cancel it
                row.add(token, log_prob)


def open_rows(
    model: GenerativeModel,
    *,
    num_rows: int,
    max_source_tokens: int,
    max_new_tokens: int,
    on_part: Callable[[], None] = lambda: None,
) -> Rows:
    """Prepare a model for sources and texts of at most these lengths, ``num_rows`` of them at a time.

    Raises:
        InputError: the model's ``generation_config`` sets what would be ignored.
    """
    check_generation_config(model)
    sizes = {"max_source_tokens": max_source_tokens, "max_new_tokens": max_new_tokens}
    if min(num_rows, *sizes.values()) < 1:
        raise InputError(f"the number of rows ({num_rows}) and the limits of tokens ({sizes}) must be at least 1")
    return Rows(model.open_reader(), model.open_decoder(num_rows=num_rows, **sizes), on_part=on_part)


class _WaitingRows:
    """Texts in the order in which they get rows; sources are encoded when they are needed."""

    def __init__(self, read: Read, on_part: Callable[[], None]) -> None:
        self._read, self._on_part = read, on_part
        self._added: deque[tuple[Sequence[Sequence[Row]], Iterator[SourceBatch]]] = deque()
        self._ready: deque[tuple[Row, Any]] = deque()
        self.number = 0  # of texts, cancelled ones among them

    def add(self, rows_of_sources: Sequence[Sequence[Row]], batches: Iterable[SourceBatch]) -> None:
        """Append texts."""
        self._added.append((rows_of_sources, iter(batches)))
        self.number += sum(map(len, rows_of_sources))

    def add_encoded(self, rows: Sequence[tuple[Row, Any]]) -> None:
        """Put texts with their sources' states first."""
        self._ready.extendleft(reversed(rows))
        self.number += len(rows)

    @torch.inference_mode()
    def encode(self, number: int) -> None:
        """Encode batches until so many texts are ready, or all."""
        while len(self._ready) < number and self._added:
            rows_of_sources, batches = self._added[0]
            if (batch := next(batches, None)) is None:
                self._added.popleft()
                continue
            waiting = [rows_of_sources[index] for index in batch.indices]
            if all(row.has_ended for rows in waiting for row in rows):  # cancelled
                self.number -= sum(map(len, waiting))
            else:
                states = read_batch(self._read, batch.inputs)
                self._ready.extend((row, own) for rows, own in zip(waiting, states, strict=True) for row in rows)
                self._on_part()

    def take(self, number: int) -> list[tuple[Row, Any]]:
        """The next texts with their sources' states, fewer where there are no more."""
        taken: list[tuple[Row, Any]] = []
        while len(taken) < number:
            self.encode(number - len(taken))
            if not self._ready:
                break
            self.number -= 1
            if not (following := self._ready.popleft())[0].has_ended:
                taken.append(following)
        return taken


def read_batch(read: Read, inputs: dict[str, torch.Tensor]) -> list[Any]:
    """Encode a batch; in halves where it does not fit the memory, which depends on the model and on other processes."""
    num_sources = len(inputs["input_ids"])
    try:
        return read(**inputs)
    except torch.OutOfMemoryError:
        if num_sources == 1:
            raise
    # Not within the handler, where the error keeps what was computed.
    halves = slice(num_sources // 2), slice(num_sources // 2, None)
    return [states for half in halves for states in read_batch(read, {name: inputs[name][half] for name in inputs})]
